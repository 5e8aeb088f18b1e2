//! `inspect`: what a folder is.

use super::args::InspectArgs;
use crate::{Error, Result};

/// Runs the command.
pub fn run(_args: InspectArgs) -> Result<()> {
    Err(Error::run("not written yet"))
}
