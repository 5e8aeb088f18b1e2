//! `plan`: what a run would hold, and what another budget would buy.

use candle_core::Device;
use serde::Serialize;
use std::fmt::Write;

use super::{args::PlanArgs, stdout};
use crate::{
    Result,
    engine::{
        demand::Phase,
        plan::{Mib, Plan},
    },
    recipe::{Budget, Recipe},
    report::{MemoryMeter, Progress},
    train::{
        adapters,
        base::Base,
        budget::{self, Held, Memory, Planned},
        device,
        rows::Rows,
        samples,
    },
};

/// The command's result as one JSON object; sizes in bytes.
#[derive(Serialize)]
struct Told<'a> {
    budget: u64,
    budget_from: &'a str,
    predicted_bytes: u64,
    seconds_a_step: Option<f64>,
    weights_bytes: u64,
    plan: &'a Plan,
    other_budgets: Vec<Rung>,
}

/// Another budget and what it buys.
#[derive(Serialize)]
struct Rung {
    budget: u64,
    seconds_a_step: Option<f64>,
    schedule: String,
}

/// Runs the command.
pub fn run(args: PlanArgs) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.overrides())?;
    let meter = MemoryMeter::start();
    device::use_threads(recipe.run.threads);
    // a plan for an accelerator needs none: only shapes are looked at
    let accelerator = device::is_accelerator(&recipe.run.device);
    let compute = device::compute(recipe.memory.compute, accelerator);
    let (free, peak) = match device::choose(&recipe.run.device, &Progress::stderr()) {
        Ok(device) => (device::free(&device), device::peak(&device)),
        Err(_) if accelerator && recipe.memory.budget != Budget::Auto => (None, None),
        Err(error) => return Err(error),
    };
    let base = Base::open(&recipe.model.base, &recipe.model.revision, &Device::Cpu, compute)?;
    samples::check(&base, &recipe.samples)?;
    let rows = Rows::load(&recipe, &base)?;
    let held = Held::measure(&meter);
    let start = adapters::Start::of(&recipe, &base)?;
    let card = device::is_card(&recipe.run.device);
    let memory = if accelerator { Memory::Device { free, card, peak } } else { Memory::Host(held) };
    let planned = budget::plan(&recipe, &base, &rows, &start.shapes, memory)?;
    let pace = budget::pace(&planned, &base)?;
    match args.json {
        true => stdout::json(&told(&planned, pace)),
        false => stdout::line(text(&base.name, &planned, pace).trim_end()),
    }
}

fn told(planned: &Planned, pace: Option<f64>) -> Told<'_> {
    let plan = &planned.plan;
    let rung = |plan: Plan| Rung {
        budget: Mib::up(planned.limits.budget_of(&plan)).0,
        seconds_a_step: pace.map(|pace| plan.cost * pace),
        schedule: words(&plan, planned.layers()),
    };
    Told {
        budget: planned.limits.budget,
        budget_from: &planned.budget,
        predicted_bytes: plan.peak(),
        seconds_a_step: pace.map(|pace| plan.cost * pace),
        weights_bytes: planned.limits.weights,
        plan,
        other_budgets: planned.ladder().into_iter().map(rung).collect(),
    }
}

fn text(name: &str, planned: &Planned, pace: Option<f64>) -> String {
    let plan = &planned.plan;
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{text}");
    };
    let counted =
        if planned.on_device() { "on the device they count" } else { "which are pages of files and do not count" };
    line(format!("{name}: {} of weights, {counted}\n", Mib(planned.limits.weights)));
    line(format!("memory.budget   {}", planned.budget));
    line(format!("predicted peak  {}, in the {} phase", Mib(plan.peak()), plan.highest().name));
    if let Some(beyond) = planned.beyond_what_is_free() {
        line(format!("warning         {beyond}"));
    }
    line(format!("schedule        {}", words(plan, planned.layers())));
    let time = |cost: f64| pace.map_or("not known".into(), |pace| duration(cost * pace));
    line(format!("time a step     {}", time(plan.cost)));
    line(format!("\n{:<40}{:>10}", format!("Held then ({})", plan.highest().name), "MiB"));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for part in &plan.highest().parts {
        line(format!("  {:<38}{:>10.1}", part.what, mib(part.bytes)));
    }
    line(format!("  {:<38}{:>10.1}", "together", mib(plan.peak())));
    line(format!("\n{:<40}{:>10}", "The most in each phase", "MiB"));
    for phase in &plan.phases {
        line(format!("  {:<38}{:>10.1}", phase.name, mib(Phase::total(phase))));
    }
    line(format!("\n{:<18}{:>14}   {}", "With a budget of", "time a step", "schedule"));
    for rung in planned.ladder() {
        let budget = Mib::up(planned.limits.budget_of(&rung)).to_string();
        line(format!("  {budget:<16}{:>14}   {}", time(rung.cost), words(&rung, planned.layers())));
    }
    line("Less than the first does not work; more than the last makes nothing faster.".to_string());
    out
}

/// A schedule in words.
fn words(plan: &Plan, layers: usize) -> String {
    let schedule = &plan.schedule;
    let tokens = |tokens: usize| match tokens {
        0..=1 => "one pair".to_string(),
        tokens => format!("up to {tokens} tokens"),
    };
    let mut words = format!("{} at once", tokens(schedule.micro));
    if schedule.sweep > schedule.micro {
        words += &format!(", {} a sweep", tokens(schedule.sweep));
    }
    words += &match schedule.keep.min(layers) {
        0 => ", every layer computed again on the way back".to_string(),
        keep if keep == layers => ", no layer computed again".to_string(),
        keep => format!(", {keep} of {layers} layers not computed again"),
    };
    words += &format!(", {} positions at the head", schedule.head_chunk);
    if schedule.scratch {
        words += if plan.file_bytes > 0 { ", layers' inputs in a file" } else { ", layers' inputs on the host" };
    }
    let go = layers - schedule.resident.min(layers);
    words += &match go {
        _ if !schedule.stream => String::new(),
        _ if !plan.from_disk && go == layers => ", the base's pages let go of".to_string(),
        _ if !plan.from_disk => format!(", the pages of {go} of {layers} layers let go of"),
        0 => ", the head read from the disk each time".to_string(),
        _ if go == layers && !schedule.head_stays => ", the base read from the disk layer by layer".to_string(),
        _ => {
            let head = if schedule.head_stays { "" } else { "the head and " };
            format!(", {head}{go} of {layers} layers read from the disk each time")
        }
    };
    words
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..0.95 => format!("{:.0} ms", seconds * 1e3),
        ..100.0 => format!("{seconds:.1} s"),
        _ => format!("{:.1} min", seconds / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::schedule::Schedule;

    fn plan(schedule: Schedule, from_disk: bool) -> Plan {
        Plan { schedule, at_once: 1, from_disk, file_bytes: 0, phases: vec![], cost: 1.0 }
    }

    #[test]
    fn a_schedule_is_told_in_words() {
        let full = Schedule {
            sweep: 768,
            micro: 768,
            keep: 30,
            head_chunk: 128,
            scratch: false,
            stream: false,
            resident: 0,
            head_stays: false,
        };
        assert_eq!(
            words(&plan(full.clone(), false), 30),
            "up to 768 tokens at once, no layer computed again, 128 positions at the head"
        );
        let tight = Schedule {
            sweep: 900,
            micro: 1,
            keep: 0,
            head_chunk: 16,
            scratch: true,
            stream: true,
            resident: 0,
            head_stays: false,
        };
        assert_eq!(
            words(&Plan { file_bytes: 1, ..plan(tight, true) }, 30),
            "one pair at once, up to 900 tokens a sweep, every layer computed again on the way back, 16 positions at the \
             head, layers' inputs in a file, the base read from the disk layer by layer"
        );
        assert!(
            words(&plan(Schedule { keep: 3, ..full.clone() }, false), 30)
                .contains(", 3 of 30 layers not computed again")
        );
        assert!(words(&plan(Schedule { scratch: true, ..full }, false), 30).ends_with(", layers' inputs on the host"));
    }
}
