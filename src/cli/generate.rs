//! `generate`: text from a model, with and without an adapter.

use super::args::GenerateArgs;
use crate::{Error, Result};

/// Runs the command.
pub fn run(_args: GenerateArgs) -> Result<()> {
    Err(Error::run("not written yet"))
}
