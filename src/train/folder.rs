//! The run's folder: made, or moved aside, or gone on with.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::lock::{LOCK, Lock};
use crate::{
    Error, Result,
    export::adapter_config,
    store::{self, disk},
};

/// The resolved recipe in a run's folder.
pub use crate::recipe::RESOLVED as RECIPE;
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
/// [`Error::Recipe`] where something else than a run stands there, or a run that cannot be moved; [`Error::Run`] where
/// another process writes to it.
pub fn begin(path: &Path) -> Result<(Lock, Option<PathBuf>)> {
    // a link stays, and leads to the new run as it led to the earlier one
    let behind = path.is_symlink().then(|| path.canonicalize().ok()).flatten();
    let path = behind.as_deref().unwrap_or(path);
    let writing = |error| Error::writing(path, error);
    let is_run = is_run(path);
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
        disk::rename(path, aside).map_err(|error| not_moved(path, aside, error))?;
    }
    disk::create_dir_all(path).map_err(writing)?;
    let new = Lock::take(path)?;
    drop(lock);
    Ok((new, aside))
}

/// Whether a folder holds a run: a recipe alone may be that of somebody's project.
fn is_run(path: &Path) -> bool {
    path.join(RECIPE).is_file() && [LOCK, METRICS].iter().any(|name| path.join(name).is_file())
}

/// Says why an earlier run could not be moved aside: a folder on which a disk is mounted has no place beside it.
fn not_moved(path: &Path, aside: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ResourceBusy | io::ErrorKind::CrossesDevices => Error::recipe(format!(
            "run.output: {} holds an earlier run that cannot be moved aside, for a disk is mounted there ({error}); \
             name a folder within it as run.output",
            path.display()
        )),
        _ => Error::writing(aside, error),
    }
}

/// Takes away what an earlier end of a run left, where the run has steps to take again: it would pass for their
/// result. The checkpoint that the run goes on from holds what it needs.
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
pub fn refuse_inputs_within(path: &Path, read: &[PathBuf]) -> Result<()> {
    let Some(run) = is_run(path).then(|| path.canonicalize().ok()).flatten() else { return Ok(()) };
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

/// The adapter that `source` means: its own folder, or a finished run's.
///
/// # Errors
/// [`Error::Input`] where it is neither, with what to name instead.
pub fn adapter_of(source: &Path) -> Result<PathBuf> {
    if source.join(adapter_config::FILE).exists() {
        return Ok(source.to_path_buf());
    }
    let last = source.join(ADAPTER);
    if last.join(adapter_config::FILE).exists() {
        return Ok(last);
    }
    let shown = source.display();
    Err(Error::input(if !source.is_dir() {
        format!("{shown}: there is no such folder")
    } else if source.join(RECIPE).exists() {
        format!("{shown}: this run has not ended; resume it, or name one of its checkpoint-STEP folders")
    } else {
        format!("{shown}: neither a run's folder nor an adapter's ({} is missing)", adapter_config::FILE)
    }))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn run_at(path: &Path, beside: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join(RECIPE), "").unwrap();
        fs::write(path.join(beside), "an earlier one").unwrap();
    }

    #[test]
    fn a_recipe_alone_makes_no_run() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("project");
        run_at(&path, "notes.txt");
        let error = begin(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("holds something else than a run"), "{error}");
        assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
        for beside in [LOCK, METRICS] {
            let path = place.path().join(beside.trim_start_matches('.'));
            run_at(&path, beside);
            let aside = begin(&path).unwrap().1.unwrap();
            assert_eq!(aside, PathBuf::from(format!("{}.1", path.display())));
        }
    }

    #[test]
    fn a_run_means_its_last_adapter() {
        let run = tempfile::tempdir().unwrap();
        let said = |path: &Path| adapter_of(path).unwrap_err().to_string();
        assert!(said(run.path()).contains("neither a run's folder nor an adapter's"));
        assert!(said(&run.path().join("none")).contains("no such folder"));
        fs::write(run.path().join(RECIPE), "").unwrap();
        assert!(said(run.path()).contains("has not ended"));
        let adapter = run.path().join(ADAPTER);
        fs::create_dir(&adapter).unwrap();
        fs::write(adapter.join(adapter_config::FILE), "{}").unwrap();
        assert_eq!(adapter_of(run.path()).unwrap(), adapter);
        assert_eq!(adapter_of(&adapter).unwrap(), adapter);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_leads_to_the_new_run() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        let (there, link) = (place.join("there"), place.join("link"));
        run_at(&there, METRICS);
        std::os::unix::fs::symlink("there", &link).unwrap();
        let aside = begin(&link).unwrap().1.unwrap();
        assert_eq!(aside, place.join("there.1"));
        assert!(aside.join(METRICS).exists() && !there.join(METRICS).exists());
        assert!(link.is_symlink() && link.join(LOCK).exists());
    }

    #[cfg(debug_assertions)]
    #[test]
    fn a_mounted_disk_is_not_moved_aside() {
        use crate::store::disk::faults::{self, Fault};
        let place = tempfile::tempdir().unwrap();
        run_at(place.path(), METRICS);
        for kind in [io::ErrorKind::ResourceBusy, io::ErrorKind::CrossesDevices] {
            faults::plan(0, Fault::Error(kind));
            let error = begin(place.path()).unwrap_err();
            assert!(faults::end().iter().all(|(call, _)| *call == "rename"));
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("name a folder within it as run.output"), "{error}");
        }
    }
}
