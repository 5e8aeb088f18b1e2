//! `eval`: loss, accuracy and margins on held-out pairs.

use std::path::Path;

use serde_json::{Map, Value};

use super::{args::EvalArgs, stdout};
use crate::{
    Error, Result,
    data::{Options, TokenizedPair},
    engine::{pass::Engine, schedule::Schedule},
    export::AdapterFolder,
    model::linear::Through,
    objective::Means,
    recipe::Recipe,
    report::Progress,
    train::{
        adapters, base::Base, device, folder, origin::Origin, pairs, reference::Reference, rows, signals::Signals,
    },
};

/// Runs the command.
pub fn run(args: EvalArgs) -> Result<()> {
    let is_run = args.target.is_dir();
    let recipe = match is_run {
        true => Recipe::load_run(&args.target, &args.set.set)?,
        false => Recipe::load(&args.target, &args.set.set)?,
    };
    let adapter = match (args.adapter, is_run) {
        (Some(adapter), _) => Some(adapter),
        (None, true) => Some(folder::adapter_of(&args.target)?),
        (None, false) => None,
    };
    device::use_threads(recipe.run.threads);
    let device = device::choose(&recipe.run.device, &Progress::stderr())?;
    let compute = device::compute(recipe.memory.compute, !device.is_cpu());
    let base = Base::open(&recipe.model.base, &recipe.model.revision, &device, compute)?;
    let origin = adapter.as_deref().map(Origin::of).transpose()?.flatten();
    if let Some(origin) = &origin {
        let named = !is_run || args.set.set.iter().any(|set| set.trim_start().starts_with("model."));
        origin.check_base(&base, named, "--set model.base=MODEL")?;
    }
    let adapter = adapter.map(|path| adapters::from_folder(&AdapterFolder::read(&path)?, &base)).transpose()?;
    let held_out = match args.data.is_empty() {
        true => rows::Rows::load(&recipe, &base)?.eval,
        false => rows::load(&args.data, &recipe, &base, &Options::eval(&recipe.data))?.pairs,
    };
    if held_out.is_empty() {
        return Err(Error::recipe("the recipe holds no rows out; name some with --data FILE"));
    }
    if is_run && args.data.is_empty() && origin.is_some_and(|origin| !origin.held_out(&held_out)) {
        Progress::stderr().note(
            "warning: these are not the rows that the run held out, or not their tokens: files, settings, tokenizer or \
             chat template changed since; the figures are not comparable, and it may have been trained on some of them",
        );
    }
    let reference = Reference::of(&recipe, &base)?;
    let means = evaluate(&recipe, &base, Through::of(adapter.as_ref()), reference, &held_out)?;
    let mut results: Map<String, Value> =
        means.named().map(|(name, value)| (format!("eval_{name}"), value.into())).into_iter().collect();
    results.insert("eval_pairs".into(), means.pairs.into());
    if args.json {
        return stdout::json(&results);
    }
    for (name, value) in &results {
        stdout::line(format!("{name:<28}{:>12.4}", value.as_f64().unwrap_or_default()))?;
    }
    Ok(())
}

fn evaluate(
    recipe: &Recipe,
    base: &Base,
    policy: Through,
    mut reference: Reference,
    pairs: &[TokenizedPair],
) -> Result<Means> {
    let signals = Signals::install()?;
    signals.hold();
    let poll = || signals.stopped();
    let schedule = Schedule::default();
    let engine = Engine { model: &base.model, schedule: &schedule, scratch: Path::new("."), poll: &poll };
    let means = pairs::evaluate(engine, pairs, &mut reference, &recipe.objective, policy, &Progress::stderr())?;
    means.ok_or_else(|| Error::run("no pair was evaluated"))
}
