//! The cache's folders, as every client of the hub shares them:
//!
//! ```text
//! models--OWNER--NAME/
//!   refs/main                    the commit that the branch was at when it was last asked for
//!   blobs/<etag>                 the files' bytes
//!   snapshots/<commit>/<file>    a relative link to a blob
//!   .no_exist/<commit>/<file>    empty: this commit has no such file
//! .locks/models--OWNER--NAME/<etag>.lock
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::repo::{Repo, is_commit};
use crate::{Error, Result};

/// One repository's folder in the cache.
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    /// The folder of `repo` in the cache `root`; nothing is created.
    pub fn new(root: &Path, repo: &Repo) -> Self {
        Self { folder: root.join(repo.folder()), locks: root.join(".locks").join(repo.folder()) }
    }

    /// The commit that `revision` is known to be: itself, or the one kept from the last time.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_string()).filter(|c| is_commit(c))
    }

    /// Keeps the commit that `revision` is at. Written only when it moved: a cache may be read-only.
    pub fn keep_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder.join("refs").join(revision);
        create_parent(&file)?;
        let fresh = PathBuf::from(format!("{}.{}.tmp", file.display(), std::process::id()));
        fs::write(&fresh, commit).map_err(|e| Error::writing(&fresh, e))?;
        fs::rename(&fresh, &file).map_err(|e| Error::writing(&file, e))
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Where the bytes of an etag lie.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Whether the commit is known to have no such file.
    pub fn is_known_absent(&self, commit: &str, file: &str) -> bool {
        self.no_exist(commit, file).exists()
    }

    /// Keeps that the commit has no such file, so that it is not asked for again.
    pub fn keep_absent(&self, commit: &str, file: &str) -> Result<()> {
        let mark = self.no_exist(commit, file);
        if mark.exists() {
            return Ok(());
        }
        create_parent(&mark)?;
        fs::write(&mark, "").map_err(|e| Error::writing(&mark, e))
    }

    fn no_exist(&self, commit: &str, file: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit).join(file)
    }

    /// The lock that the clients hold while they write a blob; `waiting` is called where another holds it. Where the
    /// file system has no locks there is none: a blob is checked before it gets its name.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| Error::writing(&path, e))?;
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            waiting();
            let _ = file.lock();
        }
        Ok(file)
    }

    /// Makes `file` of `commit` show the blob.
    pub fn link(&self, etag: &str, commit: &str, file: &str) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(file);
        if pointer.exists() {
            return Ok(pointer);
        }
        create_parent(&pointer)?;
        // a link whose blob is gone
        let _ = fs::remove_file(&pointer);
        let up = "../".repeat(2 + file.matches('/').count());
        match symlink(&format!("{up}blobs/{etag}"), &self.blob(etag), &pointer) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::writing(&pointer, e)),
            _ => Ok(pointer),
        }
    }
}

/// A relative link, so that the cache can be moved.
#[cfg(unix)]
fn symlink(relative: &str, _blob: &Path, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, pointer)
}

/// A link where this account may make links, else a copy, as the Python client does.
#[cfg(not(unix))]
fn symlink(relative: &str, blob: &Path, pointer: &Path) -> io::Result<()> {
    #[cfg(windows)]
    if std::os::windows::fs::symlink_file(relative.replace('/', "\\"), pointer).is_ok() {
        return Ok(());
    }
    let _ = relative;
    fs::copy(blob, pointer).map(|_| ())
}

/// Creates the folder that `path` is to lie in.
pub(super) fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(|e| Error::writing(folder, e)),
        None => Ok(()),
    }
}
