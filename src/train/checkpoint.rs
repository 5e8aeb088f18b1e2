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
#[path = "checkpoint_tests.rs"]
mod tests;
