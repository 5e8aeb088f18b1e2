//! `train`: from a recipe to an adapter.

use super::args::TrainArgs;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// Runs the command. The recipe is checked before anything else is touched.
pub fn run(args: TrainArgs) -> Result<()> {
    Recipe::load(&args.recipe, &args.overrides())?;
    Err(Error::run("not written yet"))
}
