//! `quantize`: a smaller base from a large one.

use super::args::{QuantizeArgs, QuantizeTo};
use super::stdout;
use crate::export::quantize::{self, Loss, To, Written};
use crate::report::units;
use crate::train::signals::Signals;
use crate::{Result, hub};

/// Runs the command.
///
/// # Errors
/// [`crate::Error::Recipe`] where OUT exists, [`crate::Error::Input`] where the model cannot be written so,
/// [`crate::Error::Stopped`] after a signal: OUT is then absent, or whole where the signal came as it was finished.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let to = match args.to {
        QuantizeTo::Nf4 => To::Nf4,
        QuantizeTo::Q8_0 => To::Q8_0,
        QuantizeTo::Q4K => To::Q4K,
    };
    let signals = Signals::install()?;
    let path = hub::model(&args.model, "main")?;
    // from here on there is something to clear away
    signals.hold();
    let (mut all, mut bytes) = (Loss::default(), 0);
    let mut told = |written: &Written| {
        all.add(written.error);
        bytes += written.bytes;
        let (error, most) = (written.error.relative(), written.error.most);
        stdout::line(format!("{:<48} {:>6}  error {error:.5}  most {most:.5}", written.name, written.format))
    };
    quantize::quantize(&path, to, &args.out, &mut told, &|| signals.stopped())?;
    stdout::line(format!(
        "{} in {}: {}; error in all {:.5} (norm of the difference over norm of the source), {:.5} at most",
        args.to.name(),
        args.out.display(),
        units::bytes(bytes),
        all.relative(),
        all.most
    ))?;
    signals.stopped()
}
