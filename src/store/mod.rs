//! Writing so that a file or a folder is either whole or absent, whenever the power goes.
//!
//! A thing is written under a hidden name beside its place (`part.rs`), synced, and renamed into place. A folder also
//! gets `manifest.json`, the size and SHA-256 of each file, written last, by which [`verify`] knows it again. A crash
//! between the two renames by which a folder takes another's place is made up for by [`recover`].
//!
//! Every change goes through [`disk`], where tests let each call fail in turn; [`space`] knows how much room there is.

pub mod disk;
mod part;
pub mod space;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::outside::{self, MAX_JSON};
use crate::{Error, Result, sha256};
use part::Part;

/// The name of a folder's list of files.
pub const MANIFEST: &str = "manifest.json";

/// A file in the making, without a buffer. Dropped before [`NewFile::finish`], it leaves nothing.
#[derive(Debug)]
pub struct NewFile {
    target: PathBuf,
    part: Part,
    file: disk::File,
}

impl NewFile {
    /// Begins a file that will stand at `path`, in place of what stands there. What an earlier attempt left is removed.
    ///
    /// # Errors
    /// [`Error::Run`], also where another process is writing it; [`Error::Resource`] on a full disk.
    pub fn create_atomic(path: &Path) -> Result<Self> {
        let part = hidden(path, "incomplete")?;
        let create = || {
            let part = Part::create(part, |part| disk::File::create_new(part).map(drop))?;
            let file = disk::File::open(part.path())?;
            Ok(Self { target: path.to_path_buf(), part, file })
        };
        create().map_err(|e: io::Error| Error::writing(path, e))
    }

    /// Brings the bytes to the disk and puts the file into its place.
    ///
    /// # Errors
    /// As [`NewFile::create_atomic`]; nothing is left behind.
    pub fn finish(self) -> Result<()> {
        let Self { target, mut part, file } = self;
        let mut finish = || {
            file.sync()?;
            part.rename(&target)?;
            disk::sync_dir(parent(&target))
        };
        finish().map_err(|e| Error::writing(&target, e))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes a file through `fill`; until that has returned and the bytes are on disk, `path` is as it was.
///
/// # Errors
/// As [`NewFile::create_atomic`]; nothing is left behind.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut BufWriter<NewFile>) -> io::Result<()>) -> Result<()> {
    let writing = |e| Error::writing(path, e);
    let mut file = BufWriter::new(NewFile::create_atomic(path)?);
    fill(&mut file).map_err(writing)?;
    file.into_inner().map_err(|e| writing(e.into_error()))?.finish()
}

/// Writes a text, as [`write_atomic`] does.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomic(path, |file| file.write_all(text.as_bytes()))
}

/// A folder in the making. Dropped before [`Folder::finish`], it leaves nothing.
#[derive(Debug)]
pub struct Folder {
    target: PathBuf,
    part: Part,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// By name, with `/` between the names of folders.
    files: BTreeMap<String, Stamp>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    size: u64,
    sha256: String,
}

impl Folder {
    /// Begins a folder that will stand at `path`, in place of what stands there. Parents are made; what an earlier
    /// attempt left is removed.
    ///
    /// # Errors
    /// [`Error::Run`], also where another process is writing it; [`Error::Resource`] on a full disk.
    pub fn create_atomic(path: &Path) -> Result<Self> {
        let part = hidden(path, "incomplete")?;
        let writing = |e| Error::writing(path, e);
        disk::create_dir_all(parent(path)).map_err(writing)?;
        let left = part::leftover(&part).map_err(writing)?;
        recover(path)?;
        drop(left);
        let part = Part::create(part, disk::create_dir).map_err(writing)?;
        Ok(Self { target: path.to_path_buf(), part })
    }

    /// Where the files are to be written.
    pub fn path(&self) -> &Path {
        self.part.path()
    }

    /// Syncs every file, writes the manifest, and puts the folder into its place.
    pub fn finish(self) -> Result<()> {
        let Self { target, mut part } = self;
        let old = hidden(&target, "replaced")?;
        let mut finish = || {
            let mut files = BTreeMap::new();
            for name in list(part.path())? {
                let path = part.path().join(&name);
                disk::sync_file(&path)?;
                files.insert(name, stamp(&path)?);
            }
            let text = serde_json::to_string_pretty(&Manifest { files })? + "\n";
            let mut manifest = disk::File::create(&part.path().join(MANIFEST))?;
            manifest.write_all(text.as_bytes())?;
            manifest.sync()?;
            disk::sync_dir(part.path())?;
            // A folder cannot be renamed over another one: the old one steps aside first.
            let replaces = target.exists();
            if replaces {
                disk::remove_dir_all(&old)?;
                disk::rename(&target, &old)?;
            }
            if let Err(failed) = part.rename(&target) {
                if replaces {
                    // Best effort: where this fails too, `recover` does it.
                    let _ = disk::rename(&old, &target);
                }
                return Err(failed);
            }
            disk::sync_dir(parent(&target))?;
            disk::remove_dir_all(&old)
        };
        finish().map_err(|e| Error::writing(&target, e))
    }
}

/// Makes up for a crash in the middle of [`Folder::finish`]: where nothing stands at `path`, the new folder takes its
/// place if all of it is on disk, or else the old one comes back.
///
/// # Errors
/// [`Error::Run`] where a folder cannot be renamed or removed.
pub fn recover(path: &Path) -> Result<()> {
    let (part, old) = (hidden(path, "incomplete")?, hidden(path, "replaced")?);
    let recover = || {
        if !path.exists() && verify(&part).is_ok() {
            disk::rename(&part, path)?;
        } else if !path.exists() && old.exists() {
            disk::rename(&old, path)?;
        }
        disk::remove_dir_all(&old)
    };
    recover().map_err(|e: io::Error| Error::writing(path, e))
}

/// Removes a folder, where there is one. It is renamed first: removal is not atomic, and half a folder must not look
/// like a whole one. What an earlier removal left goes too.
///
/// # Errors
/// [`Error::Run`] where it cannot be renamed or removed.
pub fn remove_folder(path: &Path) -> Result<()> {
    let doomed = hidden(path, "removed")?;
    let remove = || {
        disk::remove_dir_all(&doomed)?;
        if path.exists() {
            disk::rename(path, &doomed)?;
        }
        disk::remove_dir_all(&doomed)
    };
    remove().map_err(|error| Error::writing(path, error))
}

/// Holds a folder's files against its manifest. Files that the manifest does not name are not looked at.
///
/// # Errors
/// [`Error::Input`] naming the first file that is missing or differs.
pub fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(MANIFEST);
    let manifest: Manifest = outside::json(&outside::read(&path, MAX_JSON)?)
        .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
    for (name, stated) in &manifest.files {
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::input(format!("{}: {name:?} does not lie in this folder", path.display())));
        }
        let file = folder.join(name);
        let length = outside::open(&file)?.1;
        if length != stated.size || stamp(&file).map_err(|e| Error::reading(&file, e))? != *stated {
            return Err(Error::input(format!(
                "{}: it is not what {MANIFEST} says was written; the file was changed or damaged, use another copy",
                file.display()
            )));
        }
    }
    Ok(())
}

/// `.NAME.suffix` beside `path`.
fn hidden(path: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::run(format!("{}: this is no name to write to", path.display())));
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden.push(suffix);
    Ok(path.with_file_name(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The files of a folder and of the folders in it, sorted.
fn list(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().map_err(|_| io::Error::other("a file's name is not UTF-8"))?;
        if entry.file_type()?.is_dir() {
            names.extend(list(&entry.path())?.into_iter().map(|inner| format!("{name}/{inner}")));
            disk::sync_dir(&entry.path())?;
        } else {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let mut hash = Sha256::new();
    let size = sha256::add(&mut hash, path)?;
    Ok(Stamp { size, sha256: sha256::hex(&hash.finalize()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        list(folder).unwrap()
    }

    #[test]
    fn a_file_is_old_or_new_and_never_half() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        write_atomic(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write_atomic(&path, |file| {
            file.write_all(b"ne")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.unwrap_err().exit_code(), 4);
        assert_eq!((fs::read(&path).unwrap(), names(folder.path())), (b"old".to_vec(), vec!["state.json".into()]));
        write_atomic(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(folder.path())), (b"new".to_vec(), vec!["state.json".into()]));
    }

    #[test]
    fn a_folder_appears_whole_with_its_manifest() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("runs/checkpoint-3");
        let folder = Folder::create_atomic(&path).unwrap();
        fs::write(folder.path().join("a"), "abc").unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/b"), "").unwrap();
        assert!(!path.exists());
        folder.finish().unwrap();
        assert_eq!(names(place.path()), ["a", "inner/b", MANIFEST].map(|n| format!("runs/checkpoint-3/{n}")));
        verify(&path).unwrap();
        let manifest = fs::read_to_string(path.join(MANIFEST)).unwrap();
        assert!(manifest.contains("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"), "{manifest}");
    }

    #[test]
    fn a_folder_given_up_leaves_nothing_and_the_old_one_stays() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("adapter");
        for content in ["old", "new"] {
            let folder = Folder::create_atomic(&path).unwrap();
            fs::write(folder.path().join("a"), content).unwrap();
            folder.finish().unwrap();
            let abandoned = Folder::create_atomic(&path).unwrap();
            fs::write(abandoned.path().join("b"), "half").unwrap();
            drop(abandoned);
            assert_eq!(fs::read_to_string(path.join("a")).unwrap(), content);
            assert_eq!(names(place.path()), ["adapter/a", "adapter/manifest.json"]);
        }
    }

    #[test]
    fn a_removed_folder_is_gone_with_what_an_earlier_removal_left() {
        let place = tempfile::tempdir().unwrap();
        for folder in ["adapter", ".adapter.removed"] {
            fs::create_dir(place.path().join(folder)).unwrap();
            fs::write(place.path().join(folder).join("a"), "x").unwrap();
        }
        for _ in 0..2 {
            remove_folder(&place.path().join("adapter")).unwrap();
            assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_a_dead_process_left_is_cleared() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("adapter");
        fs::create_dir(place.path().join(".adapter.incomplete")).unwrap();
        fs::write(place.path().join(".adapter.incomplete/stale"), "x").unwrap();
        let folder = Folder::create_atomic(&path).unwrap();
        folder.finish().unwrap();
        assert_eq!(names(&path), [MANIFEST]);
    }

    #[test]
    fn a_changed_folder_is_not_verified() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("x");
        let folder = Folder::create_atomic(&path).unwrap();
        fs::write(folder.path().join("a"), "abc").unwrap();
        folder.finish().unwrap();
        fs::write(path.join("a"), "abd").unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("changed or damaged"));
        fs::remove_file(path.join("a")).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("cannot be read"));
        fs::write(path.join(MANIFEST), r#"{"files":{"../x":{"size":0,"sha256":""}}}"#).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("does not lie in this folder"));
        fs::write(path.join(MANIFEST), "{}").unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("missing field"));
    }
}
