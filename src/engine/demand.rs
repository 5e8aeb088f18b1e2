//! What a run holds under a schedule, phase by phase: the sums behind the plan.
//!
//! The parts that a layer and the head hold are in [`crate::model::footprint`], beside the code that holds them; here
//! they are put together as [`super::pass`] goes through a sweep. All sizes are bytes.

use serde::Serialize;

use super::{
    saved::wait_on_host,
    schedule::{Schedule, cut},
};
use crate::{
    kernels::{
        attention::{self, Heads},
        compute::Compute,
        held::{Depths, Products},
    },
    model::footprint::{HeadWidths, Widths},
};

/// Bytes of an f32 number.
const F32: usize = 4;

/// The phase in which the base and the rows are read.
pub(super) const LOADING: &str = "loading";

/// The phase in which samples are drawn.
pub(super) const SAMPLES: &str = "samples";

/// A pair as a schedule sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairSize {
    /// Tokens that its run holds.
    pub tokens: usize,
    /// Answer tokens, which are predicted.
    pub rows: usize,
    /// Keys that its tokens see, all together.
    pub seen: usize,
}

/// The most of everything that a run's pairs come to under one cut into sweeps and micro-batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Tokens of a sweep.
    pub sweep_tokens: usize,
    /// Answer tokens of a sweep.
    pub sweep_rows: usize,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Answer tokens of a micro-batch.
    pub rows: usize,
    /// Sweeps, over the whole run.
    pub sweeps: usize,
    /// Micro-batches, over the whole run.
    pub micros: usize,
}

impl Load {
    /// Takes in the pairs of a step, cut as a schedule would cut them.
    pub fn add(&mut self, pairs: &[PairSize], sweep: usize, micro: usize) {
        let tokens = |pair: &PairSize| pair.tokens;
        for sweep in cut(pairs, sweep, tokens) {
            let sum = |pairs: &[PairSize], of: fn(&PairSize) -> usize| pairs.iter().map(of).sum::<usize>();
            self.sweeps += 1;
            self.sweep_tokens = self.sweep_tokens.max(sum(sweep, tokens));
            self.sweep_rows = self.sweep_rows.max(sum(sweep, |pair| pair.rows));
            for micro in cut(sweep, micro, tokens) {
                self.micros += 1;
                self.tokens = self.tokens.max(sum(micro, tokens));
                self.rows = self.rows.max(sum(micro, |pair| pair.rows));
            }
        }
    }
}

/// The samples of a run's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSize {
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Samples of a prompt.
    pub per_prompt: usize,
    /// Most tokens of a sample.
    pub new: usize,
}

/// A base's matrices on a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceWeights {
    /// All layers and the head.
    pub all: usize,
    /// The largest layer.
    pub layer: usize,
    /// The head.
    pub head: usize,
    /// The largest matrix as a product decodes it.
    pub scratch: usize,
    /// Bytes of a number of a product's rounded operand, with copies that are made of it; 0 where none is.
    pub operand: usize,
    /// Whether it is a CUDA card, whose pool of memory has gaps and whose libraries take some of it.
    pub card: bool,
}

impl DeviceWeights {
    /// There at once: all, or the layers that stay, a layer at work and the next one on its way, and the head, which
    /// may go while it is not on the way to scores.
    fn held(&self, schedule: &Schedule, scoring: bool) -> usize {
        if !schedule.stream {
            return self.all;
        }
        (self.all - self.head).min((schedule.resident + 2) * self.layer)
            + if scoring || schedule.head_stays { self.head } else { 0 }
    }
}

/// All that decides what a run holds, but for its schedule and the load under it.
#[derive(Debug, Clone)]
pub struct Demand {
    /// Held before the first adapter is made: the program, the tokenizer, the rows.
    pub start: u64,
    /// The most that was held until then.
    pub loading: u64,
    /// Of the largest layer.
    pub widths: Widths,
    /// How many layers there are.
    pub layers: usize,
    /// Of the head.
    pub head: HeadWidths,
    /// Numbers that learn.
    pub learning: usize,
    /// Moments that the optimizer keeps of each.
    pub moments: usize,
    /// Whether the reference has an adapter of its own.
    pub held_to: bool,
    /// Bytes of the reference's log-probs that are kept.
    pub reference: usize,
    /// Samples at the end.
    pub samples: Option<SampleSize>,
    /// Threads that compute.
    pub threads: usize,
    /// Operations a second, by which parts of a step are weighed against each other.
    pub rate: f64,
    /// In which type the matrices multiply.
    pub compute: Compute,
    /// Of a layer's attention.
    pub heads: Heads,
    /// Of the products with the layers' matrices.
    pub depths: Depths,
    /// The adapter's largest.
    pub rank: usize,
    /// On a device: its memory is what is planned, and the weights are a part of it.
    pub device: Option<DeviceWeights>,
}

/// The larger of two parts.
fn more(a: (&'static str, usize), b: (&'static str, usize)) -> (&'static str, usize) {
    if a.1 > b.1 { a } else { b }
}

/// Something that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is.
    pub what: &'static str,
    /// How large it is.
    pub bytes: u64,
}

/// A time of the run and what is held then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// What is held at its highest point.
    pub parts: Vec<Part>,
}

impl Phase {
    fn new(name: &'static str, parts: impl IntoIterator<Item = (&'static str, usize)>) -> Self {
        let part = |(what, bytes): (&'static str, usize)| Part { what, bytes: bytes as u64 };
        Self { name, parts: parts.into_iter().filter(|(_, bytes)| *bytes > 0).map(part).collect() }
    }

    /// The sum of its parts.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

impl Demand {
    /// Every phase of a run under `schedule`, whose cut gives these loads, `at_once` samples being drawn together.
    pub fn phases(&self, schedule: &Schedule, training: &Load, evaluation: &Load, at_once: usize) -> Vec<Phase> {
        let mut phases = vec![Phase::new(LOADING, [("program, tokenizer, rows", self.loading as usize)])];
        phases.extend(self.training(schedule, training));
        let trained = self.buffers(training, Some(schedule.head_chunk.min(training.rows)));
        // what threads keep for a step stays when others follow, in which a device's products need nothing
        let stays = if self.device.is_some() { (trained.0, 0) } else { trained };
        phases.extend((evaluation.sweeps > 0).then(|| self.evaluation(schedule, evaluation, stays)));
        phases.push(self.saving(schedule, stays));
        phases.extend(self.samples.map(|samples| self.sampling(samples, at_once, stays)));
        // what loading took is measured, not predicted
        for phase in phases.iter_mut().skip(1) {
            // small blocks, ends of pages, stacks, and what the system's allocator does not give back: half a MiB in
            // runs of a few MiB, up to 2 MiB in runs of 30 to 600 MiB
            let total = phase.total();
            let bytes = total / 64 + (1 << 19) + (total / 16).min(3 << 19);
            phase.parts.push(Part { what: "small things", bytes });
            if self.device.is_some_and(|device| device.card) {
                // fitted to an H200, as what `training` counts of gaps is (docs/memory.md)
                phase.parts.push(Part { what: "CUDA's libraries, gaps", bytes: total / 20 + (192 << 20) });
            }
        }
        phases
    }

    /// Bytes of the largest sweep's saved inputs where they wait in a file; 0 where they do not.
    pub fn in_file(&self, schedule: &Schedule, training: &Load) -> u64 {
        let numbers = training.sweep_tokens * self.widths.hidden * self.layers;
        let card = self.device.is_some_and(|device| device.card);
        if schedule.scratch && !wait_on_host(card, numbers) { (numbers * F32) as u64 } else { 0 }
    }

    /// What is held from the first step to the last. `scoring`: where the head is about to be used.
    fn always(&self, schedule: &Schedule, scoring: bool) -> [(&'static str, usize); 7] {
        let vector = self.learning * F32;
        [
            ("weights", self.device.map_or(0, |weights| weights.held(schedule, scoring))),
            ("a decoded matrix", self.device.map_or(0, |weights| weights.scratch)),
            ("program, tokenizer, rows", self.start as usize),
            ("adapter and its gradients", 2 * vector),
            ("optimizer's moments", self.moments * vector),
            ("the reference's adapter", if self.held_to { 2 * vector } else { 0 }),
            ("the reference's log-probs", if self.device.is_some() { 0 } else { self.reference }),
        ]
    }

    /// Buffers that threads keep for products and for attention. `head_rows`: of the head at once,
    /// where gradients are made.
    fn buffers(&self, load: &Load, head_rows: Option<usize>) -> (&'static str, usize) {
        if let Some(weights) = self.device {
            let head = head_rows.unwrap_or(0) * self.head.vocabulary();
            return ("a product's operand", (load.tokens * self.depths.widest()).max(head) * weights.operand);
        }
        let backward = head_rows.map(|rows| [rows, self.head.vocabulary()]);
        let products = Products { tokens: load.tokens, depths: &self.depths, rank: self.rank, backward };
        let attention = attention::scratch(self.heads.dim, backward.is_some()) * F32;
        ("threads' buffers", products.bytes(self.threads, self.compute) + self.threads * attention)
    }

    /// The three high points of a sweep: the last layer's forward pass, the head, the last layer's backward pass.
    fn training(&self, schedule: &Schedule, load: &Load) -> [Phase; 3] {
        let (widths, hidden) = (&self.widths, self.widths.hidden);
        let keep = schedule.keep.min(self.layers);
        let state = load.sweep_tokens * hidden;
        let micro = load.tokens * hidden;
        let saved = |layers: usize| if schedule.scratch { micro } else { layers * state };
        let kept = widths.kept() * load.sweep_tokens * keep;
        // a layer that keeps holds what it keeps of its own micro-batch as it works
        let own = if keep > 0 { widths.kept() * load.tokens } else { 0 };
        let working = load.tokens * if keep > 0 { widths.forward_keeping() } else { widths.forward() };
        // what waits for the backward pass lies among what is freed, and cuts a card's pool to pieces
        let gaps = |waiting: usize| if self.device.is_some_and(|device| device.card) { waiting / 3 } else { 0 };
        let phase = |name, scoring, saved: usize, states: usize, kept: usize, working: (&'static str, usize)| {
            let parts = [
                ("the sweep's tokens", self.packed(load)),
                ("saved inputs of layers", saved * F32),
                ("states between layers", states * F32),
                ("what kept layers hold", kept * F32),
                ("gaps between those", gaps(saved + kept) * F32),
                (working.0, working.1 * F32),
                // what the first step's backward pass left
                self.buffers(load, Some(schedule.head_chunk.min(load.rows))),
            ];
            Phase::new(name, self.always(schedule, scoring).into_iter().chain(parts))
        };
        let logits = self.head.score(load.rows, schedule.head_chunk, true);
        let gradients = self.head.kept(load.sweep_rows);
        let turn = self.head.backward(load.tokens, load.rows);
        let layer = ("a layer at work", load.tokens * widths.backward());
        let ends = if layer.1 > turn { layer } else { ("the head's gradient", turn) };
        [
            // what a layer at work reads is saved, and its gradients at both ends are its own
            phase("forward", true, saved(self.layers), 2 * state - micro, kept - own, ("a layer at work", working)),
            phase("head", true, saved(self.layers), 2 * state, kept, ("logits and their gradient", logits + gradients)),
            phase("backward", false, saved(self.layers), state - micro, kept - own, ends),
        ]
    }

    fn evaluation(&self, schedule: &Schedule, load: &Load, stays: (&'static str, usize)) -> Phase {
        let hidden = self.widths.hidden;
        let layer = ("a layer at work", load.tokens * self.widths.forward() * F32);
        let head = ("logits", self.head.score(load.rows, schedule.head_chunk, false) * F32);
        let parts = [
            ("the sweep's tokens", self.packed(load)),
            ("states between layers", 2 * load.sweep_tokens * hidden * F32),
            more(layer, head),
            more(self.buffers(load, None), stays),
        ];
        Phase::new("evaluation", self.always(schedule, true).into_iter().chain(parts))
    }

    /// A checkpoint: the adapter's numbers as a vector and as matrices, then a moment. Reading one holds no more: the
    /// adapter's numbers and the moments in place of those that a step has not touched yet.
    fn saving(&self, schedule: &Schedule, stays: (&'static str, usize)) -> Phase {
        let written = ("a checkpoint on its way", 2 * self.learning * F32);
        Phase::new("saving", self.always(schedule, true).into_iter().chain([written, stays]))
    }

    fn sampling(&self, samples: SampleSize, at_once: usize, stays: (&'static str, usize)) -> Phase {
        let (widths, n) = (&self.widths, samples.per_prompt.min(at_once));
        let cache = self.layers * widths.cached() * (samples.prompt + n * samples.new);
        let logits = 2 * n * self.head.vocabulary();
        let reading = samples.prompt * (widths.kept() + widths.hidden);
        let growing = cache + logits.max(reading);
        // all answers to a prompt are scored together
        let tokens = samples.prompt + n * samples.new;
        let schedule = Schedule::default();
        let scoring =
            tokens * (widths.forward() + widths.hidden) + self.head.score(n * samples.new, schedule.head_chunk, false);
        let work = match growing > scoring {
            true => ("samples' keys, values, logits", growing),
            false => ("samples as they are scored", scoring),
        };
        let load = Load { tokens, rows: n * samples.new, ..Load::default() };
        let parts = [(work.0, work.1 * F32), more(self.buffers(&load, None), stays)];
        // samples are drawn with all weights there
        Phase::new(SAMPLES, self.always(&schedule, true).into_iter().chain(parts))
    }

    /// Angles, ids, positions and places of a sweep's tokens.
    fn packed(&self, load: &Load) -> usize {
        load.sweep_tokens * (self.widths.angles() * F32 + 16)
    }
}
