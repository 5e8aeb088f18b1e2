//! The plan: it keeps to its budget, says what the least is, and changes no result.

#[path = "support/numbers.rs"]
mod numbers;
#[path = "support/tiny.rs"]
mod tiny;

use dpo_lora::{
    Error,
    engine::{
        demand::{Demand, DeviceWeights, PairSize, SampleSize},
        plan::{self, Limits, Loads, Plan},
    },
    kernels::{compute::Compute, held::Depths},
    model::footprint::{HeadWidths, Widths},
};
use numbers::{fixture, fresh, open};
use serde_json::Value;
use tiny::{Tiny, arguments, stderr};

const MIB: u64 = 1 << 20;

/// A run on a model of many layers: pairs of 100 to 900 tokens, 16 a step.
fn demand() -> (Demand, Loads, Limits) {
    let model = open(&fixture("llama"));
    let adapter = fresh(&model, 4);
    let demand = Demand {
        start: 20 * MIB,
        loading: 30 * MIB,
        widths: Widths::of(&model.blocks[0], &adapter.shapes, false),
        layers: 40,
        head: HeadWidths::of(&model.head),
        learning: 1 << 20,
        moments: 2,
        held_to: false,
        reference: 0,
        samples: Some(SampleSize { prompt: 40, per_prompt: 50, new: 60 }),
        threads: 2,
        rate: 2.0 * plan::RATE,
        compute: Compute::F32,
        rank: 4,
        heads: model.blocks[0].attention.heads,
        depths: Depths::of(&model.blocks),
        device: None,
    };
    let mut loads = Loads::default();
    for step in 0..5 {
        let pair = |i: usize| PairSize { tokens: 100 + 50 * i + step, rows: 40 + i, seen: (100 + 50 * i).pow(2) / 2 };
        loads.step(&(0..16).map(pair).collect::<Vec<_>>());
    }
    let limits = Limits {
        budget: 0,
        with_base: u64::MAX,
        machine: u64::MAX,
        weights: 50 * MIB,
        layers: 40 * MIB,
        layer: MIB,
        matrices: 10_000_000,
    };
    (demand, loads, limits)
}

fn at((demand, loads, limits): &(Demand, Loads, Limits), budget: u64) -> Result<Plan, Error> {
    plan::choose(demand, loads, &Limits { budget, ..*limits })
}

#[test]
fn a_plan_keeps_to_its_budget_and_more_memory_is_never_slower() {
    let run = demand();
    let least = plan::least(&run.0, &run.1, &run.2).peak();
    let fastest = at(&run, u64::MAX).unwrap();
    assert_eq!((fastest.schedule.keep, fastest.schedule.micro, fastest.schedule.scratch), (40, 768, false));
    assert!(fastest.peak() > 2 * least, "{} and {least}: there is something to choose", fastest.peak());
    let mut last = f64::INFINITY;
    for budget in (0..=20).map(|i| least + (fastest.peak() - least) * i / 20) {
        let plan = at(&run, budget).unwrap();
        assert!(plan.peak() <= budget && plan.cost <= last, "{budget}: {plan:?}");
        last = plan.cost;
    }
    assert_eq!(last, fastest.cost, "no more is taken than makes it faster");
    let ladder = plan::ladder(&run.0, &run.1, &run.2);
    assert!(ladder.len() > 2 && ladder[0].peak() == least && ladder[ladder.len() - 1].peak() <= fastest.peak());
}

/// A budget that leaves few samples room beside what threads keep of a step draws fewer at once.
#[test]
fn every_budget_from_the_least_on_works() {
    let mut run = demand();
    run.0.depths = Depths { forward: vec![4_096], backward: vec![vec![4_096; 2]] };
    run.0.samples = Some(SampleSize { prompt: 40, per_prompt: 50, new: 900 });
    run.1.step(&[PairSize { tokens: 3_000, rows: 1_000, seen: 4_500_000 }]);
    let least = plan::least(&run.0, &run.1, &run.2).peak();
    let at_once: Vec<_> = (0..24).map(|step| at(&run, least + step * MIB).map(|plan| plan.at_once)).collect();
    assert!(at_once.iter().all(Result::is_ok), "{at_once:?}");
    let most = at(&run, u64::MAX).unwrap().at_once;
    assert!(at_once.into_iter().flatten().any(|at_once| at_once < most));
}

#[test]
fn less_than_the_least_is_refused_with_the_least() {
    let run = demand();
    let least = plan::least(&run.0, &run.1, &run.2).peak();
    let error = at(&run, least - 1).unwrap_err();
    assert_eq!(error.exit_code(), 4);
    let said = error.to_string();
    let enough = least.div_ceil(MIB);
    assert!(said.contains("memory.budget") && said.contains(&format!("at least {enough} MiB")), "{said}");
    assert!(at(&run, enough * MIB).is_ok());
}

#[test]
fn a_base_beyond_the_machine_is_read_twice_a_step_at_most() {
    let (demand, loads, limits) = demand();
    let (weights, layer) = (20_000 * MIB, 499 * MIB);
    let limits = Limits { budget: 500 * MIB, weights, layers: 40 * layer, layer, ..limits };
    let beside = |pages: u64| {
        let all = 500 * MIB + pages;
        plan::choose(&demand, &loads, &Limits { with_base: all, machine: all, ..limits }).unwrap()
    };
    let plan = beside(100 * MIB);
    assert!(plan.schedule.stream && plan.from_disk && plan.schedule.resident == 0);
    // the largest step has 7,664 tokens
    assert!(plan.schedule.sweep >= 7_664 && plan.schedule.micro <= 768, "{:?}", plan.schedule);

    // 40 MiB are in no layer, one layer is at work and one on its way
    let more = beside(40 * MIB + 12 * layer);
    assert!(more.schedule.stream && more.from_disk && more.cost < plan.cost);
    assert_eq!(more.schedule.resident, 10);
    assert!(!beside(weights).schedule.stream);

    // a budget that is named holds for the pages as well
    let named = |budget| Limits { budget, with_base: budget, ..limits };
    let ten = more.peak() + 40 * MIB + 12 * layer;
    assert_eq!([named(ten).budget_of(&more), named(u64::MAX).budget_of(&more)], [ten, more.peak()]);
}

/// Layers that keep take room from the base's pages: beyond that room, more of them would only cost.
#[test]
fn a_larger_budget_is_never_slower_where_the_base_just_fits() {
    let (demand, loads, limits) = demand();
    let (weights, layer, machine) = (2_000 * MIB, 49 * MIB, 2_080 * MIB);
    let limits = Limits { weights, layers: 40 * layer, layer, machine, ..limits };
    let at = |budget| plan::choose(&demand, &loads, &Limits { budget, with_base: machine, ..limits }).unwrap();
    let least = plan::least(&demand, &loads, &limits).peak();
    let mut last = at(least);
    for budget in (0..8).map(|step| least + step * 12 * MIB) {
        let plan = at(budget);
        assert!(plan.cost <= last.cost, "{} MiB: {plan:?} after {last:?}", budget / MIB);
        last = plan;
    }
    let keep =
        plan::choose(&demand, &loads, &Limits { budget: u64::MAX, with_base: u64::MAX, machine: u64::MAX, ..limits });
    assert!(!last.from_disk && (1..keep.unwrap().schedule.keep).contains(&last.schedule.keep), "{last:?}");
}

#[test]
fn weights_of_a_device_stay_where_they_fit_and_stream_where_they_do_not() {
    let (mut demand, loads, limits) = demand();
    (demand.start, demand.loading, demand.samples) = (0, 0, None);
    let [all, layer, head, scratch] = [4_000, 90, 300, 60].map(|mib: usize| mib << 20);
    demand.device = Some(DeviceWeights { all, layer, head, scratch, operand: 2, card: false });
    let run = (demand, loads, Limits { weights: 4_000 * MIB, ..limits });
    let roomy = at(&run, u64::MAX).unwrap();
    assert!(!roomy.schedule.stream && roomy.peak() >= 4_060 * MIB);
    let tight = at(&run, 1_500 * MIB).unwrap();
    assert!(tight.schedule.stream && tight.peak() <= 1_500 * MIB && tight.cost > roomy.cost);
    let held = tight.highest().parts.iter().find(|part| part.what == "weights").unwrap();
    // as many layers stay as there is room for beside the two that are on their way
    let resident = tight.schedule.resident as u64;
    assert_eq!(held.bytes, ((resident + 2) * 90 + 300) * MIB);
    assert!(resident > 0 && tight.peak() > 1_410 * MIB, "{resident} stay, {} MiB", tight.peak() / MIB);
    let on_the_way_back = |plan: &Plan| {
        let backward = plan.phases.iter().find(|phase| phase.name == "backward").unwrap();
        backward.parts.iter().find(|part| part.what == "weights").unwrap().bytes / MIB
    };
    // where room is tightest on the way to scores, the head may as well stay
    assert!(tight.schedule.head_stays && on_the_way_back(&tight) == (resident + 2) * 90 + 300);
    // where it is tightest on the way back, the head goes
    let mut wide = run.clone();
    wide.0.widths.hidden = 65_536;
    wide.0.device = Some(DeviceWeights { all, layer, head: head / 10, scratch, operand: 2, card: false });
    let least = plan::least(&wide.0, &wide.1, &wide.2);
    assert!(!least.schedule.head_stays && least.highest().name == "backward", "{least:?}");
    assert_eq!(on_the_way_back(&least), 2 * 90);
    // two layers and the head are the least
    assert!(at(&run, 400 * MIB).unwrap_err().to_string().contains("weights 480 MiB"));
}

/// Llama 8B in 8 GiB of a device, 8 pairs of 1,390 tokens a step.
fn eight_billion(card: bool) -> (Demand, Loads, Limits) {
    let (mut demand, _, limits) = demand();
    (demand.start, demand.loading, demand.samples) = (0, 0, None);
    (demand.layers, demand.widths.hidden, demand.compute, demand.rate) = (32, 4096, Compute::Bf16, plan::DEVICE_RATE);
    let [all, layer, head, scratch] = [15_320, 416, 1_002, 0].map(|mib: usize| mib << 20);
    demand.device = Some(DeviceWeights { all, layer, head, scratch, operand: 2, card });
    let mut loads = Loads::default();
    (0..5).for_each(|_| loads.step(&[PairSize { tokens: 1_390, rows: 700, seen: 700_000 }; 8]));
    (demand, loads, Limits { weights: all as u64, matrices: 6_980_000_000, ..limits })
}

#[test]
fn a_sweep_s_inputs_wait_on_a_card_s_host_up_to_2_gib_and_else_in_a_file_which_takes_longer() {
    let saved = |plan: &Plan| 4 * (plan.schedule.sweep.max(1_390) * 4_096 * 32) as u64;
    let card = eight_billion(true);
    let plan = at(&card, 6_000 * MIB).unwrap();
    // a whole step in one sweep would read the weights once, but its inputs would have to go through a file
    assert!(plan.schedule.scratch && plan.file_bytes == 0 && saved(&plan) <= 2_048 * MIB, "{plan:?}");
    // so does all that another device or the CPU puts aside
    let other = eight_billion(false);
    let least = plan::least(&other.0, &other.1, &other.2);
    assert!(least.schedule.scratch && least.file_bytes == saved(&least), "{least:?}");
    // so few numbers learn that a step, not a checkpoint, holds the most
    let mut run = demand();
    run.0.learning = 1 << 18;
    let (least, fastest) = (plan::least(&run.0, &run.1, &run.2), at(&run, u64::MAX).unwrap());
    assert!(least.schedule.scratch && least.file_bytes > 0 && fastest.file_bytes == 0, "{least:?}");
}

fn planned(tiny: &Tiny, set: &[&str]) -> Value {
    let sets = set.iter().flat_map(|set| ["--set", set]);
    let arguments: Vec<&str> = ["plan", "recipe.toml", "--json"].into_iter().chain(sets).collect();
    serde_json::from_str(&tiny.ok(&arguments)).unwrap()
}

#[test]
fn a_budget_changes_no_bit_and_the_peak_is_as_predicted() {
    let tiny = Tiny::new();
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/quickstart");
    let (base, rows) = (format!("model.base={quickstart}/base"), format!("data.train=[{quickstart:?}]"));
    let rows = rows.replace("quickstart\"", "quickstart/eval.jsonl\"");
    let set = [&base, &rows, "data.eval_fraction=0.1", "train.batch_size=16", "train.max_steps=6"];
    let set = [&set[..], &["samples.prompts=[\"My mother\"]", "samples.count=4"]].concat();
    let told = planned(&tiny, &set);
    let least = told["other_budgets"][0]["budget"].as_u64().unwrap();
    // two plans of one recipe may differ by what loading left over
    let least = format!("memory.budget={}MiB", least.div_ceil(MIB) + 1);
    let tight = [&set[..], &[least.as_str()]].concat();
    assert_ne!(planned(&tiny, &tight)["plan"]["schedule"], told["plan"]["schedule"]);
    tiny.train("a", &set);
    tiny.train("b", &tight);
    assert_eq!(tiny.adapter("b"), tiny.adapter("a"));
    assert_eq!(tiny.timeless_metrics("b"), tiny.timeless_metrics("a"));
    #[cfg(target_os = "linux")]
    for run in ["a", "b"] {
        let summary: Value = serde_json::from_str(&tiny.read(&format!("runs/{run}/summary.json"))).unwrap();
        let bytes = |name: &str| summary[name].as_u64().unwrap();
        let (peak, predicted) = (bytes("peak_bytes"), bytes("predicted_bytes"));
        assert!(peak <= bytes("budget_bytes"), "{run}: {peak} measured, of {} allowed", bytes("budget_bytes"));
        // a run this small is made of what the plan calls small things
        assert!(peak.abs_diff(predicted) <= predicted / 10 + MIB, "{run}: {peak} measured, {predicted} predicted");
    }
}

/// Where a checkpoint is the most that a run holds, reading it takes no more than writing it.
#[test]
fn what_trained_in_the_least_budget_is_gone_on_with_in_it() {
    let tiny = Tiny::new();
    let set = ["adapter.r=1024", "train.max_steps=2"];
    let told = planned(&tiny, &set);
    let least = format!("memory.budget={}MiB", told["other_budgets"][0]["budget"].as_u64().unwrap().div_ceil(MIB) + 1);
    let set = [&set[..], &[least.as_str()]].concat();
    tiny.train("a", &set);
    let output = tiny.run(&arguments("a", &set, &["--resume"]));
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_budget_that_is_too_small_ends_with_4_before_anything_is_written() {
    let tiny = Tiny::new();
    for command in ["plan", "train"] {
        let output = tiny.run(&[command, "recipe.toml", "--set", "memory.budget=1MiB"]);
        assert_eq!(output.status.code(), Some(4));
        let said = stderr(&output);
        assert!(said.contains("memory.budget is 1.0 MiB, but this run needs at least "), "{said}");
    }
    assert!(!tiny.path("runs").exists());
    let output = tiny.run(&["plan", "recipe.toml", "--memory", "6"]);
    assert_eq!((output.status.code(), stderr(&output).contains("a size like `6GiB`")), (Some(2), true));
}

/// It is the plan's to refuse; that the adapter takes no memory before that is not tested here.
#[test]
fn a_rank_beyond_the_memory_ends_with_4() {
    let tiny = Tiny::new();
    for command in ["plan", "train"] {
        let set = ["--set", "adapter.r=65536", "--set", "memory.budget=100MiB"];
        let output = tiny.run(&[&[command, "recipe.toml"][..], &set].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("memory.budget is 100 MiB, but this run needs at least "), "{said}");
    }
    assert!(!tiny.path("runs").exists());
}

/// The weights are a part of what a device holds; no device is needed to say so.
#[test]
fn a_plan_for_a_device_needs_no_device() {
    let tiny = Tiny::new();
    let text = tiny.ok(&["plan", "recipe.toml", "--device", "cuda:0", "--memory", "1GiB"]);
    for part in ["on the device they count", "1GiB of the device's memory", "weights", "a decoded matrix"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("threads' buffers"), "{text}");
    let output = tiny.run(&["plan", "recipe.toml", "--device", "gpu", "--memory", "1GiB"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn a_person_is_told_where_the_memory_goes() {
    let tiny = Tiny::new();
    let text = tiny.ok(&["plan", "recipe.toml", "--memory", "1GiB"]);
    for part in ["memory.budget   1GiB", "predicted peak", "saved inputs of layers", "With a budget of", "a step"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    // a resumed run plans as well
    assert!(tiny.run(&arguments("a", &["train.max_steps=2"], &[])).status.success());
    assert!(tiny.run(&arguments("a", &["train.max_steps=2"], &["--resume"])).status.success());
}
