//! Checkpoints: `checkpoint-<step>/` in the run's folder with a PEFT adapter, `optimizer.safetensors` and `state.json`,
//! whole or absent.
//!
//! A resumed run is the uninterrupted one: order of rows and dropout are functions of seed and step, so `state.json`
//! needs no random state; it says where the run stood, what it was made of, and how much of `metrics.jsonl` is its past.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::{self, Folder};
use crate::{Error, Result};

/// The optimizer's moments in a checkpoint's folder.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The [`State`] in a checkpoint's folder.
pub const STATE: &str = "state.json";

const PREFIX: &str = "checkpoint-";

/// Where a run stood and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimizer steps taken.
    pub step: u64,
    /// Whole passes over the rows.
    pub epoch: u64,
    /// Rows taken of the current pass.
    pub row: u64,
    /// Tokens trained on, as TRL counts them.
    pub num_tokens: u64,
    /// Bytes of `metrics.jsonl` that belong to these steps.
    pub metrics_bytes: u64,
    /// What the run is made of.
    pub made_of: MadeOf,
}

/// Fingerprints of all that must be the same for a run to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeOf {
    /// Of the recipe's settings that decide the result.
    pub recipe: String,
    /// Of the tokenised training rows.
    pub data: String,
    /// Of the base's weights and configuration.
    pub base: String,
    /// Of the adapter that the run starts from.
    pub start: String,
}

impl State {
    /// Refuses to go on with anything else than what the checkpoint was made with.
    pub fn check(&self, now: &MadeOf, checkpoint: &Path) -> Result<()> {
        let parts = [
            ("recipe", &self.made_of.recipe, &now.recipe),
            ("set of training rows", &self.made_of.data, &now.data),
            ("base model", &self.made_of.base, &now.base),
            ("start adapter", &self.made_of.start, &now.start),
        ];
        match parts.into_iter().find(|(_, then, now)| then != now) {
            None => Ok(()),
            Some((what, ..)) => Err(Error::recipe(format!(
                "{}: made with another {what}: a resumed run must be the run that was stopped; bring it back as it \
                 was, or train anew with another run.output",
                checkpoint.display()
            ))),
        }
    }
}

/// Saves a checkpoint and returns its folder. `fill` writes the adapter and the optimizer into the folder it is given;
/// nothing stands under the checkpoint's name until all of it is on disk.
pub fn save(run: &Path, state: &State, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = run.join(format!("{PREFIX}{}", state.step));
    let folder = Folder::create_atomic(&path)?;
    fill(folder.path())?;
    let file = folder.path().join(STATE);
    let text = serde_json::to_string_pretty(state).map_err(|error| Error::writing(&file, error.into()))?;
    fs::write(&file, text + "\n").map_err(|error| Error::writing(&file, error))?;
    folder.finish()?;
    Ok(path)
}

/// Reads the state of the checkpoint in `folder`, every file of which must be as it was written.
pub fn open(folder: &Path) -> Result<State> {
    store::verify(folder)?;
    let file = folder.join(STATE);
    let text = fs::read_to_string(&file).map_err(|error| Error::reading(&file, error))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::input(format!("{}: not a checkpoint's state: {error}", file.display())))
}

/// The run's newest whole checkpoint; none where there is none. What a dead process left half-written is removed; a
/// damaged checkpoint is passed over.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    let found = list(run)?;
    for leftover in found.leftovers {
        fs::remove_dir_all(&leftover).map_err(|error| Error::writing(&leftover, error))?;
    }
    Ok(found.checkpoints.into_iter().map(|(_, path)| path).find(|path| open(path).is_ok()))
}

/// Removes all but the newest `keep` checkpoints.
pub fn prune(run: &Path, keep: usize) -> Result<()> {
    list(run)?.checkpoints.iter().skip(keep).try_for_each(|(_, path)| remove(path))
}

/// Removes the checkpoints of steps after `step`: a run that goes on from there takes them again, and would else find
/// them as its newest.
pub fn rewind(run: &Path, step: u64) -> Result<()> {
    list(run)?.checkpoints.iter().filter(|(later, _)| *later > step).try_for_each(|(_, path)| remove(path))
}

/// Renames first: removal is not atomic, and half a checkpoint must not look like one.
fn remove(path: &Path) -> Result<()> {
    let doomed = path.with_file_name(format!(".{}.replaced", path.file_name().unwrap_or_default().to_string_lossy()));
    fs::rename(path, &doomed).and_then(|()| fs::remove_dir_all(&doomed)).map_err(|error| Error::writing(path, error))
}

struct Found {
    /// Newest first.
    checkpoints: Vec<(u64, PathBuf)>,
    /// Hidden folders of checkpoints that were being written or removed.
    leftovers: Vec<PathBuf>,
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
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok()) {
            found.checkpoints.push((step, path));
        } else if name.strip_prefix('.').is_some_and(|name| name.starts_with(PREFIX)) {
            found.leftovers.push(path);
        }
    }
    found.checkpoints.sort_by_key(|&(step, _)| std::cmp::Reverse(step));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> State {
        let made_of = MadeOf { recipe: "r".into(), data: "d".into(), base: "b".into(), start: "s".into() };
        State { step, epoch: 1, row: 4, num_tokens: 900, metrics_bytes: 1234, made_of }
    }

    fn save_step(run: &Path, step: u64) -> Result<PathBuf> {
        save(run, &state(step), |folder| {
            fs::write(folder.join(OPTIMIZER), step.to_string()).map_err(|error| Error::writing(folder, error))
        })
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
        assert_eq!(latest(&run.path().join("none"))?, None);
        assert_eq!(latest(run.path())?, None);
        save_step(run.path(), 9)?;
        let path = save_step(run.path(), 10)?;
        assert_eq!(latest(run.path())?, Some(path.clone()));
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
        assert_eq!(latest(run.path())?, Some(whole));
        assert_eq!(names(run.path()), ["checkpoint-2", "checkpoint-4", "checkpoint-6"]);
        assert!(open(&cut).expect_err("cut").to_string().contains(OPTIMIZER));
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

    #[test]
    fn another_run_does_not_go_on_from_it() {
        let (then, path) = (state(3), Path::new("runs/hh/checkpoint-3"));
        assert!(then.check(&then.made_of, path).is_ok());
        let now = MadeOf { data: "other".into(), ..then.made_of.clone() };
        let error = then.check(&now, path).expect_err("other rows");
        assert!(
            error.to_string().starts_with("runs/hh/checkpoint-3: made with another set of training rows"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 2);
    }
}
