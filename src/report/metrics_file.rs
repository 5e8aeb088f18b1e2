//! `metrics.jsonl`: one JSON object a line, on disk as soon as its step is done.

use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::store::disk::File;
use crate::{Error, Result};

/// The file, open at its end; one that was [opened](MetricsFile::open), once it was rewound.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsFile {
    /// Starts the file at `path` anew.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| Error::writing(path, error))?;
        Ok(Self { path: path.to_path_buf(), file, bytes: 0 })
    }

    /// Opens the file at `path`, to go on after its first `bytes` once [`MetricsFile::rewind`] took the rest away.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not that long.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::reading(path, error))?;
        let found = file.size().map_err(|error| Error::reading(path, error))?;
        if found < bytes {
            return Err(Error::input(format!(
                "{}: {found} bytes long, but the checkpoint was taken after {bytes}: rows are missing; restore the file or \
                 start the run anew",
                path.display()
            )));
        }
        Ok(Self { path: path.to_path_buf(), file, bytes })
    }

    /// Takes away what an opened file holds behind the bytes that stay: rows of steps after the checkpoint, which will
    /// be taken again.
    pub fn rewind(&mut self) -> Result<()> {
        let cut = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::Start(self.bytes)));
        cut.map(drop).map_err(|error| Error::writing(&self.path, error))
    }

    /// Appends one row, handed to the system as a whole line. After a failure no further row may follow.
    pub fn append(&mut self, row: &Value) -> Result<()> {
        let line = format!("{row}\n");
        self.file.write_all(line.as_bytes()).map_err(|error| Error::writing(&self.path, error))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Brings the rows to the disk: before a checkpoint that counts on them.
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|error| Error::writing(&self.path, error))
    }

    /// Bytes written so far: a checkpoint's cursor.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The rows of the file at `path`, one after the other: a long run's are too many to hold. A last line without its end,
/// left by a crash, is no row.
pub fn rows(path: &Path) -> Result<impl Iterator<Item = Result<Value>>> {
    let mut file = BufReader::new(std::fs::File::open(path).map_err(|error| Error::reading(path, error))?);
    let (mut number, mut line) = (0, String::new());
    Ok(std::iter::from_fn(move || {
        line.clear();
        number += 1;
        match file.read_line(&mut line) {
            Ok(_) if !line.ends_with('\n') => None,
            Ok(_) => Some(
                serde_json::from_str(&line)
                    .map_err(|error| Error::input(format!("{}:{number}: not a JSON object: {error}", path.display()))),
            ),
            Err(error) => Some(Err(Error::reading(path, error))),
        }
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_resumed_file_equals_the_uninterrupted_one() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let (whole, cut) = (folder.path().join("whole.jsonl"), folder.path().join("cut.jsonl"));
        let rows =
            [json!({"step": 1, "loss": 0.5}), json!({"step": 2, "loss": 0.25}), json!({"step": 3, "loss": 0.125})];
        let mut file = MetricsFile::create(&whole)?;
        rows.iter().try_for_each(|row| file.append(row))?;

        let mut file = MetricsFile::create(&cut)?;
        file.append(&rows[0])?;
        let cursor = file.bytes();
        file.append(&json!({"step": 2, "loss": "of a run that crashed"}))?;
        drop(file);
        let mut file = MetricsFile::open(&cut, cursor)?;
        file.rewind()?;
        rows[1..].iter().try_for_each(|row| file.append(row))?;
        assert_eq!(std::fs::read(&whole).expect("read"), std::fs::read(&cut).expect("read"));
        assert_eq!(super::rows(&cut)?.collect::<Result<Vec<_>>>()?, rows);
        Ok(())
    }

    #[test]
    fn a_file_shorter_than_its_checkpoint_is_refused() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsFile::create(&path)?;
        file.append(&json!({"step": 1}))?;
        let error = MetricsFile::open(&path, file.bytes() + 1).expect_err("too short");
        assert!(error.to_string().contains("rows are missing"), "{error}");
        assert_eq!(error.exit_code(), 3);
        Ok(())
    }

    #[test]
    fn a_torn_last_line_is_no_row_and_a_bad_line_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\n{\"st").expect("written");
        let read = || rows(&path).expect("rows").collect::<Result<Vec<_>>>();
        assert_eq!(read().expect("rows"), [json!({"step": 1})]);
        std::fs::write(&path, "{\"step\":1}\nstep 2\n").expect("written");
        let error = read().expect_err("a bad line").to_string();
        assert!(error.contains("metrics.jsonl:2:"), "{error}");
    }
}
