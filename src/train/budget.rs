//! What a run asks of memory, and the plan that keeps it to its budget.

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::{base::Base, pairs, rows::Rows, samples, steps};
use crate::{
    Error, Result,
    data::TokenizedPair,
    engine::{
        demand::{Demand, DeviceWeights, PairSize, SampleSize},
        plan::{self, Limits, Loads, Plan},
        within_pool,
    },
    heap,
    kernels::{compute::Compute, dequantise::scratch, held::Depths},
    model::{
        block::Block,
        footprint::{HeadWidths, Widths},
        lora::Shape,
    },
    objective::reference_cache::ReferenceCache,
    recipe::{Budget, Optimizer, Recipe},
    report::{MemoryMeter, available::available},
    weights::matrix::FrozenMatrix,
};

/// Pairs that are looked at one step after the other; of a longer run the longest pairs are taken for one step more.
const LOOKED_AT: usize = 1 << 22;

/// Anonymous memory as a run's plan begins, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Held now.
    now: u64,
    /// The most so far.
    most: u64,
}

impl Held {
    /// Gives back what loading left over, and measures. 0 where it cannot be measured.
    pub fn measure(meter: &MemoryMeter) -> Self {
        meter.sample();
        heap::settle();
        Self { now: meter.sample().unwrap_or(0), most: meter.peak().unwrap_or(0) }
    }
}

/// The memory that a plan is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Memory {
    /// The host's, of which this is held.
    Host(Held),
    /// A device's, of which so many bytes are free, where it says so.
    Device {
        /// In bytes.
        free: Option<u64>,
        /// Whether it is a CUDA card.
        card: bool,
        /// Operations a second that it does at most in bf16, where it says so.
        peak: Option<f64>,
    },
}

/// A plan and what it was made from.
#[derive(Debug)]
pub struct Planned {
    /// What was chosen.
    pub plan: Plan,
    /// What it keeps to.
    pub limits: Limits,
    /// Where the budget comes from, in words.
    pub budget: String,
    demand: Demand,
    loads: Loads,
}

impl Planned {
    /// How many layers the model has.
    pub fn layers(&self) -> usize {
        self.demand.layers
    }

    /// Whether it is for a device's memory.
    pub fn on_device(&self) -> bool {
        self.demand.device.is_some()
    }

    /// What to say where a named budget lets more be planned with than there is.
    pub fn beyond_what_is_free(&self) -> Option<String> {
        beyond(self.plan.peak(), self.limits.machine)
    }

    /// Plans for other budgets, from the least that works to the one beyond which nothing gets faster.
    pub fn ladder(&self) -> Vec<Plan> {
        plan::ladder(&self.demand, &self.loads, &self.limits)
    }
}

fn beyond(peak: u64, free: u64) -> Option<String> {
    (peak > free).then(|| {
        format!(
            "{} are planned with, and {} are free: the system may slow down or end the run; lower memory.budget, or leave \
             it to \"auto\"",
            plan::Mib(peak),
            plan::Mib(free)
        )
    })
}

/// Plans a run; nothing of the base but its shapes is looked at.
///
/// # Errors
/// [`Error::Resource`] where the budget is too small, with the least that works.
pub fn plan(recipe: &Recipe, base: &Base, rows: &Rows, shapes: &[Shape], memory: Memory) -> Result<Planned> {
    let demand = demand(recipe, base, rows, shapes, memory)?;
    let loads = loads(recipe, rows);
    let (limits, budget) = match memory {
        Memory::Host(held) => limits(recipe.memory.budget, held, unlimited(base)),
        Memory::Device { free, .. } => device_limits(recipe.memory.budget, free, unlimited(base)),
    };
    let plan = plan::choose(&demand, &loads, &limits)?;
    Ok(Planned { plan, limits, budget, demand, loads })
}

fn demand(recipe: &Recipe, base: &Base, rows: &Rows, shapes: &[Shape], memory: Memory) -> Result<Demand> {
    let dropout = recipe.adapter.lora_dropout > 0.0;
    let widths = base.model.blocks.iter().map(|block| Widths::of(block, shapes, dropout));
    let widths = widths.max_by_key(Widths::backward).ok_or_else(|| Error::input("the model has no layers"))?;
    let heads = base.model.blocks[0].attention.heads;
    let threads = rayon::current_num_threads();
    let (held, device, rate) = match memory {
        Memory::Host(held) => (held, None, plan::RATE * threads as f64),
        Memory::Device { card, peak, .. } => {
            // a step does a quarter of it (H200)
            let rate = peak.map_or(plan::DEVICE_RATE, |peak| peak / 4.0);
            (Held { now: 0, most: 0 }, Some(device_weights(base, card)), rate)
        }
    };
    Ok(Demand {
        start: held.now,
        loading: held.most,
        device,
        widths,
        layers: base.model.blocks.len(),
        head: HeadWidths::of(&base.model.head),
        learning: shapes.iter().map(|shape| shape.r * (shape.inputs + shape.outputs)).sum(),
        moments: match recipe.train.optimizer {
            Optimizer::Adamw => 2,
            Optimizer::Rmsprop => 1,
        },
        held_to: recipe.reference_adapter().is_some(),
        reference: if recipe.memory.reference_cache { ReferenceCache::bytes(rows.met(recipe)) } else { 0 },
        samples: sample_size(recipe, base)?,
        rank: shapes.iter().map(|shape| shape.r).max().unwrap_or(0),
        threads,
        rate,
        compute: base.compute,
        heads,
        depths: Depths::of(&base.model.blocks),
    })
}

fn sample_size(recipe: &Recipe, base: &Base) -> Result<Option<SampleSize>> {
    let prompts = &recipe.samples.prompts;
    let mut longest = 0;
    for (number, prompt) in prompts.iter().enumerate() {
        longest = longest.max(samples::ids(base, number, prompt)?.len());
    }
    let per_prompt = recipe.samples.count.div_ceil(prompts.len().max(1));
    let size = SampleSize { prompt: longest, per_prompt, new: recipe.samples.max_new_tokens };
    Ok((!prompts.is_empty()).then_some(size))
}

fn loads(recipe: &Recipe, rows: &Rows) -> Loads {
    let mut loads = Loads::default();
    let sizes = |pairs: &[&TokenizedPair]| pairs.iter().map(|pair| size(pair)).collect::<Vec<_>>();
    let looked_at = LOOKED_AT.div_ceil(recipe.train.batch_size);
    steps::batches(recipe, &rows.train).take(looked_at).for_each(|batch| loads.step(&sizes(&batch)));
    if steps::total(recipe, rows.train.len()) > looked_at {
        let mut longest: Vec<_> = rows.train.iter().map(size).collect();
        longest.sort_by_key(|pair| std::cmp::Reverse(pair.tokens));
        longest.truncate(recipe.train.batch_size);
        loads.step(&longest);
    }
    let held_out: Vec<_> = rows.eval.iter().collect();
    held_out.chunks(pairs::EVALUATED).for_each(|chunk| loads.evaluation(&sizes(chunk)));
    loads
}

fn size(pair: &TokenizedPair) -> PairSize {
    let answers = [pair.chosen.len(), pair.rejected.len()];
    let prompt = pair.prompt.len();
    // a token sees itself and those before it
    let run = |before: usize, n: usize| before * n + n * (n + 1) / 2;
    PairSize {
        tokens: pairs::tokens(pair),
        rows: answers.iter().sum(),
        seen: run(0, prompt) + answers.iter().map(|answer| run(prompt, *answer)).sum::<usize>(),
    }
}

/// A base's sizes, and nothing that limits a run.
fn unlimited(base: &Base) -> Limits {
    let layer = |block: &Block| block.linears().map(|linear| linear.weight.stored_bytes() as u64).sum::<u64>();
    let layers = || base.model.blocks.iter().map(layer);
    Limits {
        budget: u64::MAX,
        with_base: u64::MAX,
        machine: u64::MAX,
        weights: base.folder.total_bytes(),
        layers: layers().sum(),
        layer: layers().max().unwrap_or(0),
        matrices: base.model.linears().map(|linear| linear.weight.inputs * linear.weight.outputs).sum(),
    }
}

/// The budget and what else limits a run, and where that comes from.
fn limits(budget: Budget, held: Held, base: Limits) -> (Limits, String) {
    let available = available();
    let machine = available.as_ref().map_or(u64::MAX, |available| held.now + available.bytes);
    let at_most = |budget: u64, with_base: u64| Limits { budget, with_base, machine, ..base };
    match (budget, available) {
        (Budget::Bytes(bytes), _) => (at_most(bytes, bytes), format!("{budget}, as the recipe says")),
        (Budget::Auto, None) => (at_most(u64::MAX, u64::MAX), "auto: this system does not say what is free".into()),
        (Budget::Auto, Some(available)) => {
            // a tenth stays for others; a base that takes more than half shares what is left
            let free = machine - machine / 10;
            let bytes = free - base.weights.min(free / 2);
            let mib = |bytes: u64| plan::Mib(bytes);
            let said = format!(
                "auto: {}, of {} that {} has free, less a tenth and room for the base's pages",
                mib(bytes),
                mib(available.bytes),
                available.by
            );
            (at_most(bytes, free), said)
        }
    }
}

/// The budget of a device's memory, and where it comes from.
fn device_limits(budget: Budget, free: Option<u64>, base: Limits) -> (Limits, String) {
    let (bytes, said) = match (budget, free) {
        (Budget::Bytes(bytes), _) => (bytes, format!("{budget} of the device's memory, as the recipe says")),
        (Budget::Auto, None) => (u64::MAX, "auto: this device does not say what is free".into()),
        (Budget::Auto, Some(free)) => {
            let mib = plan::Mib;
            (
                free - free / 10,
                format!("auto: {}, of {} that the device has free, less a tenth", mib(free - free / 10), mib(free)),
            )
        }
    };
    (Limits { budget: bytes, machine: free.unwrap_or(u64::MAX), ..base }, said)
}

fn device_weights(base: &Base, card: bool) -> DeviceWeights {
    let bytes = |weight: &FrozenMatrix| weight.device_bytes(base.compute);
    let layers = base.model.blocks.iter().map(|block| block.linears().map(|linear| bytes(&linear.weight)).sum());
    let layers: Vec<usize> = layers.collect();
    let head = &base.model.head.weight;
    let scratch = |weight: &FrozenMatrix| match card {
        true => weight.device_scratch(base.compute),
        false => scratch(weight.inputs * weight.outputs, base.compute),
    };
    let matrices = base.model.linears().map(|linear| &linear.weight).chain([head]);
    DeviceWeights {
        all: layers.iter().sum::<usize>() + bytes(head),
        layer: layers.iter().copied().max().unwrap_or(0),
        head: bytes(head),
        scratch: matrices.map(scratch).max().unwrap_or(0),
        operand: match (base.compute, card) {
            (Compute::F32, _) => 0,
            (Compute::Bf16, true) => 2,
            // widened again
            (Compute::Bf16, false) => 2 + 4,
        },
        card,
    }
}

/// How long this machine takes for a second of a plan's `cost`: a product with the largest matrix of the base's layers
/// is measured for a moment, and is taken to be its usual share of a step. None where a device would do it: this
/// processor says nothing of that.
///
/// # Errors
/// Where the product fails.
pub fn pace(planned: &Planned, base: &Base) -> candle_core::Result<Option<f64>> {
    const TOKENS: usize = 256;
    if planned.on_device() {
        return Ok(None);
    }
    let numbers = |matrix: &FrozenMatrix| matrix.inputs * matrix.outputs;
    let matrices = base.model.linears().map(|linear| &linear.weight);
    let Some(matrix) = matrices.max_by_key(|matrix| numbers(matrix)) else { return Ok(None) };
    let x = Tensor::ones((TOKENS, matrix.inputs), DType::F32, &base.model.device)?;
    // as a step computes; the fastest round, for others use this machine, too
    let seconds = within_pool(|| -> candle_core::Result<f64> {
        let (mut best, began) = (f64::INFINITY, Instant::now());
        while best.is_infinite() || began.elapsed().as_millis() < 200 {
            let round = Instant::now();
            matrix.apply(&x)?;
            best = best.min(round.elapsed().as_secs_f64());
        }
        Ok(best)
    })?;
    let rate = (2 * TOKENS * numbers(matrix)) as f64 / seconds;
    // docs/performance.md
    let share = if base.compute == Compute::Bf16 { 0.75 } else { 0.85 };
    Ok(Some(planned.demand.rate / (share * rate)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_of_more_than_is_free_is_told() {
        assert_eq!(beyond(500 << 20, 500 << 20), None);
        let told = beyond(600 << 20, 500 << 20).expect("more than there is");
        assert!(told.starts_with("600 MiB are planned with, and 500 MiB are free: "), "{told}");
    }
}
