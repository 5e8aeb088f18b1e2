//! Files that are mapped for a whole run, looked at again now and then: they must be as they were.
//!
//! What another program writes into a mapped file is seen by the run at once, without an error; what it cuts off is a
//! SIGBUS. Size, time and place of a file tell of both, at the moments when a run looks: before its first step, before
//! each evaluation and before each checkpoint.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::{Error, Result};

/// Files and what they were.
#[derive(Debug)]
pub struct Watch {
    files: Vec<(PathBuf, Look)>,
}

/// What a file looks like from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Look {
    size: u64,
    written: Option<SystemTime>,
    /// Device and number on Unix: a file that was replaced by another of its name is another file.
    place: (u64, u64),
}

impl Watch {
    /// Takes note of files.
    ///
    /// # Errors
    /// [`Error::Input`] where one is not there.
    pub fn start<'p>(files: impl IntoIterator<Item = &'p Path>) -> Result<Self> {
        let noted =
            |path: &Path| Ok((path.to_path_buf(), Look::at(path).map_err(|error| Error::reading(path, error))?));
        Ok(Self { files: files.into_iter().map(noted).collect::<Result<_>>()? })
    }

    /// Holds the files against what they were.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first that changed, and how.
    pub fn check(&self) -> Result<()> {
        for (path, then) in &self.files {
            let how = match Look::at(path) {
                Err(error) => error.to_string(),
                Ok(now) if now == *then => continue,
                Ok(now) if now.size != then.size => format!("{} bytes then, {} now", then.size, now.size),
                Ok(now) if now.place != then.place => "another file has its name".into(),
                Ok(_) => "it was written to".into(),
            };
            return Err(Error::input(format!(
                "{}: this file changed while the run used it ({how}); what was computed since the last checkpoint is \
                 dropped; put the file back as it was, see that nothing writes to it, and --resume",
                path.display()
            )));
        }
        Ok(())
    }
}

impl Look {
    fn at(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        #[cfg(unix)]
        let place = {
            use std::os::unix::fs::MetadataExt;
            (found.dev(), found.ino())
        };
        #[cfg(not(unix))]
        let place = (0, 0);
        Ok(Self { size: found.len(), written: found.modified().ok(), place })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_change_is_found_and_named() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("model.safetensors"), folder.path().join("other"));
        fs::write(&other, "abcd").expect("written");
        type Change = fn(&Path, &Path);
        let changes: [(Change, &str); 5] = [
            (|path, _| fs::write(path, "abc").expect("written"), "4 bytes then, 3 now"),
            (|path, _| fs::write(path, "abcde").expect("written"), "4 bytes then, 5 now"),
            (
                |path, _| {
                    let file = fs::File::options().write(true).open(path).expect("open");
                    file.set_modified(SystemTime::now() + Duration::from_secs(9)).expect("a later time");
                },
                "it was written to",
            ),
            (|path, other| fs::rename(other, path).expect("renamed"), "changed while the run used it ("),
            (|path, _| fs::remove_file(path).expect("removed"), "No such file"),
        ];
        for (change, how) in changes {
            fs::write(&path, "abcd").expect("written");
            let watch = Watch::start([path.as_path()])?;
            watch.check()?;
            change(&path, &other);
            let error = watch.check().expect_err(how);
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains("model.safetensors: this file changed"), "{error}");
            assert!(!cfg!(unix) || error.to_string().contains(how), "{error}");
        }
        Ok(())
    }
}
