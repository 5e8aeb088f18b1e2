//! The plan: of all schedules whose highest phase fits the budget, the one that should take the least time.
//!
//! Whatever is chosen, results are the same to the bit; a plan decides on memory and time alone.

use std::fmt;

use serde::Serialize;

use super::{
    demand::{Demand, LOADING, Load, PairSize, Phase, SAMPLES},
    schedule::Schedule,
};
use crate::{Error, Result, kernels::compute::Compute};

/// Tokens of a micro-batch that are tried; beyond the first, products gain nothing (measured on SmolLM2). 1: a pair at
/// a time.
const MICRO: [usize; 8] = [768, 512, 384, 256, 192, 128, 64, 1];
/// Micro-batches of a sweep that are tried, besides a whole step. More than one pays where weights come from the disk.
const SWEEP: [usize; 3] = [1, 4, 16];
/// Positions at the head that are tried.
const HEAD: [usize; 4] = [128, 64, 32, 16];
/// Samples drawn at once that are tried.
const AT_ONCE: [usize; 7] = [64, 32, 16, 8, 4, 2, 1];

/// Operations a second and thread, by which parts of a step are weighed against each other: two Zen 4 cores in f32.
pub const RATE: f64 = 6e10;
/// Tokens whose work costs as much as decoding and packing a layer's matrices once for a micro-batch (Zen 4).
const PACKING: f64 = 64.0;
/// The same of a chunk of positions at the head.
const HEAD_PACKING: f64 = 16.0;
/// Operations of matrices that take the time of one of attention, in f32 and in bf16 (Zen 4).
const ATTENTION: [f64; 2] = [1.3, 2.3];
/// Share of a forward pass that computing a layer again takes: all but its last product.
const AGAIN: f64 = 0.75;
/// Bytes a second from a disk.
const DISK: f64 = 1e9;
/// Operations a second of a device in bf16 that does not say how fast it is.
pub const DEVICE_RATE: f64 = 1e14;
/// Bytes a second of weights from a file to a device beside its work, and of layers' inputs to the host's memory and
/// back (H200).
const WEIGHTS_COME: f64 = 1.4e10;
const INPUTS_COME: f64 = 2.5e10;
/// Share of the shorter of two that it adds where a device computes while layers come to it.
const NOT_HIDDEN: f64 = 0.2;

/// The pairs of a run under every cut that is tried.
#[derive(Debug, Clone)]
pub struct Loads {
    cuts: Vec<Cut>,
    steps: usize,
    tokens: usize,
    rows: usize,
    seen: usize,
}

#[derive(Debug, Clone)]
struct Cut {
    sweep: usize,
    micro: usize,
    training: Load,
    evaluation: Load,
}

impl Default for Loads {
    fn default() -> Self {
        let cut =
            |micro: usize, sweep: usize| Cut { sweep, micro, training: Load::default(), evaluation: Load::default() };
        let cuts = MICRO.iter().flat_map(|&micro| {
            let sweeps = SWEEP.iter().map(move |times| micro.saturating_mul(*times)).chain([usize::MAX]);
            sweeps.map(move |sweep| cut(micro, sweep))
        });
        Self { cuts: cuts.collect(), steps: 0, tokens: 0, rows: 0, seen: 0 }
    }
}

impl Loads {
    /// Takes in the pairs of an optimizer step.
    pub fn step(&mut self, pairs: &[PairSize]) {
        self.steps += 1;
        self.tokens += pairs.iter().map(|pair| pair.tokens).sum::<usize>();
        self.rows += pairs.iter().map(|pair| pair.rows).sum::<usize>();
        self.seen += pairs.iter().map(|pair| pair.seen).sum::<usize>();
        self.cuts.iter_mut().for_each(|cut| cut.training.add(pairs, cut.sweep, cut.micro));
    }

    /// Takes in pairs that are evaluated together.
    pub fn evaluation(&mut self, pairs: &[PairSize]) {
        self.cuts.iter_mut().for_each(|cut| cut.evaluation.add(pairs, cut.sweep, cut.micro));
    }

    /// Tokens, answer tokens and keys that tokens see in a step, on average.
    fn of_a_step(&self) -> [f64; 3] {
        [self.tokens, self.rows, self.seen].map(|all| all as f64 / self.steps.max(1) as f64)
    }
}

/// What a plan must keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most anonymous memory.
    pub budget: u64,
    /// The most with the base's pages; where it is more, those of layers are let go of after use, as many as must.
    pub with_base: u64,
    /// What this machine has for this process, pages of files included: a base beyond it is read from the disk anew in
    /// every pass.
    pub machine: u64,
    /// The base's weights.
    pub weights: u64,
    /// Those of all layers.
    pub layers: u64,
    /// A layer's, at most.
    pub layer: u64,
    /// Numbers in a layer's matrices, all layers together.
    pub matrices: usize,
}

impl Limits {
    /// The most for run and base, and no more than there is.
    fn room(&self) -> u64 {
        self.with_base.min(self.machine)
    }

    /// How many layers' pages may stay beside so much anonymous memory and what no layer holds (embedding and head),
    /// where one layer is at work and the next on its way.
    fn stay(&self, peak: u64, layers: usize) -> usize {
        let room = self.room().saturating_sub(peak + self.outside_layers()) / self.layer.max(1);
        room.saturating_sub(2).min(layers as u64) as usize
    }

    fn outside_layers(&self) -> u64 {
        self.weights.saturating_sub(self.layers)
    }

    /// The budget that gives a plan: with the base's pages that stay, where a budget holds for them as well.
    pub fn budget_of(&self, plan: &Plan) -> u64 {
        let pages = match (plan.schedule.stream, plan.schedule.resident as u64) {
            // "auto" leaves room for them besides, or nothing says how much there is
            _ if self.with_base != self.budget || self.with_base == u64::MAX => 0,
            (false, _) => self.weights,
            (true, 0) => 0,
            (true, resident) => self.outside_layers() + (resident + 2) * self.layer,
        };
        plan.peak() + pages
    }
}

/// A schedule, and what it comes to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// What is held where.
    pub schedule: Schedule,
    /// Samples drawn at once.
    pub at_once: usize,
    /// Whether the base is larger than what the machine or the device has for it, so that every sweep reads what does
    /// not stay twice.
    pub from_disk: bool,
    /// Bytes of layers' inputs that wait in a file at once; 0: they wait in memory.
    pub file_bytes: u64,
    /// What is held when.
    pub phases: Vec<Phase>,
    /// A guess at a step's seconds; good for comparing plans alone.
    #[serde(skip)]
    pub cost: f64,
}

impl Plan {
    /// The phase that holds the most.
    pub fn highest(&self) -> &Phase {
        self.phases.iter().max_by_key(|phase| phase.total()).expect("a run loads its rows")
    }

    /// The predicted peak, in bytes.
    pub fn peak(&self) -> u64 {
        self.highest().total()
    }
}

/// The schedule that should take the least time within `limits`.
///
/// # Errors
/// [`Error::Resource`] that names the least budget that works.
pub fn choose(demand: &Demand, loads: &Loads, limits: &Limits) -> Result<Plan> {
    let best = candidates(demand, loads, limits)
        .filter(|plan| plan.peak() <= limits.budget)
        .min_by(|a, b| a.cost.total_cmp(&b.cost).then(a.peak().cmp(&b.peak())));
    best.ok_or_else(|| {
        let least = least(demand, loads, limits);
        let highest = least.highest();
        let lower = match highest.name {
            SAMPLES => "lower samples.max_new_tokens, or leave samples.prompts out",
            LOADING => "read fewer rows (data.limit)",
            _ => "lower data.max_length or adapter.r",
        };
        Error::Resource(format!(
            "memory.budget is {}, but this run needs at least {} ({}: {}); set memory.budget to that or more, or {lower}",
            Mib(limits.budget),
            Mib::up(least.peak()),
            highest.name,
            highest
                .parts
                .iter()
                .map(|part| format!("{} {}", part.what, Mib(part.bytes)))
                .collect::<Vec<_>>()
                .join(", ")
        ))
    })
}

/// The schedule that holds the least.
pub fn least(demand: &Demand, loads: &Loads, limits: &Limits) -> Plan {
    let tight = Limits { budget: 0, ..*limits };
    candidates(demand, loads, &tight).min_by_key(Plan::peak).expect("there are schedules to try")
}

/// Plans for other budgets, from the least that works to the one beyond which nothing gets faster, each clearly faster
/// than the one before.
pub fn ladder(demand: &Demand, loads: &Loads, limits: &Limits) -> Vec<Plan> {
    let lowest = least(demand, loads, limits);
    let at = |budget: u64| {
        // a budget that a person names holds for the base's pages as well
        let with_base = if limits.with_base == limits.budget { budget } else { limits.with_base };
        choose(demand, loads, &Limits { budget, with_base, ..*limits }).ok()
    };
    let Some(fastest) = at(u64::MAX) else { return vec![lowest] };
    const RUNGS: u32 = 6;
    let ratio = fastest.peak() as f64 / lowest.peak() as f64;
    let budget = |rung: u32| (lowest.peak() as f64 * ratio.powf(f64::from(rung) / f64::from(RUNGS))).ceil() as u64;
    let mut plans: Vec<Plan> = Vec::new();
    for plan in (0..RUNGS).filter_map(|rung| at(budget(rung))).chain([fastest]) {
        match plans.last() {
            Some(last) if plan.cost > 0.97 * last.cost => {}
            _ => plans.push(plan),
        }
    }
    plans
}

/// A plan for every cut, head, place of saved inputs and way to share what is left among the layers.
fn candidates<'a>(demand: &'a Demand, loads: &'a Loads, limits: &'a Limits) -> impl Iterator<Item = Plan> + use<'a> {
    loads.cuts.iter().flat_map(move |cut| {
        HEAD.into_iter().flat_map(move |head_chunk| {
            let frame = Frame { demand, loads, limits, cut, head_chunk, scratch: false, at_once: 1 }.with_samples();
            let frames = [false, true].into_iter().map(move |scratch| Frame { scratch, ..frame });
            frames.flat_map(|frame| match demand.device {
                None => vec![frame.on_host()],
                Some(_) => WAYS.iter().map(|(layers, head_stays)| frame.on_device(*layers, *head_stays)).collect(),
            })
        })
    })
}

/// What becomes of a device's layers: all stay, or as many as fit besides what kept layers hold, chosen before or after
/// it.
#[derive(Clone, Copy, PartialEq)]
enum Layers {
    Stay,
    BeforeKept,
    AfterKept,
}

/// The ways that are tried on a device, and whether the head stays.
const WAYS: [(Layers, bool); 5] = [
    (Layers::Stay, false),
    (Layers::BeforeKept, true),
    (Layers::BeforeKept, false),
    (Layers::AfterKept, true),
    (Layers::AfterKept, false),
];

/// What is chosen first; what it leaves is shared among the layers.
#[derive(Clone, Copy)]
struct Frame<'a> {
    demand: &'a Demand,
    loads: &'a Loads,
    limits: &'a Limits,
    cut: &'a Cut,
    head_chunk: usize,
    scratch: bool,
    at_once: usize,
}

impl Frame<'_> {
    /// Draws as many samples at once as fit beside what threads keep of a step, which the cut decides on.
    fn with_samples(self) -> Self {
        let fits = |at_once: &usize| {
            let phases = Self { at_once: *at_once, ..self }.phases(&self.schedule(&Schedule::default()));
            phases.last().is_some_and(|samples| samples.total() <= self.limits.budget)
        };
        Self { at_once: AT_ONCE.into_iter().find(fits).unwrap_or(1), ..self }
    }

    /// Keeps as many layers as fit, or fewer where the pages of others then need not come from the disk. The base's
    /// pages are none of the budget's on a host; they stay where there is room for them besides.
    fn on_host(&self) -> Plan {
        let Self { demand, limits, .. } = self;
        let plan = |keep: usize| {
            let schedule = Schedule { keep, ..Schedule::default() };
            let peak = self.peak(&schedule);
            let with_base = peak.saturating_add(limits.weights);
            let stream = with_base > limits.room();
            let resident = if stream { limits.stay(peak, demand.layers) } else { 0 };
            self.plan(Schedule { stream, resident, ..schedule }, with_base > limits.machine)
        };
        let most = self.most(|keep| Schedule { keep, ..Schedule::default() });
        let fullest = plan(most);
        if !fullest.from_disk {
            return fullest;
        }
        (0..most).rev().map(plan).fold(fullest, |best, plan| if plan.cost < best.cost { plan } else { best })
    }

    /// Keeps as many layers, and has as many stay, as fit.
    fn on_device(&self, layers: Layers, head_stays: bool) -> Plan {
        let stream = layers != Layers::Stay;
        let of = |keep, resident| Schedule { keep, stream, resident, head_stays, ..Schedule::default() };
        let (keep, resident) = match layers {
            Layers::Stay => (self.most(|keep| of(keep, 0)), 0),
            Layers::BeforeKept => {
                let resident = self.most(|resident| of(0, resident));
                (self.most(|keep| of(keep, resident)), resident)
            }
            Layers::AfterKept => {
                let keep = self.most(|keep| of(keep, 0));
                (keep, self.most(|resident| of(keep, resident)))
            }
        };
        self.plan(of(keep, resident), stream)
    }

    /// The most layers, or none, with which a schedule keeps to the budget.
    fn most(&self, of: impl Fn(usize) -> Schedule) -> usize {
        (1..=self.demand.layers).rev().find(|n| self.peak(&of(*n)) <= self.limits.budget).unwrap_or(0)
    }

    fn peak(&self, layers: &Schedule) -> u64 {
        self.phases(&self.schedule(layers)).iter().map(Phase::total).max().unwrap_or(0)
    }

    fn plan(&self, layers: Schedule, from_disk: bool) -> Plan {
        let schedule = self.schedule(&layers);
        let phases = self.phases(&schedule);
        let file_bytes = self.demand.in_file(&schedule, &self.cut.training);
        let plan = Plan { schedule, at_once: self.at_once, from_disk, file_bytes, phases, cost: 0.0 };
        Plan { cost: cost(self.demand, self.loads, self.limits, &plan, &self.cut.training), ..plan }
    }

    fn phases(&self, schedule: &Schedule) -> Vec<Phase> {
        self.demand.phases(schedule, &self.cut.training, &self.cut.evaluation, self.at_once)
    }

    /// Says of these layers; the rest is the frame's.
    fn schedule(&self, layers: &Schedule) -> Schedule {
        let Self { cut, head_chunk, scratch, .. } = *self;
        // what a step has at most is as good a number as any larger one
        let sweep = cut.sweep.min(cut.training.sweep_tokens.max(cut.micro));
        Schedule { sweep, micro: cut.micro, head_chunk, scratch, ..layers.clone() }
    }
}

/// Seconds of a step, as guessed: products, packing for each micro-batch, attention, the head, the disk.
fn cost(demand: &Demand, loads: &Loads, limits: &Limits, plan: &Plan, load: &Load) -> f64 {
    let Schedule { keep, head_chunk, scratch, resident, head_stays, .. } = plan.schedule;
    let [tokens, rows, seen] = loads.of_a_step();
    let steps = loads.steps.max(1) as f64;
    let (micros, sweeps) = (load.micros as f64 / steps, load.sweeps as f64 / steps);
    let again = 1.0 - keep.min(demand.layers) as f64 / demand.layers.max(1) as f64;
    // the reference, forward, backward
    let layers = 2.0 * limits.matrices as f64 * (3.0 + AGAIN * again) * (tokens + PACKING * micros);
    // two products forward, five backward
    let attended = (seen * (demand.heads.n * demand.heads.dim * demand.layers) as f64) * (4.0 * (2.0 + again) + 10.0);
    let hidden = demand.widths.hidden as f64;
    let head = 4.0 * rows * hidden * demand.head.vocabulary() as f64 * (1.0 + HEAD_PACKING / head_chunk as f64);
    let saved = if scratch { 2.0 * tokens * hidden * 4.0 * demand.layers as f64 } else { 0.0 };
    let saved = saved / if plan.file_bytes > 0 { DISK } else { INPUTS_COME };
    let attention = ATTENTION[usize::from(demand.compute == Compute::Bf16)];
    let computing = (layers + head + attention * attended) / demand.rate;
    let go = 1.0 - resident as f64 / demand.layers.max(1) as f64;
    let Some(weights) = demand.device else {
        let come = limits.outside_layers() as f64 + go * limits.layers as f64;
        let read = if plan.from_disk { 2.0 * come / DISK } else { 0.0 };
        return computing + saved + sweeps * read;
    };
    let read = |bytes: f64| if plan.from_disk { sweeps * bytes / WEIGHTS_COME } else { 0.0 };
    let layers_come = read(2.0 * go * (weights.all - weights.head) as f64);
    // its copy begins behind the last layer's, and is waited for
    let head_comes = if head_stays { 0.0 } else { read(weights.head as f64) };
    computing.max(layers_come) + NOT_HIDDEN * computing.min(layers_come) + head_comes + saved
}

/// A size in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Mib(pub u64);

impl Mib {
    /// Rounded up to whole MiB, so that a budget of that size is enough.
    pub fn up(bytes: u64) -> Self {
        Self(bytes.next_multiple_of(1 << 20))
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 as f64 / f64::from(1 << 20) {
            mib @ ..10.0 => write!(out, "{mib:.1} MiB"),
            mib => write!(out, "{mib:.0} MiB"),
        }
    }
}
