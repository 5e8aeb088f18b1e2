//! The hidden name under which a thing is written until it is whole: one writer at a time.
//!
//! Its writer holds a lock on the file or folder itself (`flock`), which the system takes back when the process ends,
//! however it ends. So what stands under such a name without a lock was left by a dead process, and goes. Nothing is
//! locked where the system or the file system knows no such locks, and on Windows, where no folder can be opened and
//! what is locked cannot be renamed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::disk;

/// A thing in the making. Dropped before it has been renamed, it leaves nothing.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    renamed: bool,
    _lock: Option<fs::File>,
}

impl Part {
    /// Makes it with `make`; what a dead process left at `path` is removed first.
    ///
    /// # Errors
    /// Where another process writes there, and what the system says.
    pub fn create(path: PathBuf, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<Self> {
        let left = leftover(&path)?;
        remove(&path)?;
        match make(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(held()),
            made => made?,
        }
        // another one that began may have taken it for a dead one's
        let gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { held() } else { error };
        let lock = lock(&path).map_err(gone)?;
        drop(left);
        Ok(Self { path, renamed: false, _lock: lock })
    }

    /// Where it is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it into its place.
    pub fn rename(&mut self, to: &Path) -> io::Result<()> {
        disk::rename(&self.path, to)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // once renamed, what stands there is another's
        if !self.renamed {
            // Best effort: the error that matters came before.
            let _ = remove(&self.path);
        }
    }
}

/// A lock on what a dead process left at `path`, as long as it is looked at; none where there is nothing.
///
/// # Errors
/// Where a living one writes there.
pub fn leftover(path: &Path) -> io::Result<Option<fs::File>> {
    match lock(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        outcome => outcome,
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => disk::remove_dir_all(path),
        Ok(_) => disk::remove_file(path),
    }
}

fn held() -> io::Error {
    io::Error::new(io::ErrorKind::WouldBlock, "another process is writing it; wait for its end, or name another place")
}

/// Locks what stands at `path`.
#[cfg(unix)]
fn lock(path: &Path) -> io::Result<Option<fs::File>> {
    use std::os::unix::fs::MetadataExt;

    let file = fs::File::open(path)?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => return Err(held()),
        Err(fs::TryLockError::Error(_)) => return Ok(None),
        Ok(()) => {}
    }
    // its writer may have put it into its place, or another one cleared it away, since it was opened
    let place = |found: fs::Metadata| (found.dev(), found.ino());
    match fs::metadata(path).map(place) {
        Ok(there) if there == place(file.metadata()?) => Ok(Some(file)),
        _ => Err(held()),
    }
}

#[cfg(not(unix))]
fn lock(_: &Path) -> io::Result<Option<fs::File>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &Path) -> io::Result<Part> {
        Part::create(path.to_path_buf(), disk::create_dir)
    }

    fn file(path: &Path) -> io::Result<Part> {
        Part::create(path.to_path_buf(), |path| disk::File::create_new(path).map(drop))
    }

    /// Locks are between open files, so that two in one process are as two processes.
    #[cfg(unix)]
    #[test]
    fn one_at_a_time_writes_and_what_a_dead_one_left_goes() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(".out.incomplete");
        let makes: [fn(&Path) -> io::Result<Part>; 2] = [folder, file];
        for (first, second) in [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(first, second)| (makes[first], makes[second])) {
            let mut living = first(&path).unwrap();
            assert_eq!(second(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert!(path.exists(), "it stays the first one's");
            // a dead process removes nothing
            living.renamed = true;
            drop(living);
            assert!(path.exists());
            drop(second(&path).unwrap());
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_another_began_under_the_name_is_not_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(".out.incomplete");
        let mut first = folder(&path).unwrap();
        first.rename(&place.path().join("out")).unwrap();
        let second = folder(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
