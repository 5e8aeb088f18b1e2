//! `data check`: what is read and what is refused.

use super::args::DataCheckArgs;
use crate::{Error, Result};

/// Runs the command.
pub fn run(_args: DataCheckArgs) -> Result<()> {
    Err(Error::run("not written yet"))
}
