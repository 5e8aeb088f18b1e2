//! A run from its recipe to its last step. `Run::train` reads in the order it happens.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    adapters,
    base::Base,
    budget::{self, EVALUATED, Held, Memory},
    checkpoint::{self, MadeOf, State},
    device::{self, Compute},
    folder, identity,
    lock::Lock,
    pairs::{self, StepDropout},
    reference::Reference,
    rows::Rows,
    samples,
    signals::Signals,
    skip::named,
    steps::{self, batch},
    watch::Watch,
};
use crate::{
    Error, Result,
    data::TokenizedPair,
    engine::{
        pass::Engine,
        plan::{Mib, Plan},
    },
    export::{AdapterConfig, AdapterFolder},
    heap,
    model::{linear::Through, lora::Adapter},
    objective::{
        Means, Metrics,
        reference_cache::RECORD,
        rows::{EvalRow, TrainRow},
    },
    optim::{Gradient, Optimizer, rate},
    random::Stream,
    recipe::{self, Recipe},
    report::{Figures, MemoryMeter, MetricsFile, Phase, Progress, Summary, metrics_file, summary::HeldOut},
    store,
};

/// Where a run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// At the start.
    Start,
    /// At the newest whole checkpoint of its folder.
    Latest,
    /// At this checkpoint.
    Checkpoint(PathBuf),
}

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
    reference: Reference,
    optimizer: Optimizer,
    pub(super) metrics: MetricsFile,
    made_of: MadeOf,
    pub(super) num_tokens: u64,
    /// Steps in a row that were left out, up to now.
    pub(super) skipped: u64,
    watch: Watch,
    /// Held for as long as the run is.
    _lock: Lock,
}

/// What this process did, for the closing summary.
#[derive(Debug, Default)]
pub(super) struct Count {
    pub(super) steps: u64,
    pub(super) pairs: u64,
    pub(super) tokens: u64,
    pub(super) time: Duration,
}

/// Trains as the recipe says; leaves the run's folder complete. With `extend`, a run that is gone on with may be longer
/// than it was.
///
/// # Errors
/// [`Error::Stopped`] after a signal, once the last whole step is saved; else whatever went wrong.
pub fn train(recipe: &Recipe, from: &From, extend: bool) -> Result<Summary> {
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

impl<'a> Run<'a> {
    fn open(recipe: &'a Recipe, from: &From, extend: bool) -> Result<(Self, usize)> {
        // until the folder is touched Ctrl-C ends the process at once: nothing is there to save
        let signals = Signals::install()?;
        let progress = Progress::stderr();
        device::use_threads(recipe.run.threads)?;
        let device = device::choose(&recipe.run.device)?;
        let compute = device::compute(recipe.memory.compute, !device.is_cpu());
        let (memory, free) = device::meter(&device);
        let host = (!device.is_cpu()).then(MemoryMeter::start);
        if recipe.memory.compute == recipe::Compute::Bf16 && compute == Compute::F32 {
            progress.note("memory.compute is bf16, but this CPU does not multiply it (AVX512-BF16): f32 is used");
        }
        let base = Base::open(&recipe.model.base, &recipe.model.revision, &device, compute)?;
        let watch = Watch::start(base.folder.files())?;
        samples::check(&base, &recipe.samples)?;
        let rows = Rows::load(recipe, &base)?;
        progress.note(&format!("train rows: {}", rows.reports.0.summary()));
        if let Some(report) = &rows.reports.1 {
            progress.note(&format!("eval rows: {}", report.summary()));
        }
        let fingerprint = base.folder.fingerprint()?;
        let held = match device.is_cpu() {
            true => Memory::Host(Held::measure(&memory)),
            false => Memory::Device { free, card: device.is_cuda(), peak: device::peak(&device) },
        };
        let start = adapters::Start::of(recipe, &base)?;
        let planned = budget::plan(recipe, &base, &rows, &start.shapes, *from != From::Start, held)?;
        progress.note(&format!("memory.budget {}; predicted peak {}", planned.budget, Mib(planned.plan.peak())));
        let (config, adapter) = start.make(recipe, &base)?;
        let made_of = identity::made_of(recipe, &base, &fingerprint, &rows, &adapter.values.to_vec1()?)?;
        let mut optimizer = Optimizer::new(&recipe.train, &adapter.values)?;
        let held_to = match (recipe.objective.reference, &recipe.adapter.start_from) {
            (recipe::Reference::Start, Some(_)) => Some(adapters::Start::of(recipe, &base)?.make(recipe, &base)?.1),
            _ => None,
        };

        watch.check()?;
        signals.hold();
        let output = &recipe.run.output;
        let (lock, metrics, at) = match from {
            From::Start => {
                let (lock, aside) = folder::begin(output)?;
                if let Some(aside) = aside {
                    progress.note(&format!("{} holds an earlier run; it is {} now", output.display(), aside.display()));
                }
                write_recipe(recipe)?;
                (lock, MetricsFile::create(&output.join(folder::METRICS))?, None)
            }
            From::Latest | From::Checkpoint(_) => {
                let lock = folder::go_on(output)?;
                let path = checkpoint_of(output, from, &progress)?;
                let state = checkpoint::open(&path)?;
                state.check(&made_of, extend, &path)?;
                let saved = adapters::from_folder(&AdapterFolder::read(&path)?, &base)?;
                if saved.shapes != adapter.shapes {
                    return Err(Error::input(format!(
                        "{}: its adapter has other matrices than this run",
                        path.display()
                    )));
                }
                adapter.values.slice_set(&saved.values, 0, 0)?;
                optimizer.load(&path.join(checkpoint::OPTIMIZER))?;
                progress.note(&format!("going on from {} after step {}", path.display(), state.step));
                (lock, MetricsFile::open(&output.join(folder::METRICS), state.metrics_bytes)?, Some(state))
            }
        };
        let (first, num_tokens, skipped) = at.map_or((0, 0, 0), |at| (at.step as usize, at.num_tokens, at.skipped));
        let mut run = Self {
            recipe,
            base,
            rows,
            config,
            adapter,
            plan: planned.plan,
            reference: Reference::new(held_to),
            optimizer,
            metrics,
            made_of,
            num_tokens,
            skipped,
            watch,
            _lock: lock,
            progress,
            signals,
            memory,
            host,
        };
        let total = run.total_steps();
        if first > total {
            return Err(Error::recipe(format!(
                "{}: its checkpoint is after step {first}, and the recipe has {total} steps; name more steps, or go on \
                 from an earlier checkpoint",
                output.display()
            )));
        }
        store::space::require(output, run.bytes_to_write(first, total)?, "the run")?;
        // what may be refused has been, before the first file changes
        if *from != From::Start {
            run.rewind(first)?;
        }
        if recipe.memory.reference_cache {
            let cache = run.recipe.run.output.join(folder::REFERENCE);
            run.reference = run.reference.cached(&cache, &fingerprint, device::kind(&device), compute)?;
        }
        Ok((run, first))
    }

    /// Takes the run's folder back to the checkpoint of that step.
    fn rewind(&mut self, step: usize) -> Result<()> {
        let output = &self.recipe.run.output;
        // first the checkpoints that count on rows of the metrics, then these rows
        checkpoint::rewind(output, step as u64)?;
        // a process that died between saving and removing left one too many
        checkpoint::prune(output, self.recipe.train.keep_checkpoints.max(1))?;
        self.metrics.rewind()?;
        write_recipe(self.recipe)
    }

    /// At most so many bytes come to stand in the run's folder besides what is there, among them for a while the layers'
    /// inputs that wait in a file.
    fn bytes_to_write(&self, first: usize, total: usize) -> Result<u64> {
        let recipe = &self.recipe.train;
        let moments: usize = self.optimizer.state().1.iter().map(|(_, moment)| moment.elem_count()).sum();
        let learning = self.adapter.values.elem_count();
        let checkpoint = 4 * (learning + moments) as u64 + folder::SMALL_FILES;
        let saves = (total - first).checked_div(recipe.save_every).unwrap_or(0) + 1;
        // a new one is whole before an old one goes
        let kept = recipe.keep_checkpoints.max(1).min(checkpoint::count(&self.recipe.run.output)? + saves);
        let new = (kept + 1).saturating_sub(checkpoint::count(&self.recipe.run.output)?).max(1) as u64;
        let evaluations = (total - first).checked_div(recipe.eval_every).unwrap_or(0) + 2;
        let rows = (total - first + evaluations) as u64 * folder::METRICS_ROW;
        let adapter = 4 * learning as u64 + folder::SMALL_FILES;
        let cache = match self.recipe.memory.reference_cache {
            true => (self.rows.train.len() + self.rows.eval.len()) as u64 * RECORD as u64,
            false => 0,
        };
        Ok(new.saturating_mul(checkpoint).saturating_add(adapter + rows + cache + self.plan.file_bytes))
    }

    /// Steps `first` to the last, with the evaluations and checkpoints between them; returns the held-out averages
    /// before and after.
    fn train(&mut self, first: usize) -> Result<(Option<HeldOut>, Option<HeldOut>, Count)> {
        let total = self.total_steps();
        self.announce(total);
        let mut count = Count::default();
        // a run that was stopped while it evaluated makes up for it
        if (first == 0 || self.evaluates_after(first)) && self.evaluated(first)?.is_none() {
            self.evaluate(first).map_err(|error| self.save_when_stopped(first, error))?;
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
                Err(error) => return Err(self.save_when_stopped(step, error)),
            }
            if self.evaluates_after(done) {
                self.evaluate(done).map_err(|error| self.save_when_stopped(done, error))?;
            }
            if done == total || due(done, self.recipe.train.save_every) {
                self.save(done)?;
            }
            if let Some(signal) = self.signals.stop_requested() {
                return Err(self.save_when_stopped(done, Error::Stopped(signal)));
            }
        }
        stage.finish();
        Ok((self.evaluated(0)?, self.evaluated(total)?, count))
    }

    /// One optimizer step: gradient, clip, rate, update, log.
    fn step(&mut self, step: usize, total: usize) -> Result<TrainRow> {
        let began = Instant::now();
        let (recipe, base, adapter) = (self.recipe, &self.base, &self.adapter);
        let batch = batch(recipe, &self.rows.train, step);
        let mut metrics = Metrics::new(recipe.objective.beta);
        let p = recipe.adapter.lora_dropout;
        let dropout =
            (p > 0.0).then(|| StepDropout { p, stream: Stream::new(recipe.train.seed, "dropout").at(step as u64) });
        let (signals, schedule, reference) = (&self.signals, &self.plan.schedule, &mut self.reference);
        // within the pool: a caller outside of it would fall asleep and be woken for every loop
        rayon::scope(|_| {
            let poll = || signals.stopped();
            let engine = Engine { model: &base.model, schedule, scratch: &recipe.run.output, poll: &poll };
            pairs::gradient(engine, &batch, reference, &recipe.objective, (adapter, dropout), &mut metrics)
        })?;
        let gradient = Gradient::clipped(&adapter.grads, recipe.train.max_grad_norm)?;
        let not_finite = |what: &str| Error::NotFinite {
            why: format!("{what}; lower train.learning_rate or objective.beta, or look at the rows"),
            rows: batch.iter().map(|pair| pair.origin).collect(),
            outside: false,
        };
        if !gradient.norm.is_finite() {
            return Err(not_finite("the gradient is not finite"));
        }
        let means = metrics.mean().ok_or_else(|| Error::run("a step without pairs"))?;
        self.check_start(step, &means)?;

        let train = &self.recipe.train;
        let learning_rate = rate(step, total, train.warmup_steps, train.learning_rate, train.lr_schedule);
        if !self.optimizer.step(&self.adapter.values, gradient, learning_rate)? {
            return Err(not_finite("the update would not be finite"));
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
            tokens: batch.iter().map(|pair| pairs::tokens(pair) as u64).sum(),
            seconds: began.elapsed().as_secs_f64(),
            peak_bytes: self.memory.peak(),
        };
        self.metrics.append(&row.to_json())?;
        Ok(row)
    }

    /// At the first step policy and reference are one model, so a margin that is not 0 is an error of ours.
    fn check_start(&self, step: usize, means: &Means) -> Result<()> {
        let same =
            self.recipe.objective.reference == recipe::Reference::Start || self.recipe.adapter.start_from.is_none();
        if step > 0 || !same || self.recipe.adapter.lora_dropout > 0.0 || means.margin == 0.0 {
            return Ok(());
        }
        Err(Error::run(format!("step 1: the margin is {} where it must be 0; please report this", means.margin)))
    }

    /// Logs averages over the held-out pairs, if there are any, after `done` steps.
    fn evaluate(&mut self, done: usize) -> Result<()> {
        if self.rows.eval.is_empty() {
            return Ok(());
        }
        self.watch.check()?;
        let began = Instant::now();
        let pairs: Vec<&TokenizedPair> = self.rows.eval.iter().collect();
        let poll = || self.signals.stopped();
        let mut stage = self.progress.start(Phase::Evaluation, 0, pairs.len() as u64);
        let mut metrics = Metrics::new(self.recipe.objective.beta);
        let through = Through::of(Some(&self.adapter));
        let (model, scratch) = (&self.base.model, self.recipe.run.output.as_path());
        let engine = Engine { model, schedule: &self.plan.schedule, scratch, poll: &poll };
        for (chunk, at) in pairs.chunks(EVALUATED).zip((EVALUATED..).step_by(EVALUATED)) {
            pairs::evaluate(engine, chunk, &mut self.reference, &self.recipe.objective, through, &mut metrics)
                .map_err(|error| named(error, &self.rows))?;
            stage.update(at.min(pairs.len()) as u64, Figures::default());
        }
        stage.finish();
        let Some(means) = metrics.mean() else { return Ok(()) };
        let (step, epoch, seconds) = (done as u64, self.epoch(done), began.elapsed().as_secs_f64());
        let row = EvalRow { step, epoch, means, num_tokens: self.num_tokens, seconds };
        self.metrics.append(&row.to_json())
    }

    fn evaluates_after(&self, done: usize) -> bool {
        !self.rows.eval.is_empty() && (done == self.total_steps() || due(done, self.recipe.train.eval_every))
    }

    /// The held-out averages that were logged after `done` steps.
    fn evaluated(&self, done: usize) -> Result<Option<HeldOut>> {
        let rows = metrics_file::read_rows(&self.recipe.run.output.join(folder::METRICS))?;
        let number = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap_or_default();
        Ok(rows.iter().find(|row| row["step"] == done && row.get("eval_loss").is_some()).map(|row| HeldOut {
            pairs: number(row, "eval_pairs") as usize,
            loss: number(row, "eval_loss"),
            accuracy: number(row, "eval_rewards/accuracies"),
            margin: number(row, "eval_rewards/margins"),
        }))
    }

    pub(super) fn save(&mut self, done: usize) -> Result<()> {
        // free blocks of a step's sizes are of no use to a checkpoint, which would take its memory beside them
        heap::settle();
        self.watch.check()?;
        self.reference.flush()?;
        self.metrics.sync()?;
        let per_epoch = self.steps_per_epoch();
        let state = State {
            step: done as u64,
            epoch: (done / per_epoch) as u64,
            row: (done % per_epoch * self.recipe.train.batch_size) as u64,
            num_tokens: self.num_tokens,
            skipped: self.skipped,
            metrics_bytes: self.metrics.len(),
            made_of: self.made_of.clone(),
        };
        let output = &self.recipe.run.output;
        checkpoint::save(output, &state, |folder| {
            adapters::to_folder(&self.config, &self.adapter)?.write(folder, Some(self.recipe))?;
            self.optimizer.save(&folder.join(checkpoint::OPTIMIZER))
        })?;
        checkpoint::prune(output, self.recipe.train.keep_checkpoints.max(1))
    }

    /// Saves where a signal stopped the run after `done` whole steps; says how to go on.
    fn save_when_stopped(&mut self, done: usize, error: Error) -> Error {
        let Error::Stopped(_) = error else { return error };
        if done == 0 {
            return error;
        }
        match self.save(done) {
            Ok(()) => {
                self.progress
                    .note(&format!("stopped after step {done}, saved; go on with the same command and --resume"));
                error
            }
            Err(failed) => failed,
        }
    }

    fn steps_per_epoch(&self) -> usize {
        steps::per_epoch(self.recipe, self.rows.train.len())
    }

    fn total_steps(&self) -> usize {
        steps::total(self.recipe, self.rows.train.len())
    }

    pub(super) fn epoch(&self, done: usize) -> f64 {
        done as f64 / self.steps_per_epoch() as f64
    }

    fn announce(&self, total: usize) {
        let (recipe, learning) = (self.recipe, self.adapter.values.elem_count());
        let held_to = match (recipe.objective.reference, &recipe.adapter.start_from) {
            (recipe::Reference::Start, Some(start)) => format!("the base with {}", start.display()),
            _ => "the bare base".to_string(),
        };
        self.progress.note(&format!(
            "{}: {} pairs to train on, {} held out, {total} steps of {}; {learning} numbers learn in {} layers; the \
             reference is {held_to}",
            self.base.name,
            self.rows.train.len(),
            self.rows.eval.len(),
            recipe.train.batch_size,
            self.adapter.shapes.len(),
        ));
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

/// Writes the recipe into the run's folder.
fn write_recipe(recipe: &Recipe) -> Result<()> {
    store::write_atomic(&recipe.run.output.join(folder::RECIPE), |file| file.write_all(recipe.to_toml().as_bytes()))
}

/// The checkpoint that a run goes on from; says which newer ones are damaged.
fn checkpoint_of(run: &Path, from: &From, progress: &Progress) -> Result<PathBuf> {
    if let From::Checkpoint(path) = from {
        return match (path.canonicalize(), run.canonicalize()) {
            (Ok(there), Ok(run)) if there == run => Err(Error::recipe(format!(
                "--resume {}: that is the run's folder; name one of its checkpoints, or none for the newest",
                path.display()
            ))),
            (Ok(there), Ok(run)) if there.parent() != Some(&run) => Err(Error::recipe(format!(
                "--resume {}: a run goes on in its own folder, and this one is {}; name the checkpoint's with --output, or \
                 start anew from its adapter (adapter.start_from)",
                path.display(),
                run.display()
            ))),
            // what is not there is told by who opens it
            _ => Ok(path.clone()),
        };
    }
    let found = checkpoint::latest(run)?;
    found.damaged.iter().for_each(|damaged| progress.note(&format!("passed over: {damaged}")));
    found.whole.ok_or_else(|| {
        Error::recipe(format!(
            "--resume: {} holds no whole checkpoint; leave --resume away to start anew",
            run.display()
        ))
    })
}
