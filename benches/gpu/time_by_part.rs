//! Where the time of a training step goes on a device: steps as `dpo-lora train` would take them under its plan, with a
//! wait for the device at every border of a part, so that each part is charged what it queued.
//!
//! ```text
//! cargo run --release --features cuda,profile --example time-by-part -- [--no-waits] RECIPE [KEY=VALUE]...
//! ```
//!
//! One JSON object: seconds a step, and of them each part's and what lies between. The waits make a step slower than it
//! is in a run; the parts' shares are what this is for. `--no-waits` leaves them out: then the steps are as fast as in
//! a run, and a part is charged what the host takes to queue it. Beside them the plan's prediction, part by part, and
//! what the card's pool of memory came to.

use std::{path::Path, process::ExitCode, time::Instant};

use dpo_lora::{
    engine::pass::Engine,
    kernels::profile::{self, Part},
    objective::Metrics,
    optim::{Gradient, Optimizer},
    recipe::Recipe,
    report::Progress,
    train::{
        adapters,
        base::Base,
        budget::{self, Held, Memory},
        device, pairs,
        reference::Reference,
        rows::Rows,
        steps,
    },
};

/// As in the program: large blocks that are freed stay for the next ones.
#[global_allocator]
static ALLOCATOR: dpo_lora::heap::Heap = dpo_lora::heap::Heap;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let waits = arguments.first().is_none_or(|first| first != "--no-waits");
    arguments.drain(..usize::from(!waits));
    let Some((recipe, set)) = arguments.split_first() else {
        eprintln!("time-by-part: expected [--no-waits] RECIPE [KEY=VALUE]...");
        return ExitCode::FAILURE;
    };
    match measure(Path::new(recipe), set, waits) {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("time-by-part: {error}");
            ExitCode::FAILURE
        }
    }
}

/// All steps of the recipe but the first, which also loads kernels and weights.
fn measure(path: &Path, set: &[String], waits: bool) -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    let recipe = Recipe::load(path, set)?;
    let on = device::choose(&recipe.run.device, &Progress::stderr())?;
    let compute = device::compute(recipe.memory.compute, !on.is_cpu());
    let (meter, free) = device::meter(&on);
    let base = Base::open(&recipe.model.base, &recipe.model.revision, &on, compute)?;
    let rows = Rows::load(&recipe, &base)?;
    let (_, adapter) = adapters::Start::of(&recipe, &base)?.make(&recipe, &base)?;
    let memory = match on.is_cpu() {
        true => Memory::Host(Held::measure(&meter)),
        false => Memory::Device { free, card: on.is_cuda(), peak: device::peak(&on) },
    };
    let planned = budget::plan(&recipe, &base, &rows, &adapter.shapes, memory)?;
    let mut optimizer = Optimizer::new(&recipe.train, &adapter.values)?;
    if waits {
        profile::watch(&on);
    }

    let (schedule, scratch) = (&planned.plan.schedule, std::env::temp_dir());
    let engine = Engine { model: &base.model, schedule, scratch: &scratch, poll: &|| Ok(()) };
    let (mut count, mut pairs_seen, mut seconds, mut optimizing) = (0, 0, 0.0, 0.0);
    for (number, batch) in steps::batches(&recipe, &rows.train).enumerate() {
        // a fresh reference knows no row yet, so its pass is within the step
        let (mut reference, mut metrics) = (Reference::new(None), Metrics::new(recipe.objective.beta));
        let began = Instant::now();
        pairs::gradient(engine, &batch, &mut reference, &recipe.objective, (&adapter, None), &mut metrics)?;
        on.synchronize()?;
        let then = Instant::now();
        let gradient = Gradient::clipped(&adapter.grads, recipe.train.max_grad_norm)?;
        optimizer.step(&adapter.values, gradient, recipe.train.learning_rate)?;
        on.synchronize()?;
        if number == 0 {
            profile::take();
        } else {
            (count, pairs_seen) = (count + 1, pairs_seen + batch.len());
            seconds += began.elapsed().as_secs_f64();
            optimizing += then.elapsed().as_secs_f64();
        }
    }
    if count == 0 {
        return Err("two steps or more are needed".into());
    }
    let mut parts: Vec<(String, f64)> = Part::ALL
        .iter()
        .zip(profile::take())
        .map(|(part, time)| (format!("{part:?}").to_lowercase(), time.as_secs_f64()))
        .chain([("optimizer".to_string(), optimizing)])
        .collect();
    parts.push(("rest".to_string(), seconds - parts.iter().map(|(_, time)| time).sum::<f64>()));
    let each = |time: f64| (time / f64::from(count) * 1e6).round() / 1e6;
    let share = |time: f64| (time / seconds * 1e4).round() / 1e4;
    Ok(serde_json::json!({
        "steps": count,
        "pairs": pairs_seen,
        "seconds_a_step": each(seconds),
        "schedule": schedule,
        "predicted": planned.plan.highest(),
        "predicted_bytes": planned.plan.peak(),
        "most_used_and_held_bytes": device::most_used(&on),
        "taken_bytes": free.zip(device::free(&on)).map(|(before, now)| before.saturating_sub(now)),
        "seconds": parts.iter().map(|(name, time)| (name.clone(), each(*time).into())).collect::<serde_json::Map<_, _>>(),
        "shares": parts.iter().map(|(name, time)| (name.clone(), share(*time).into())).collect::<serde_json::Map<_, _>>(),
    }))
}
