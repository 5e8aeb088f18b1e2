//! The run's folder: made, or moved aside, or gone on with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::lock::{LOCK, Lock};
use crate::{
    Error, Result,
    store::{self, disk},
};

/// The resolved recipe in a run's folder.
pub const RECIPE: &str = "recipe.toml";
/// The metrics in a run's folder.
pub const METRICS: &str = "metrics.jsonl";
/// The reference's log-probs in a run's folder.
pub const REFERENCE: &str = "reference.cache";
/// The final adapter in a run's folder.
pub const ADAPTER: &str = "adapter";
/// The closing summary in a run's folder.
pub const SUMMARY: &str = "summary.json";
/// The curves in a run's folder.
pub const REPORT: &str = "report.html";

/// More than the files of a checkpoint or an adapter take besides its numbers, in bytes.
pub const SMALL_FILES: u64 = 128 << 10;
/// More than a row of the metrics takes, in bytes.
pub const METRICS_ROW: u64 = 1 << 10;

/// Takes the lock of a run's folder to go on with it.
///
/// # Errors
/// [`Error::Recipe`] where there is none; [`Error::Run`] where another process writes to it.
pub fn go_on(path: &Path) -> Result<Lock> {
    match path.is_dir() {
        true => Lock::take(path),
        false => Err(Error::recipe(format!(
            "--resume: there is no run at {}; leave --resume away to start anew",
            path.display()
        ))),
    }
}

/// Makes the folder of a new run and takes its lock. An earlier run of that name is moved aside and its new place
/// returned: nothing that took a night is written over.
///
/// # Errors
/// [`Error::Recipe`] where something else than a run stands there; [`Error::Run`] where another process writes to it.
pub fn begin(path: &Path) -> Result<(Lock, Option<PathBuf>)> {
    let writing = |error| Error::writing(path, error);
    let is_run = path.join(RECIPE).is_file();
    if path.exists() && !is_run && !is_empty(path)? {
        return Err(Error::recipe(format!(
            "run.output: {} holds something else than a run; name another folder",
            path.display()
        )));
    }
    disk::create_dir_all(path).map_err(writing)?;
    let lock = Lock::take(path)?;
    if !is_run {
        return Ok((lock, None));
    }
    // The old lock is held until there is a new one; Windows does not rename a folder in which a file is open.
    let lock = Some(lock).filter(|_| !cfg!(windows));
    let aside = (1..).map(|n| PathBuf::from(format!("{}.{n}", path.display()))).find(|aside| !aside.exists());
    if let Some(aside) = &aside {
        disk::rename(path, aside).map_err(|error| Error::writing(aside, error))?;
    }
    disk::create_dir_all(path).map_err(writing)?;
    let new = Lock::take(path)?;
    drop(lock);
    Ok((new, aside))
}

/// Takes away what an earlier end of a run left, where the run has steps to take again: it would pass for their result.
/// The checkpoint that the run goes on from holds what it needs.
///
/// # Errors
/// [`Error::Run`] where something cannot be removed.
pub fn reopen(path: &Path) -> Result<()> {
    for name in [SUMMARY, REPORT] {
        let file = path.join(name);
        if file.exists() {
            disk::remove_file(&file).map_err(|error| Error::writing(&file, error))?;
        }
    }
    store::remove_folder(&path.join(ADAPTER))
}

/// Refuses a new run that would move aside, with an earlier run at `path`, what it reads itself.
///
/// # Errors
/// [`Error::Recipe`] that names the first of `read` that lies there.
pub fn holds_none(path: &Path, read: &[PathBuf]) -> Result<()> {
    let Some(run) = path.join(RECIPE).is_file().then(|| path.canonicalize().ok()).flatten() else { return Ok(()) };
    let within = |read: &&PathBuf| read.canonicalize().is_ok_and(|read| read.starts_with(&run));
    match read.iter().find(within) {
        None => Ok(()),
        Some(read) => Err(Error::recipe(format!(
            "run.output: {} holds an earlier run, which would be moved aside, and {} lies in it; name another folder for \
             this run",
            path.display(),
            read.display()
        ))),
    }
}

/// Whether nothing stands there but what a process leaves that died before it wrote its recipe.
fn is_empty(path: &Path) -> Result<bool> {
    let unreadable = |error| Error::recipe(format!("run.output: {}: {error}", path.display()));
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        if name != LOCK && *name != *format!(".{RECIPE}.incomplete") {
            return Ok(false);
        }
    }
    Ok(true)
}
