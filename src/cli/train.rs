//! `train`: from a recipe to an adapter.

use super::{args::TrainArgs, stdout};
use crate::{
    Result,
    recipe::Recipe,
    train::{open::StartAt, run::train},
};

/// Runs the command. The recipe is checked before anything else is touched.
pub fn run(args: TrainArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.overrides())?;
    let from = match args.resume {
        None => StartAt::Start,
        Some(None) => StartAt::Latest,
        Some(Some(checkpoint)) => StartAt::Checkpoint(checkpoint),
    };
    let summary = train(&recipe, &from, args.extend)?;
    match args.json {
        true => stdout::json(&summary),
        false => stdout::line(format!("\n{summary}")),
    }
}
