//! The calls by which runs and exports change what is on a disk, in one place, so that a test can let each of them
//! fail.
//!
//! In a release build these are the standard library's calls and nothing else. Builds with debug assertions, in which
//! the tests run, ask [`faults`] first.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// A file that was opened here. Reading is the standard library's; writing, cutting and syncing can be made to fail.
#[derive(Debug)]
pub struct File {
    file: fs::File,
    #[cfg(debug_assertions)]
    path: std::path::PathBuf,
}

impl File {
    /// Starts a file anew.
    pub fn create(path: &Path) -> io::Result<Self> {
        check("create", path)?;
        Ok(Self::of(fs::File::create(path)?, path))
    }

    /// Makes a file that is not there.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        check("create", path)?;
        Ok(Self::of(fs::File::create_new(path)?, path))
    }

    /// Opens a file to read and to write, and makes it where there is none. What it holds stays.
    pub fn create_or_open(path: &Path) -> io::Result<Self> {
        check("open", path)?;
        Ok(Self::of(fs::File::options().read(true).write(true).create(true).truncate(false).open(path)?, path))
    }

    /// Opens a file that is there, to read and to write.
    pub fn open(path: &Path) -> io::Result<Self> {
        check("open", path)?;
        Ok(Self::of(fs::File::options().read(true).write(true).open(path)?, path))
    }

    fn of(file: fs::File, path: &Path) -> Self {
        // Only faults ask for the path.
        let _ = path;
        Self {
            file,
            #[cfg(debug_assertions)]
            path: path.to_path_buf(),
        }
    }

    /// Brings the bytes and what is known of the file to the disk.
    pub fn sync(&self) -> io::Result<()> {
        #[cfg(debug_assertions)]
        check("sync", &self.path)?;
        self.file.sync_all()?;
        #[cfg(debug_assertions)]
        faults::synced(&self.path);
        Ok(())
    }

    /// Cuts the file to so many bytes.
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        #[cfg(debug_assertions)]
        check("set_len", &self.path)?;
        self.file.set_len(bytes)
    }

    /// How many bytes it holds.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

impl Read for File {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.file.read(bytes)
    }
}

impl Seek for File {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(debug_assertions)]
        if let Err((error, torn)) = faults::write(&self.path) {
            if torn {
                self.file.write_all(&bytes[..bytes.len() / 2])?;
            }
            return Err(error);
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Gives a file or a folder another name.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    check("rename", to)?;
    fs::rename(from, to)?;
    #[cfg(debug_assertions)]
    faults::renamed(from, to);
    Ok(())
}

/// Makes a folder in a folder that is there.
pub fn create_dir(path: &Path) -> io::Result<()> {
    check("mkdir", path)?;
    fs::create_dir(path)
}

/// Makes a folder and those above it, as far as they are not there.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    check("mkdir", path)?;
    fs::create_dir_all(path)
}

/// Removes a file.
pub fn remove_file(path: &Path) -> io::Result<()> {
    check("remove", path)?;
    fs::remove_file(path)
}

/// Removes a folder with all that is in it; none is as good as a removed one.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    check("remove", path)?;
    fs::remove_dir_all(path)
}

/// Brings a file that somebody else wrote to the disk.
pub fn sync_file(path: &Path) -> io::Result<()> {
    check("sync", path)?;
    fs::File::open(path)?.sync_all()?;
    #[cfg(debug_assertions)]
    faults::synced(path);
    Ok(())
}

/// Makes a folder's names last. Where a folder cannot be opened as a file, the file system is left to itself.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    check("sync", path)?;
    if cfg!(unix) { fs::File::open(path)?.sync_all() } else { Ok(()) }
}

#[cfg(debug_assertions)]
fn check(call: &'static str, path: &Path) -> io::Result<()> {
    faults::check(call, path).map_err(|(error, _)| error)
}

#[cfg(not(debug_assertions))]
#[inline(always)]
fn check(_: &'static str, _: &Path) -> io::Result<()> {
    Ok(())
}

/// Faults on demand: the n-th call that this thread makes through this module goes wrong. Only in builds with debug
/// assertions.
#[cfg(debug_assertions)]
pub mod faults {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io;
    use std::path::{Path, PathBuf};

    /// What becomes of a call.
    #[derive(Debug, Clone, Copy)]
    pub enum Fault {
        /// It does nothing and fails; the calls after it work.
        Error(io::ErrorKind),
        /// A write brings half of its bytes and finds the disk full; any other call does nothing and says the same.
        Torn,
        /// A write brings half of its bytes; then this call and all after it fail, as if the process had died there.
        Crash,
        /// The function runs before the call, which works.
        Run(fn()),
    }

    #[derive(Default)]
    struct State {
        plan: Option<(usize, Fault)>,
        calls: Vec<(&'static str, PathBuf)>,
        dead: bool,
        /// Files written to since they were synced, and how much of them is on the disk for sure.
        loose: BTreeMap<PathBuf, u64>,
    }

    thread_local! {
        static STATE: RefCell<State> = RefCell::default();
    }

    /// From now on calls of this thread are counted from 0, and call number `at` goes wrong.
    pub fn plan(at: usize, fault: Fault) {
        STATE.with_borrow_mut(|state| *state = State { plan: Some((at, fault)), ..State::default() });
    }

    /// Ends the plan; the calls made since it was given, by name and path.
    pub fn end() -> Vec<(&'static str, PathBuf)> {
        STATE.with_borrow_mut(|state| std::mem::take(state).calls)
    }

    /// Ends the plan as a loss of power would: what was written and not synced is cut off.
    pub fn end_without_power() -> Vec<(&'static str, PathBuf)> {
        let state = STATE.with_borrow_mut(std::mem::take);
        for (path, kept) in &state.loose {
            if let Ok(file) = std::fs::File::options().write(true).open(path)
                && file.metadata().is_ok_and(|found| found.len() > *kept)
            {
                file.set_len(*kept).expect("the file can be cut");
            }
        }
        state.calls
    }

    /// Counts a call; the error that it must give, and whether a write brings half of its bytes.
    pub(super) fn check(call: &'static str, path: &Path) -> Result<(), (io::Error, bool)> {
        let run = STATE.with_borrow_mut(|state| {
            let Some((at, fault)) = state.plan else { return Ok(None) };
            let number = state.calls.len();
            state.calls.push((call, path.to_path_buf()));
            let died = |what: &str| io::Error::other(format!("injected: {what}"));
            if state.dead {
                return Err((died("the process is dead"), false));
            }
            match fault {
                _ if number != at => Ok(None),
                Fault::Run(run) => Ok(Some(run)),
                Fault::Error(kind) => Err((kind.into(), false)),
                Fault::Torn => Err((io::ErrorKind::StorageFull.into(), true)),
                Fault::Crash => {
                    state.dead = true;
                    Err((died("the process dies"), true))
                }
            }
        })?;
        run.into_iter().for_each(|run| run());
        Ok(())
    }

    pub(super) fn write(path: &Path) -> Result<(), (io::Error, bool)> {
        let outcome = check("write", path);
        STATE.with_borrow_mut(|state| {
            if state.plan.is_some() && (outcome.is_ok() || outcome.as_ref().is_err_and(|(_, torn)| *torn)) {
                let now = std::fs::metadata(path).map_or(0, |found| found.len());
                state.loose.entry(path.to_path_buf()).or_insert(now);
            }
        });
        outcome
    }

    pub(super) fn synced(path: &Path) {
        STATE.with_borrow_mut(|state| state.loose.remove(path));
    }

    pub(super) fn renamed(from: &Path, to: &Path) {
        STATE.with_borrow_mut(|state| {
            let moved = |path: &PathBuf| {
                path.strip_prefix(from).map(|rest| if rest == Path::new("") { to.into() } else { to.join(rest) })
            };
            state.loose = std::mem::take(&mut state.loose)
                .into_iter()
                .map(|(path, kept)| (moved(&path).unwrap_or(path), kept))
                .collect();
        });
    }
}
