//! How a run begins, or goes on. What goes on is checked before its first file changes.

use std::path::{Path, PathBuf};

use super::{
    adapters,
    base::Base,
    budget::{self, Held, Memory},
    checkpoint,
    device::{self, Compute},
    folder, identity,
    reference::Reference,
    rows::{self, Rows},
    run::Run,
    samples,
    signals::Signals,
    steps,
    watch::Watch,
};
use crate::{
    Error, Result,
    engine::plan::Mib,
    export::AdapterFolder,
    heap,
    objective::reference_cache::RECORD,
    optim::Optimizer,
    recipe::{self, Recipe},
    report::{MemoryMeter, MetricsFile, Progress},
    store,
};

/// Where a run goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAt {
    /// At the start.
    Start,
    /// At the newest whole checkpoint of its folder.
    Latest,
    /// At this checkpoint.
    Checkpoint(PathBuf),
}

impl<'a> Run<'a> {
    /// The run, and the step that it begins with.
    pub(super) fn open(recipe: &'a Recipe, from: &StartAt, extend: bool) -> Result<(Self, usize)> {
        // until the folder is touched Ctrl-C ends the process at once: nothing is there to save
        let signals = Signals::install()?;
        if *from == StartAt::Start {
            folder::refuse_inputs_within(&recipe.run.output, &rows::read(recipe)?)?;
        }
        let progress = Progress::stderr();
        device::use_threads(recipe.run.threads);
        let device = device::choose(&recipe.run.device, &progress)?;
        let compute = device::compute(recipe.memory.compute, !device.is_cpu());
        let (memory, free) = device::meter(&device);
        let host = (!device.is_cpu()).then(MemoryMeter::start);
        if recipe.memory.compute == recipe::Compute::Bf16 && compute == Compute::F32 {
            progress.note("memory.compute is bf16, but this CPU does not multiply it (AVX512-BF16): f32 is used");
        }
        let base = Base::open(&recipe.model.base, &recipe.model.revision, &device, compute)?;
        let watch = Watch::start(base.folder.weights())?;
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
        let planned = budget::plan(recipe, &base, &rows, &start.shapes, held)?;
        progress.note(&format!("memory.budget {}; predicted peak {}", planned.budget, Mib(planned.plan.peak())));
        if let Some(beyond) = planned.beyond_what_is_free() {
            progress.note(&format!("warning: {beyond}"));
        }
        let (config, adapter) = start.make(recipe, &base)?;
        let made_of = identity::made_of(recipe, &base, &fingerprint, &rows, &adapter.values.to_vec1()?)?;
        let mut optimizer = Optimizer::new(&recipe.train, &adapter.values)?;
        let reference = Reference::of(recipe, &base)?;

        watch.unchanged()?;
        signals.hold();
        let output = &recipe.run.output;
        let moments: usize = optimizer.state().1.iter().map(|(_, moment)| moment.elem_count()).sum();
        let writes = Writes {
            checkpoint: 4 * (adapter.values.elem_count() + moments) as u64 + folder::SMALL_FILES,
            adapter: 4 * adapter.values.elem_count() as u64 + folder::SMALL_FILES,
            cache: if recipe.memory.reference_cache {
                (rows.train.len() + rows.eval.len()) as u64 * RECORD as u64
            } else {
                0
            },
            scratch: planned.plan.file_bytes,
        };
        let total = steps::total(recipe, rows.train.len());
        let (lock, metrics, at) = match from {
            StartAt::Start => {
                // before an earlier run is moved aside
                writes.require(recipe, total, 0)?;
                let (lock, aside) = folder::begin(output)?;
                if let Some(aside) = aside {
                    progress.note(&format!("{} holds an earlier run; it is {} now", output.display(), aside.display()));
                }
                write_recipe(recipe)?;
                (lock, MetricsFile::create(&output.join(folder::METRICS))?, None)
            }
            StartAt::Latest | StartAt::Checkpoint(_) => {
                let lock = folder::go_on(output)?;
                let path = checkpoint_of(output, from, &progress)?;
                let state = checkpoint::open(&path)?;
                state.check(&made_of, extend, &path)?;
                if !adapters::restore(&adapter, &AdapterFolder::read(&path)?, &base)? {
                    return Err(Error::input(format!(
                        "{}: its adapter has other matrices than this run",
                        path.display()
                    )));
                }
                optimizer.load(&path.join(checkpoint::OPTIMIZER))?;
                // what reading took is no measure of what follows
                heap::settle();
                progress.note(&format!("going on from {} after step {}", path.display(), state.step));
                (lock, MetricsFile::open(&output.join(folder::METRICS), state.metrics_bytes)?, Some(state))
            }
        };
        let extended = at.as_ref().filter(|_| extend).map(|at| at.total_steps(recipe, rows.train.len())).transpose()?;
        let (first, num_tokens, skipped) = at.map_or((0, 0, 0), |at| (at.step as usize, at.num_tokens, at.skipped));
        let mut run = Self {
            recipe,
            base,
            rows,
            config,
            adapter,
            budget: planned.limits.budget,
            plan: planned.plan,
            reference,
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
        if first > total {
            return Err(Error::recipe(format!(
                "{}: its checkpoint is after step {first}, and the recipe has {total} steps; name more steps, or go on \
                 from an earlier checkpoint",
                output.display()
            )));
        }
        if let Some(then) = extended.filter(|then| total < *then) {
            return Err(Error::recipe(format!(
                "--extend: the run has {then} steps, and the recipe has {total} steps; name more steps, not fewer"
            )));
        }
        if *from != StartAt::Start {
            writes.require(recipe, total - first, checkpoint::steps_of(output)?.len())?;
            // What may be refused has been, before the first file changes. What an end left goes before the checkpoints
            // of that end: without it a run is one that can be gone on with, however far it is.
            if first < total {
                folder::reopen(output)?;
            }
            run.rewind(first)?;
        }
        if recipe.memory.reference_cache {
            let cache = run.recipe.run.output.join(folder::REFERENCE);
            run.reference =
                run.reference.cached(&cache, &fingerprint, device::kind(&device), compute, run.rows.met(recipe))?;
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
}

/// Bytes of what a run writes.
struct Writes {
    checkpoint: u64,
    adapter: u64,
    cache: u64,
    /// The layers' inputs that wait in a file for a while.
    scratch: u64,
}

impl Writes {
    /// Asks for the room of all that `steps` more steps write into the run's folder besides what is there, of which so
    /// many are checkpoints.
    fn require(&self, recipe: &Recipe, steps: usize, checkpoints: usize) -> Result<()> {
        let train = &recipe.train;
        let saves = steps.checked_div(train.save_every).unwrap_or(0) + 1;
        // a new one is whole before an old one goes
        let kept = train.keep_checkpoints.max(1).min(checkpoints + saves);
        let new = (kept + 1).saturating_sub(checkpoints).max(1) as u64;
        let evaluations = steps.checked_div(train.eval_every).unwrap_or(0) + 2;
        let rows = (steps + evaluations) as u64 * folder::METRICS_ROW;
        let bytes = new.saturating_mul(self.checkpoint).saturating_add(self.adapter + rows + self.cache + self.scratch);
        let remedy = "make room, write to another disk, or keep fewer checkpoints (train.keep_checkpoints)";
        store::space::require(&recipe.run.output, bytes, "the run", remedy)
    }
}

/// Writes the recipe into the run's folder.
fn write_recipe(recipe: &Recipe) -> Result<()> {
    store::write_text(&recipe.run.output.join(folder::RECIPE), &recipe.to_toml())
}

/// The checkpoint that a run goes on from; says which newer ones are damaged.
fn checkpoint_of(run: &Path, from: &StartAt, progress: &Progress) -> Result<PathBuf> {
    if let StartAt::Checkpoint(path) = from {
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
