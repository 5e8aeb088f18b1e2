//! Weights that are mapped for a whole run, looked at again now and then: they must be as they were.
//!
//! What another program writes into a mapped file is seen by the run at once, without an error; what it cuts off is a
//! SIGBUS. Size and time of the open file tell of both, at the moments when a run looks: before its first step, before
//! each evaluation and before each checkpoint. A file that was removed, or that another took the name of, lives on in
//! the map: once a run is under way, that is said and no more.

use std::fs::{self, File, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::{Error, Result};

/// Files and what they were.
#[derive(Debug)]
pub struct Watch {
    files: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    /// Open, so that it can be looked at whatever becomes of its name.
    file: File,
    then: Look,
    /// Whether its name leads elsewhere, and that was said.
    gone: bool,
}

/// What a file looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Look {
    size: u64,
    written: Option<SystemTime>,
}

impl Watch {
    /// Takes note of files.
    ///
    /// # Errors
    /// [`Error::Input`] where one is not there.
    pub fn start<'p>(files: impl IntoIterator<Item = &'p Path>) -> Result<Self> {
        Ok(Self { files: files.into_iter().map(Watched::start).collect::<Result<_>>()? })
    }

    /// Holds the files against what they were, before a run begins: what has another time or lies elsewhere by now may
    /// not be what was fingerprinted.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first that changed, and how.
    pub fn unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|watched| match watched.look()? {
            now if now != watched.then => Err(watched.changed("it was written to")),
            _ if !watched.has_its_name() => Err(watched.changed("it was replaced or removed")),
            _ => Ok(()),
        })
    }

    /// Holds the files against what they were, while a run uses them. Where a time alone is another, `same_bytes` is
    /// asked whether the bytes are not. Of a file that was replaced or removed `note` is told, once: the map still has
    /// it.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first that changed, and how.
    pub fn check(&mut self, same_bytes: impl Fn() -> bool, note: impl Fn(&str)) -> Result<()> {
        for watched in &mut self.files {
            // before the bytes are read: what is written meanwhile is seen the next time
            let now = watched.look()?;
            if now != watched.then && !same_bytes() {
                return Err(watched.changed("it was written to"));
            }
            watched.then = now;
            if !watched.gone && !watched.has_its_name() {
                watched.gone = true;
                note(&format!(
                    "warning: {}: this file was replaced or removed while the run uses it; the run goes on with \
                     the file as it was, and its adapter belongs to that one: to --resume or to merge, put it back",
                    watched.path.display()
                ));
            }
        }
        Ok(())
    }
}

impl Watched {
    fn start(path: &Path) -> Result<Self> {
        let reading = |error| Error::reading(path, error);
        let file = File::open(path).map_err(reading)?;
        let then = Look::of(&file.metadata().map_err(reading)?);
        Ok(Self { path: path.to_path_buf(), file, then, gone: false })
    }

    /// What it looks like now, as long as it has its size: another one is refused at once.
    fn look(&self) -> Result<Look> {
        let now = self.file.metadata().map_err(|error| self.changed(&error.to_string()))?;
        match now.len() == self.then.size {
            true => Ok(Look::of(&now)),
            false => Err(self.changed(&format!("{} bytes then, {} now", self.then.size, now.len()))),
        }
    }

    /// Whether its name still leads to it.
    fn has_its_name(&self) -> bool {
        match (fs::metadata(&self.path), self.file.metadata()) {
            (Ok(named), Ok(open)) => place(&named) == place(&open),
            _ => false,
        }
    }

    fn changed(&self, how: &str) -> Error {
        Error::input(format!(
            "{}: this file changed while the run used it ({how}); what was computed since the last checkpoint is \
             dropped; put the file back as it was, see that nothing writes to it, and --resume",
            self.path.display()
        ))
    }
}

impl Look {
    fn of(file: &Metadata) -> Self {
        Self { size: file.len(), written: file.modified().ok() }
    }
}

/// Device and number on Unix: a file that was replaced by another of its name is another file.
#[cfg(unix)]
fn place(file: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (file.dev(), file.ino())
}

#[cfg(not(unix))]
fn place(_: &Metadata) -> (u64, u64) {
    (0, 0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    fn written(content: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors");
        fs::write(&path, content).expect("written");
        (folder, path)
    }

    fn touch(path: &Path) {
        let file = File::options().write(true).open(path).expect("open");
        file.set_modified(SystemTime::now() + Duration::from_secs(9)).expect("a later time");
    }

    #[track_caller]
    fn refused(outcome: Result<()>, how: &str) {
        let error = outcome.expect_err(how);
        assert_eq!(error.exit_code(), 3);
        assert!(
            error.to_string().contains(&format!("model.safetensors: this file changed while the run used it ({how}"))
        );
    }

    #[test]
    fn a_change_in_place_is_found_and_named() -> Result<()> {
        type Change = fn(&Path);
        let changes: [(Change, &str); 3] = [
            (|path| fs::write(path, "abc").expect("written"), "4 bytes then, 3 now"),
            (|path| fs::write(path, "abcde").expect("written"), "4 bytes then, 5 now"),
            (touch, "it was written to"),
        ];
        for (change, how) in changes {
            let (_folder, path) = written("abcd");
            let mut watch = Watch::start([path.as_path()])?;
            watch.unchanged()?;
            watch.check(|| panic!("nothing changed"), |note| panic!("{note}"))?;
            change(&path);
            refused(watch.unchanged(), how);
            refused(watch.check(|| false, |_| ()), how);
        }
        Ok(())
    }

    #[test]
    fn the_same_bytes_at_another_time_are_looked_at_once() -> Result<()> {
        let (_folder, path) = written("abcd");
        let mut watch = Watch::start([path.as_path()])?;
        touch(&path);
        watch.check(|| true, |note| panic!("{note}"))?;
        watch.check(|| panic!("it has this time already"), |note| panic!("{note}"))
    }

    #[cfg(unix)]
    #[test]
    fn what_lost_its_name_is_said_once_and_still_watched() -> Result<()> {
        type Change = fn(&Path);
        let changes: [Change; 2] = [
            |path| {
                fs::write(path.with_extension("new"), "another").expect("written");
                fs::rename(path.with_extension("new"), path).expect("renamed");
            },
            |path| fs::remove_file(path).expect("removed"),
        ];
        for change in changes {
            let (_folder, path) = written("abcd");
            let mut watch = Watch::start([path.as_path()])?;
            let open = File::options().write(true).open(&path).expect("open");
            change(&path);
            refused(watch.unchanged(), "it was replaced or removed");
            let said = Cell::new(0);
            let note = |note: &str| {
                assert!(note.contains("model.safetensors: this file was replaced or removed"), "{note}");
                said.set(said.get() + 1);
            };
            watch.check(|| panic!("it was not written to"), note)?;
            watch.check(|| panic!("it was not written to"), note)?;
            assert_eq!(said.get(), 1);
            open.set_len(3).expect("cut");
            refused(watch.check(|| true, |_| ()), "4 bytes then, 3 now");
        }
        Ok(())
    }
}
