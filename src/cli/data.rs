//! `data check`: what becomes of a recipe's rows.

use super::{args::DataCheckArgs, data_check};
use crate::{Result, hub, recipe::Recipe, train::rows};

/// Runs the command.
pub fn run(args: DataCheckArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.set.set)?;
    let model = hub::model(&recipe.model.base, &recipe.model.revision)?;
    let (train, eval) = (rows::files(&recipe.data.train)?, rows::files(&recipe.data.eval)?);
    data_check::run(&recipe, &model, &train, &eval, args.show, args.json)
}
