//! A run from its recipe to its last step. `Run::train` reads in the order it happens.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{
    adapters,
    base::Base,
    checkpoint::{self, MadeOf, State},
    folder,
    lock::Lock,
    open::StartAt,
    pairs::{self, StepDropout},
    reference::Reference,
    rows::Rows,
    signals::Signals,
    skip::named,
    steps::{self, batch},
    watch::Watch,
};
use crate::{
    Error, Result,
    engine::{pass::Engine, plan::Plan, within_pool},
    export::{AdapterConfig, Training},
    heap,
    model::{linear::Through, lora::Adapter},
    objective::{
        Means, Metrics,
        rows::{EvalRow, TrainRow},
    },
    optim::{Gradient, Optimizer, rate},
    random::Stream,
    recipe::Recipe,
    report::{Figures, MemoryMeter, MetricsFile, Phase, Progress, Summary, metrics_file, summary::HeldOut},
    sha256::hex,
};

/// Everything that a run holds.
pub(super) struct Run<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) base: Base,
    pub(super) rows: Rows,
    pub(super) config: AdapterConfig,
    pub(super) adapter: Adapter,
    pub(super) progress: Progress,
    pub(super) signals: Signals,
    /// Of the memory that the plan is for.
    pub(super) memory: MemoryMeter,
    /// Of the host's memory, where that is another.
    pub(super) host: Option<MemoryMeter>,
    pub(super) plan: Plan,
    /// Bytes that the plan keeps to.
    pub(super) budget: u64,
    pub(super) reference: Reference,
    pub(super) optimizer: Optimizer,
    pub(super) metrics: MetricsFile,
    pub(super) made_of: MadeOf,
    pub(super) num_tokens: u64,
    /// Steps in a row that were left out, up to now.
    pub(super) skipped: u64,
    pub(super) watch: Watch,
    /// Held for as long as the run is.
    pub(super) _lock: Lock,
}

/// What this process did, for the closing summary.
#[derive(Debug, Default)]
pub(super) struct Count {
    pub(super) steps: u64,
    pub(super) pairs: u64,
    pub(super) tokens: u64,
    pub(super) time: Duration,
    /// Whether it began where the run begins.
    pub(super) from_start: bool,
}

/// Trains as the recipe says; leaves the run's folder complete. With `extend`, a run that is gone on with may be longer
/// than it was.
///
/// # Errors
/// [`Error::Stopped`] after a signal, once the last whole step is saved; else whatever went wrong.
pub fn train(recipe: &Recipe, from: &StartAt, extend: bool) -> Result<Summary> {
    let started = Instant::now();
    let (mut run, first) = Run::open(recipe, from, extend)?;
    let outcome = run.train(first);
    run.reference.flush()?;
    let (before, after, count) = outcome?;
    let summary = run.leave(before, after, &count, started)?;
    match run.signals.stop_requested() {
        None => Ok(summary),
        Some(signal) => {
            run.progress.note("stopped as the run ended: all of it is written");
            Err(Error::Stopped(signal))
        }
    }
}

impl Run<'_> {
    /// Steps `first` to the last, with the evaluations and checkpoints between them; returns the held-out averages
    /// before and after.
    fn train(&mut self, first: usize) -> Result<(Option<HeldOut>, Option<HeldOut>, Count)> {
        let total = self.total_steps();
        self.announce(total);
        let mut count = Count { from_start: first == 0, ..Count::default() };
        // a run that was stopped while it evaluated makes up for it
        if (first == 0 || self.evaluates_after(first)) && self.evaluated(first)?.is_none() {
            self.evaluate_or_leave(first)?;
        }
        let mut stage = self.progress.start(Phase::Training, first as u64, total as u64);
        for step in first..total {
            let done = step + 1;
            match self.step(step, total) {
                Ok(row) => {
                    self.skipped = 0;
                    count.add(&row);
                    stage.update(row.step, figures(&row.means, &count));
                }
                Err(error @ Error::NotFinite { .. }) => self.skip(step, error)?,
                Err(error) => return Err(error),
            }
            if self.evaluates_after(done) {
                self.evaluate_or_leave(done)?;
            }
            if done == total || due(done, self.recipe.train.save_every) {
                self.save(done)?;
            }
            if let Some(signal) = self.signals.stop_requested() {
                return Err(self.save_before_leaving(done, Error::Stopped(signal)));
            }
        }
        stage.finish();
        Ok((self.evaluated(0)?, self.evaluated(total)?, count))
    }

    /// One optimizer step: gradient, clip, rate, update, log.
    fn step(&mut self, step: usize, total: usize) -> Result<TrainRow> {
        let began = Instant::now();
        let (means, tokens) = match self.gradient(step) {
            Err(error @ Error::NotFinite { .. }) => return Err(error),
            // nothing of this step is in the adapter yet
            Err(error) => return Err(self.save_before_leaving(step, error)),
            Ok(found) => found,
        };
        let gradient = Gradient::clipped(&self.adapter.grads, self.recipe.train.max_grad_norm)?;
        if !gradient.norm.is_finite() {
            return Err(self.not_finite(step, "the gradient is not finite"));
        }
        self.check_start(step, &means)?;

        let train = &self.recipe.train;
        let learning_rate = rate(step, total, train.warmup_steps, train.learning_rate, train.lr_schedule);
        if !self.optimizer.step(&self.adapter.values, gradient, learning_rate)? {
            return Err(self.not_finite(step, "the update would not be finite"));
        }
        self.memory.sample();

        self.num_tokens += means.num_tokens;
        let row = TrainRow {
            step: step as u64 + 1,
            epoch: self.epoch(step + 1),
            means,
            grad_norm: gradient.norm,
            learning_rate,
            num_tokens: self.num_tokens,
            tokens,
            seconds: began.elapsed().as_secs_f64(),
            peak_bytes: self.memory.peak(),
        };
        self.metrics.append(&row.to_json())?;
        Ok(row)
    }

    /// The gradient of a step's pairs, in the adapter; their averages, and how many tokens they are.
    fn gradient(&mut self, step: usize) -> Result<(Means, u64)> {
        let (recipe, base, adapter) = (self.recipe, &self.base, &self.adapter);
        let batch = batch(recipe, &self.rows.train, step);
        let mut metrics = Metrics::new(recipe.objective.beta);
        let p = recipe.adapter.lora_dropout;
        let dropout =
            (p > 0.0).then(|| StepDropout { p, stream: Stream::new(recipe.train.seed, "dropout").at(step as u64) });
        let (signals, schedule, reference) = (&self.signals, &self.plan.schedule, &mut self.reference);
        within_pool(|| {
            let poll = || signals.stopped();
            let engine = Engine { model: &base.model, schedule, scratch: &recipe.run.output, poll: &poll };
            pairs::gradient(engine, &batch, reference, &recipe.objective, (adapter, dropout), &mut metrics)
        })?;
        let means = metrics.mean().ok_or_else(|| Error::run("a step without pairs"))?;
        Ok((means, batch.iter().map(|pair| pairs::tokens(pair) as u64).sum()))
    }

    fn not_finite(&self, step: usize, what: &str) -> Error {
        Error::NotFinite {
            why: format!("{what}; lower train.learning_rate or objective.beta, or look at the rows"),
            rows: batch(self.recipe, &self.rows.train, step).iter().map(|pair| pair.origin).collect(),
            outside: false,
        }
    }

    /// At the first step policy and reference are one model, so a margin that is not 0 is an error of ours. Not on a
    /// device: its products may differ in their last bits from those of another batch, whose log-probs the cache may
    /// hold.
    fn check_start(&self, step: usize, means: &Means) -> Result<()> {
        let same = self.recipe.reference_adapter() == self.recipe.adapter.start_from.as_deref();
        if step > 0 || !same || self.host.is_some() || self.recipe.adapter.lora_dropout > 0.0 || means.margin == 0.0 {
            return Ok(());
        }
        Err(Error::run(format!("step 1: the margin is {} where it must be 0; please report this", means.margin)))
    }

    fn evaluate_or_leave(&mut self, done: usize) -> Result<()> {
        match self.evaluate(done) {
            // what was learned is no more worth keeping: a checkpoint of it would push out a sound one
            Err(error @ Error::NotFinite { .. }) => Err(named(error, &self.rows)),
            outcome => outcome.map_err(|error| self.save_before_leaving(done, error)),
        }
    }

    /// Logs averages over the held-out pairs, if there are any, after `done` steps.
    fn evaluate(&mut self, done: usize) -> Result<()> {
        if self.rows.eval.is_empty() {
            return Ok(());
        }
        self.look_at_base()?;
        let began = Instant::now();
        let poll = || self.signals.stopped();
        let (recipe, policy) = (self.recipe, Through::of(Some(&self.adapter)));
        let (model, schedule) = (&self.base.model, &self.plan.schedule);
        let engine = Engine { model, schedule, scratch: &recipe.run.output, poll: &poll };
        let (pairs, reference) = (&self.rows.eval, &mut self.reference);
        let means = pairs::evaluate(engine, pairs, reference, &recipe.objective, policy, &self.progress)?;
        let Some(means) = means else { return Ok(()) };
        let (step, epoch, seconds) = (done as u64, self.epoch(done), began.elapsed().as_secs_f64());
        let row = EvalRow { step, epoch, means, num_tokens: self.num_tokens, seconds };
        self.metrics.append(&row.to_json())
    }

    fn evaluates_after(&self, done: usize) -> bool {
        !self.rows.eval.is_empty() && (done == self.total_steps() || due(done, self.recipe.train.eval_every))
    }

    /// The held-out averages that were logged after `done` steps.
    fn evaluated(&self, done: usize) -> Result<Option<HeldOut>> {
        let path = self.recipe.run.output.join(folder::METRICS);
        let mut rows = metrics_file::rows(&path)?;
        let this = |row: &Result<Value>| match row {
            Ok(row) => row["step"] == done && row.get("eval_loss").is_some(),
            Err(_) => true,
        };
        let Some(row) = rows.find(this).transpose()? else { return Ok(None) };
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        Ok(Some(HeldOut {
            pairs: number("eval_pairs") as usize,
            loss: number("eval_loss"),
            accuracy: number("eval_rewards/accuracies"),
            margin: number("eval_rewards/margins"),
        }))
    }

    pub(super) fn save(&mut self, done: usize) -> Result<()> {
        // free blocks of a step's sizes are of no use to a checkpoint, which would take its memory beside them
        heap::settle();
        self.look_at_base()?;
        self.reference.flush()?;
        self.metrics.sync()?;
        let per_epoch = self.steps_per_epoch();
        let state = State {
            step: done as u64,
            epoch: (done / per_epoch) as u64,
            row: (done % per_epoch * self.recipe.train.batch_size) as u64,
            num_tokens: self.num_tokens,
            skipped: self.skipped,
            metrics_bytes: self.metrics.bytes(),
            made_of: self.made_of.clone(),
        };
        let output = &self.recipe.run.output;
        let training = Training { recipe: self.recipe, steps: Some(done as u64) };
        checkpoint::save(output, &state, |folder| {
            adapters::to_folder(&self.config, &self.adapter)?.write(folder, Some(training))?;
            self.optimizer.save(&folder.join(checkpoint::OPTIMIZER))
        })?;
        checkpoint::prune(output, self.recipe.train.keep_checkpoints.max(1))
    }

    /// Refuses to go on where the base is no more what the run began with; says so where its files are elsewhere.
    fn look_at_base(&mut self) -> Result<()> {
        let (folder, then, progress) = (&self.base.folder, &self.made_of.base, &self.progress);
        let same_bytes = || folder.fingerprint().is_ok_and(|now| hex(&now) == *then);
        self.watch.check(same_bytes, |text| progress.note(text))
    }

    /// Saves what `done` whole steps learned before `error` ends the run; says how to go on.
    fn save_before_leaving(&mut self, done: usize, error: Error) -> Error {
        if done == 0 {
            return error;
        }
        match self.save(done) {
            Ok(()) => {
                self.progress
                    .note(&format!("stopped after step {done}, saved; go on with the same command and --resume"));
                error
            }
            Err(failed) if matches!(error, Error::Stopped(_)) => failed,
            // most often for the same reason, which is said at the end
            Err(_) => {
                self.progress.note(&format!("step {done} could not be saved"));
                error
            }
        }
    }

    fn steps_per_epoch(&self) -> usize {
        steps::per_epoch(self.recipe, self.rows.train.len())
    }

    pub(super) fn total_steps(&self) -> usize {
        steps::total(self.recipe, self.rows.train.len())
    }

    pub(super) fn epoch(&self, done: usize) -> f64 {
        done as f64 / self.steps_per_epoch() as f64
    }

    fn announce(&self, total: usize) {
        let (recipe, learning) = (self.recipe, self.adapter.values.elem_count());
        let reference = match recipe.reference_adapter() {
            Some(adapter) => format!("the base with {}", adapter.display()),
            None => "the bare base".to_string(),
        };
        self.progress.note(&format!(
            "{}: {} pairs to train on, {} held out, {total} steps of {}; {learning} numbers learn in {} layers; the \
             reference is {reference}",
            self.base.name,
            self.rows.train.len(),
            self.rows.eval.len(),
            recipe.train.batch_size,
            self.adapter.shapes.len(),
        ));
        let warmup = recipe.train.warmup_steps;
        if warmup > 0 && warmup >= total {
            self.progress.note(&format!(
                "warning: train.warmup_steps is {warmup}, and the run has {total} steps: the learning rate never reaches \
                 its peak; lower it, or name more steps"
            ));
        }
    }
}

impl Count {
    fn add(&mut self, row: &TrainRow) {
        self.steps += 1;
        self.pairs += row.means.pairs as u64;
        self.tokens += row.tokens;
        self.time += Duration::from_secs_f64(row.seconds);
    }
}

fn figures(means: &Means, count: &Count) -> Figures {
    Figures {
        loss: Some(means.loss),
        accuracy: Some(means.accuracy),
        margin: Some(means.margin),
        pairs: Some(count.pairs),
    }
}

/// Whether something that happens every so many steps happens after `done` of them; 0: never.
fn due(done: usize, every: usize) -> bool {
    every > 0 && done > 0 && done.is_multiple_of(every)
}
