//! `export`: a PEFT adapter or a merged model.

use super::args::ExportArgs;
use crate::{Error, Result};

/// Runs the command.
pub fn run(_args: ExportArgs) -> Result<()> {
    Err(Error::run("not written yet"))
}
