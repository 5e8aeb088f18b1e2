//! Checkpoints: `checkpoint-<step>/` in the run's folder with a PEFT adapter, `optimizer.safetensors` and `state.json`,
//! whole or absent.
//!
//! A resumed run is the uninterrupted one: order of rows and dropout are functions of seed and step, so `state.json`
//! needs no random state; it says where the run stood, what it was made of, and how much of `metrics.jsonl` is its
//! past.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::steps;
use crate::outside::{self, MAX_JSON};
use crate::recipe::Recipe;
use crate::store::{self, Folder, disk};
use crate::{Error, Result};

/// The optimizer's moments in a checkpoint's folder.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The [`State`] in a checkpoint's folder.
pub const STATE: &str = "state.json";

const PREFIX: &str = "checkpoint-";

/// Settings that say how long a run is: with them alone changed, a run can be made to go on for more steps.
const LENGTH: [&str; 2] = ["train.epochs", "train.max_steps"];

/// Where a run stood and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps taken, those left out included.
    pub step: u64,
    /// Whole passes over the rows.
    pub epoch: u64,
    /// Rows taken of the current pass.
    pub row: u64,
    /// Tokens trained on, as TRL counts them.
    pub num_tokens: u64,
    /// Steps in a row that were left out, up to here.
    pub skipped: u64,
    /// Bytes of `metrics.jsonl` that belong to these steps.
    pub metrics_bytes: u64,
    /// What the run is made of.
    pub made_of: MadeOf,
}

/// All that must be the same for a run to go on: the settings as they are, the rest as fingerprints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeOf {
    /// The recipe's settings that decide the result, by key.
    pub settings: BTreeMap<String, Value>,
    /// Of the base's weights and configuration.
    pub base: String,
    /// Of the chat template.
    pub template: String,
    /// Of the tokenizer.
    pub tokenizer: String,
    /// Of the adapter that the run starts from.
    pub start: String,
    /// Of the tokenised training rows.
    pub data: String,
    /// Of the tokenised rows held out.
    pub held_out: String,
}

impl State {
    /// Refuses to go on with anything else than what the checkpoint was made with; with `extend`, the run may have
    /// become longer.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming what is another: a key with both values, or the model, the rows and so on.
    pub fn check(&self, now: &MadeOf, extend: bool, checkpoint: &Path) -> Result<()> {
        let then = &self.made_of;
        let shown = |value: Option<&Value>| value.map_or("not set".to_string(), Value::to_string);
        let keys = then.settings.keys().chain(now.settings.keys());
        let mut changed = keys.filter(|key| then.settings.get(*key) != now.settings.get(*key));
        let setting = changed.find(|key| !(extend && LENGTH.contains(&key.as_str()))).map(|key| {
            let hint = if LENGTH.contains(&key.as_str()) { " (or go on for more steps with --extend)" } else { "" };
            format!("{key} ({}, now {}){hint}", shown(then.settings.get(key)), shown(now.settings.get(key)))
        });
        let parts = [
            ("base model", &then.base, &now.base),
            ("chat template", &then.template, &now.template),
            ("tokenizer", &then.tokenizer, &now.tokenizer),
            ("start adapter", &then.start, &now.start),
            ("set of training rows", &then.data, &now.data),
            ("set of held-out rows", &then.held_out, &now.held_out),
        ];
        let part = parts.into_iter().find(|(_, then, now)| then != now).map(|(what, ..)| what.to_string());
        match setting.or(part) {
            None => Ok(()),
            Some(what) => Err(Error::recipe(format!(
                "{}: made with another {what}: a resumed run must be the run that was stopped; bring it back as it \
                 was, or train anew with another run.output",
                checkpoint.display()
            ))),
        }
    }
}

impl State {
    /// How many steps the run has that it was made by; `now` is its recipe, as it may have been made longer since.
    ///
    /// # Errors
    /// [`Error::Input`] where the checkpoint does not say.
    pub fn total_steps(&self, now: &Recipe, rows: usize) -> Result<usize> {
        let mut then = now.clone();
        let [epochs, steps] = LENGTH.map(|key| self.made_of.settings.get(key));
        let (Some(epochs), Some(steps)) = (epochs.and_then(Value::as_f64), steps.and_then(Value::as_u64)) else {
            return Err(Error::input(format!(
                "the checkpoint after step {} does not say how long its run is",
                self.step
            )));
        };
        (then.train.epochs, then.train.max_steps) = (epochs, steps as usize);
        Ok(steps::total(&then, rows))
    }
}

/// Saves a checkpoint and returns its folder. `fill` writes the adapter and the optimizer into the folder it is given;
/// nothing stands under the checkpoint's name until all of it is on disk. It has been read back when this returns.
pub fn save(run: &Path, state: &State, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = run.join(format!("{PREFIX}{}", state.step));
    if path.exists() && open(&path).is_ok_and(|saved| saved == *state) {
        return Ok(path);
    }
    let folder = Folder::create_atomic(&path)?;
    fill(folder.path())?;
    let file = folder.path().join(STATE);
    let text = serde_json::to_string_pretty(state).map_err(|error| Error::writing(&file, error.into()))?;
    store::write_text(&file, &(text + "\n"))?;
    folder.finish()?;
    match open(&path) {
        Ok(saved) if saved == *state => Ok(path),
        Ok(_) => Err(Error::run(format!("{}: it does not read back as it was saved", path.display()))),
        Err(error) => Err(Error::run(format!("a checkpoint cannot be read back: {error}; look at this disk"))),
    }
}

/// Reads the state of the checkpoint in `folder`, every file of which must be as it was written.
pub fn open(folder: &Path) -> Result<State> {
    store::verify(folder)?;
    read(folder)
}

/// Reads the state of the checkpoint in `folder`, whatever became of its other files.
pub fn read(folder: &Path) -> Result<State> {
    let file = folder.join(STATE);
    outside::json(&outside::read(&file, MAX_JSON)?).map_err(|error| {
        Error::input(format!("{}: not a checkpoint's state: {error}; name another checkpoint", file.display()))
    })
}

/// What [`latest`] finds.
#[derive(Debug, PartialEq, Eq)]
pub struct Latest {
    /// The newest whole checkpoint.
    pub whole: Option<PathBuf>,
    /// What is wrong with those that are newer.
    pub damaged: Vec<String>,
}

/// The run's newest whole checkpoint. What a dead process left half-written is made up for or removed; a damaged
/// checkpoint is passed over and named.
pub fn latest(run: &Path) -> Result<Latest> {
    for (step, leftover) in list(run)?.leftovers {
        store::recover(&run.join(format!("{PREFIX}{step}")))?;
        disk::remove_dir_all(&leftover).map_err(|error| Error::writing(&leftover, error))?;
    }
    let mut damaged = Vec::new();
    for (_, path) in list(run)?.checkpoints {
        match open(&path) {
            Ok(_) => return Ok(Latest { whole: Some(path), damaged }),
            Err(error) => damaged.push(error.to_string()),
        }
    }
    Ok(Latest { whole: None, damaged })
}

/// Removes all but the newest `keep` checkpoints.
pub fn prune(run: &Path, keep: usize) -> Result<()> {
    list(run)?.checkpoints.iter().skip(keep).try_for_each(|(_, path)| store::remove_folder(path))
}

/// Removes the checkpoints of steps after `step`, the newest first, and what is left of others: a run that goes on from
/// there takes them again, and would else find them as its newest.
pub fn rewind(run: &Path, step: u64) -> Result<()> {
    let found = list(run)?;
    for (_, leftover) in found.leftovers {
        disk::remove_dir_all(&leftover).map_err(|error| Error::writing(&leftover, error))?;
    }
    found.checkpoints.iter().filter(|(later, _)| *later > step).try_for_each(|(_, path)| store::remove_folder(path))
}

/// The newest state that can be read in a run's folder, in which nothing is touched; none where no checkpoint is there.
pub fn newest(run: &Path) -> Result<Option<State>> {
    Ok(list(run)?.checkpoints.iter().find_map(|(_, path)| read(path).ok()))
}

/// The steps of the checkpoints in a run's folder, in order.
pub fn steps_of(run: &Path) -> Result<Vec<u64>> {
    Ok(list(run)?.checkpoints.iter().rev().map(|(step, _)| *step).collect())
}

struct Found {
    /// Step and folder, newest first.
    checkpoints: Vec<(u64, PathBuf)>,
    /// Step and hidden folder of checkpoints that were being written, replaced or removed.
    leftovers: Vec<(u64, PathBuf)>,
}

/// What stands in a run's folder; nothing where there is no such folder.
fn list(run: &Path) -> Result<Found> {
    let mut found = Found { checkpoints: Vec::new(), leftovers: Vec::new() };
    let entries = match fs::read_dir(run) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        entries => entries.map_err(|error| Error::reading(run, error))?,
    };
    for entry in entries {
        let path = entry.map_err(|error| Error::reading(run, error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !path.is_dir() {
            continue;
        }
        let (hidden, name) = name.strip_prefix('.').map_or((false, name), |name| (true, name));
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let (step, suffix) = rest.split_once('.').unwrap_or((rest, ""));
        let Ok(step) = step.parse() else { continue };
        match (hidden, suffix) {
            (false, "") => found.checkpoints.push((step, path)),
            (true, "incomplete" | "replaced" | "removed") => found.leftovers.push((step, path)),
            _ => {}
        }
    }
    found.checkpoints.sort_by_key(|&(step, _)| std::cmp::Reverse(step));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> State {
        let of = |what: &str| what.to_string();
        let made_of = MadeOf {
            settings: BTreeMap::from([(of("train.epochs"), 2.0.into()), (of("train.learning_rate"), 0.25.into())]),
            base: of("b"),
            template: of("c"),
            tokenizer: of("t"),
            start: of("s"),
            data: of("d"),
            held_out: of("h"),
        };
        State { step, epoch: 1, row: 4, num_tokens: 900, skipped: 0, metrics_bytes: 1234, made_of }
    }

    fn save_step(run: &Path, step: u64) -> Result<PathBuf> {
        save(run, &state(step), |folder| store::write_text(&folder.join(OPTIMIZER), &step.to_string()))
    }

    fn names(run: &Path) -> Vec<String> {
        let entries = fs::read_dir(run).expect("the run's folder");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_newest_is_found_by_number_and_comes_back_as_it_was() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        assert_eq!(latest(&run.path().join("none"))?.whole, None);
        assert_eq!(latest(run.path())?.whole, None);
        save_step(run.path(), 9)?;
        let path = save_step(run.path(), 10)?;
        assert_eq!(latest(run.path())?, Latest { whole: Some(path.clone()), damaged: vec![] });
        assert_eq!(open(&path)?, state(10));
        assert_eq!(fs::read_to_string(path.join(OPTIMIZER)).expect("written"), "10");
        Ok(())
    }

    #[test]
    fn what_is_not_whole_is_passed_over_and_leftovers_go() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        let whole = save_step(run.path(), 2)?;
        let cut = save_step(run.path(), 4)?;
        fs::write(cut.join(OPTIMIZER), "").expect("written");
        fs::create_dir(run.path().join("checkpoint-6")).expect("made");
        fs::create_dir(run.path().join(".checkpoint-8.incomplete")).expect("made");
        let found = latest(run.path())?;
        assert_eq!((found.whole, found.damaged.len()), (Some(whole), 2));
        assert!(found.damaged[0].contains("checkpoint-6/manifest.json"), "{:?}", found.damaged);
        assert!(found.damaged[1].contains(&format!("checkpoint-4/{OPTIMIZER}")), "{:?}", found.damaged);
        assert_eq!(names(run.path()), ["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
        assert!(open(&cut).expect_err("cut").to_string().contains(OPTIMIZER));
        Ok(())
    }

    #[test]
    fn steps_are_told_in_order() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        for name in ["checkpoint-10", "checkpoint-9", ".checkpoint-11.incomplete", "checkpoint-x"] {
            fs::create_dir(run.path().join(name)).expect("made");
        }
        assert_eq!(steps_of(run.path())?, [9, 10]);
        Ok(())
    }

    #[test]
    fn a_failed_save_leaves_nothing() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        save(run.path(), &state(3), |_| Err(Error::run("a tensor is not finite"))).expect_err("failed");
        assert_eq!(names(run.path()), [""; 0]);
        Ok(())
    }

    #[test]
    fn the_oldest_go_first() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        fs::create_dir(run.path().join("adapter")).expect("made");
        for step in [5, 10, 100, 20] {
            save_step(run.path(), step)?;
        }
        prune(run.path(), 2)?;
        assert_eq!(names(run.path()), ["adapter", "checkpoint-100", "checkpoint-20"]);
        rewind(run.path(), 20)?;
        assert_eq!(names(run.path()), ["adapter", "checkpoint-20"]);
        Ok(())
    }

    /// The states in which a crash between two calls can leave a replacement, and which of the two is there afterwards.
    #[test]
    fn a_replacement_that_was_cut_short_is_made_up_for() -> Result<()> {
        let run = tempfile::tempdir().expect("a folder");
        let at = |name: &str| run.path().join(name);
        let rename = |from: &str, to: &str| fs::rename(at(from), at(to)).expect("renamed");
        let content = || fs::read_to_string(at("checkpoint-5").join(OPTIMIZER)).expect("read");
        let both = || -> Result<()> {
            save_step(run.path(), 5)?;
            fs::write(at("checkpoint-5").join("old"), "").expect("written");
            rename("checkpoint-5", "aside");
            save_step(run.path(), 5)?;
            rename("checkpoint-5", ".checkpoint-5.incomplete");
            rename("aside", ".checkpoint-5.replaced");
            Ok(())
        };
        // Both renamed aside, the new one whole: it is taken.
        both()?;
        assert_eq!(latest(run.path())?.whole, Some(at("checkpoint-5")));
        assert_eq!((names(run.path()), content()), (vec!["checkpoint-5".to_string()], "5".into()));
        assert!(!at("checkpoint-5/old").exists());
        // The new one not whole: the old one comes back.
        fs::remove_dir_all(at("checkpoint-5")).expect("removed");
        both()?;
        fs::remove_file(at(".checkpoint-5.incomplete/manifest.json")).expect("removed");
        assert_eq!(latest(run.path())?.whole, Some(at("checkpoint-5")));
        assert_eq!(names(run.path()), ["checkpoint-5"]);
        assert!(at("checkpoint-5/old").exists());
        // What was on its way out stays out.
        rename("checkpoint-5", ".checkpoint-5.removed");
        assert_eq!((latest(run.path())?.whole, names(run.path()).len()), (None, 0));
        Ok(())
    }

    #[test]
    fn another_run_does_not_go_on_from_it() {
        let (then, path) = (state(3), Path::new("runs/hh/checkpoint-3"));
        assert!(then.check(&then.made_of, false, path).is_ok());
        let refused = |change: &dyn Fn(&mut MadeOf), extend: bool| {
            let mut now = then.made_of.clone();
            change(&mut now);
            then.check(&now, extend, path).map_err(|error| (error.exit_code(), error.to_string()))
        };
        type Change<'a> = &'a dyn Fn(&mut MadeOf);
        let parts: [(Change, &str); 8] = [
            (&|now| now.base.push('x'), "base model"),
            (&|now| now.template.push('x'), "chat template"),
            (&|now| now.tokenizer.push('x'), "tokenizer"),
            (&|now| now.start.push('x'), "start adapter"),
            (&|now| now.data.push('x'), "set of training rows"),
            (&|now| now.held_out.push('x'), "set of held-out rows"),
            (&|now| drop(now.settings.remove("train.learning_rate")), "train.learning_rate (0.25, now not set)"),
            (&|now| drop(now.settings.insert("train.seed".into(), 1.into())), "train.seed (not set, now 1)"),
        ];
        for (change, what) in parts {
            for extend in [false, true] {
                let (code, said) = refused(change, extend).expect_err(what);
                assert_eq!(code, 2);
                assert!(said.starts_with(&format!("runs/hh/checkpoint-3: made with another {what}: ")), "{said}");
            }
        }
        let longer = |now: &mut MadeOf| drop(now.settings.insert("train.epochs".into(), 3.0.into()));
        let (_, said) = refused(&longer, false).expect_err("longer");
        assert!(said.contains("another train.epochs (2.0, now 3.0) (or go on for more steps with --extend)"), "{said}");
        assert_eq!(refused(&longer, true), Ok(()));
    }

    /// Every call that a save and a prune make goes wrong in every way: the newest whole checkpoint is the old one or
    /// the new one, no third thing, and the next save works.
    #[cfg(debug_assertions)]
    #[test]
    fn a_save_that_fails_at_any_call_leaves_a_whole_checkpoint() -> Result<()> {
        use crate::store::disk::faults::{self, Fault};
        let save_both = |run: &Path, step: u64| -> Result<()> {
            save_step(run, step)?;
            prune(run, 1)
        };
        let whole = {
            let run = tempfile::tempdir().expect("a folder");
            save_both(run.path(), 1)?;
            faults::plan(usize::MAX, Fault::Torn);
            save_both(run.path(), 2)?;
            faults::end()
        };
        for call in ["mkdir", "create", "write", "sync", "rename", "remove"] {
            assert!(whole.iter().any(|(name, _)| *name == call), "no {call} among {whole:?}");
        }
        let kinds = [std::io::ErrorKind::StorageFull, std::io::ErrorKind::Other].map(Fault::Error);
        for fault in kinds.into_iter().chain([Fault::Torn, Fault::Crash]) {
            for at in 0..whole.len() {
                for step in [2, 1] {
                    // A step of its own, or the same step with another state: a replacement.
                    let run = tempfile::tempdir().expect("a folder");
                    save(run.path(), &State { num_tokens: 1, ..state(1) }, |_| Ok(()))?;
                    faults::plan(at, fault);
                    let failed = save_both(run.path(), step);
                    let calls = faults::end_without_power();
                    if calls.len() <= at {
                        continue;
                    }
                    let place = format!("{fault:?} at call {at}, {:?}: {failed:?}", calls[at]);
                    let found = latest(run.path())?;
                    let kept = open(found.whole.as_deref().unwrap_or_else(|| panic!("nothing left: {place}")))?;
                    let old = State { num_tokens: 1, ..state(1) };
                    assert!(kept == old || kept == state(step), "{place}");
                    assert!(failed.is_err() || kept == state(step), "{place}");
                    assert_eq!(found.damaged, [""; 0], "{place}");
                    save_both(run.path(), 3)?;
                    assert_eq!(names(run.path()), ["checkpoint-3"], "{place}");
                }
            }
        }
        Ok(())
    }

    /// What a loss of power between two calls may undo is undone in `tests/crash.rs` for bytes; names are held here by
    /// the order of the calls: each file is synced before the folder, the folder before its rename, and the rename
    /// before an older checkpoint is touched.
    #[cfg(debug_assertions)]
    #[test]
    fn a_save_syncs_before_it_relies() -> Result<()> {
        use crate::store::disk::faults::{self, Fault};
        let run = tempfile::tempdir().expect("a folder");
        save_step(run.path(), 1)?;
        faults::plan(usize::MAX, Fault::Torn);
        save_step(run.path(), 2)?;
        prune(run.path(), 1)?;
        let calls = faults::end();
        let (new, part) = (run.path().join("checkpoint-2"), run.path().join(".checkpoint-2.incomplete"));
        let last = |call: &str, path: &Path| {
            let found = calls.iter().rposition(|(name, at)| *name == call && at == path);
            found.unwrap_or_else(|| panic!("no {call} of {}: {calls:?}", path.display()))
        };
        let manifest = last("sync", &part.join(store::MANIFEST));
        for file in [OPTIMIZER, STATE] {
            let synced = last("sync", &part.join(file));
            assert!(last("rename", &part.join(file)) < synced && synced < manifest, "{calls:?}");
        }
        assert!(last("write", &part.join(store::MANIFEST)) < manifest, "{calls:?}");
        let (folder, renamed, above) = (last("sync", &part), last("rename", &new), last("sync", run.path()));
        let older = last("rename", &run.path().join(".checkpoint-1.removed"));
        assert!(manifest < folder && folder < renamed && renamed < above && above < older, "{calls:?}");
        Ok(())
    }

    /// A disk that garbles what it was given: seen as the save reads back, and what stood there before stays.
    #[cfg(debug_assertions)]
    #[test]
    fn what_does_not_read_back_is_no_checkpoint_and_costs_no_other() -> Result<()> {
        use std::cell::RefCell;

        use crate::store::disk::faults::{self, Fault};
        thread_local! {
            static GARBLED: RefCell<PathBuf> = RefCell::default();
        }
        let run = tempfile::tempdir().expect("a folder");
        let save_both = |step: u64| save_step(run.path(), step).and_then(|_| prune(run.path(), 1));
        save_both(1)?;
        let part = run.path().join(".checkpoint-2.incomplete");
        faults::plan(usize::MAX, Fault::Torn);
        save_both(2)?;
        let calls = faults::end();
        // The sums are taken and written; then, as the folder is synced, the file is another one.
        let at = calls.iter().rposition(|(name, path)| *name == "sync" && *path == part).expect("the folder's sync");
        fs::remove_dir_all(run.path().join("checkpoint-2")).expect("removed");
        save_both(1)?;
        GARBLED.set(part.join(OPTIMIZER));
        faults::plan(at, Fault::Run(|| GARBLED.with_borrow(|path| fs::write(path, "3").expect("written"))));
        let error = save_both(2).expect_err("garbled");
        faults::end();
        assert!(error.to_string().contains("a checkpoint cannot be read back: "), "{error}");
        assert_eq!(latest(run.path())?.whole, Some(run.path().join("checkpoint-1")));
        Ok(())
    }
}
