//! `eval`: loss, accuracy and margins on held-out pairs.

use super::args::EvalArgs;
use crate::{Error, Result};

/// Runs the command.
pub fn run(_args: EvalArgs) -> Result<()> {
    Err(Error::run("not written yet"))
}
