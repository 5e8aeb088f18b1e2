//! Files of rows: one JSON object a line, plain or gzip, read line by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::{Error, Result, recipe};

/// Longest line in bytes: a row's text is held in memory whole.
const MAX_LINE: u64 = 16 << 20;
/// A packed file may unpack to so many bytes, and beyond them to so many times its size: rows of text reach 10 times,
/// gzip at most 1032.
const MAX_UNPACKED: u64 = 32 << 20;
const MAX_RATIO: u64 = 100;

/// The files that `patterns` name, in the order given; those of one glob in the order of their names, hidden ones
/// only where it begins their names with a dot. A name that
/// exists is taken as it stands, whatever characters it has.
///
/// # Errors
/// [`Error::Input`] where a pattern matches no file or is none.
pub fn expand(patterns: &[String]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for pattern in patterns {
        let path = Path::new(pattern);
        if path.exists() || !pattern.contains(['*', '?', '[']) {
            files.push(path.to_owned());
            continue;
        }
        let matches =
            recipe::matches(pattern).map_err(|error| Error::input(format!("{pattern}: not a glob: {error}")))?;
        let before = files.len();
        for found in matches {
            let found = found.map_err(|error| Error::input(format!("{pattern}: cannot be searched: {error}")))?;
            if found.is_file() {
                files.push(found);
            }
        }
        if files.len() == before {
            return Err(Error::input(format!("{pattern}: no file matches; correct the pattern or the folder")));
        }
    }
    Ok(files)
}

/// The lines of one file that hold something, each with its number from 1.
pub struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    number: u32,
}

impl Lines {
    /// Opens a file; gzip is told by its first two bytes, whatever its name.
    ///
    /// # Errors
    /// [`Error::Input`] where it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            let size = file.metadata()?.len();
            let mut file = BufReader::new(file);
            let reader: Box<dyn BufRead> = match file.fill_buf()? {
                [b'P', b'A', b'R', b'1', ..] => {
                    return Err(std::io::Error::other(
                        "it is a Parquet file; save its rows as JSON lines (datasets.load_dataset(…)[\"train\"].to_json(…))",
                    ));
                }
                [0x1f, 0x8b, ..] => {
                    let left = MAX_UNPACKED.max(size.saturating_mul(MAX_RATIO));
                    Box::new(BufReader::new(Unpacked { reader: MultiGzDecoder::new(file), left }))
                }
                _ => Box::new(file),
            };
            Ok(reader)
        };
        let reader = open().map_err(|error| Error::reading(path, error))?;
        Ok(Self { path: path.to_owned(), reader, number: 0 })
    }

    /// The next line without its end, a byte order mark taken off the first; nothing at the end of the file.
    fn read_line(&mut self) -> Result<Option<String>> {
        let at = |number: u32, what: String| Error::input(format!("{}:{number}: {what}", self.path.display()));
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE + 1).read_until(b'\n', &mut line);
        let number =
            self.number.checked_add(1).ok_or_else(|| at(self.number, "too many lines; split the file".into()))?;
        match read {
            Err(error) => return Err(at(number, format!("cannot be read on: {error}; fetch or pack the file again"))),
            Ok(0) => return Ok(None),
            Ok(length) if length as u64 > MAX_LINE => {
                return Err(at(
                    number,
                    format!("a line of more than {MAX_LINE} bytes; rows are one JSON object a line"),
                ));
            }
            Ok(_) => {}
        }
        if number == 1 && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3);
        }
        let end = line.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r')).map_or(0, |last| last + 1);
        line.truncate(end);
        let text = String::from_utf8(line).map_err(|_| at(number, "not UTF-8 text; save the file as UTF-8".into()))?;
        self.number = number;
        Ok(Some(text))
    }
}

/// Bytes from a packed file, no more of them than is `left`.
struct Unpacked<R> {
    reader: R,
    left: u64,
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            std::io::Error::other(format!(
                "it unpacks to more than {MAX_RATIO} times its size, as no text does; if it is what you want, unpack \
                 it with gunzip and name that file"
            ))
        })?;
        Ok(read)
    }
}

impl Iterator for Lines {
    type Item = Result<(u32, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.read_line() {
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => return Some(Ok((self.number, line))),
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn lines(bytes: &[u8]) -> Result<Vec<(u32, String)>> {
        let (_folder, path) = file("rows.jsonl", bytes);
        Lines::open(&path)?.collect()
    }

    #[test]
    fn blank_lines_count_but_are_not_rows() {
        let expected = [(1, "{\"a\": 1}".to_owned()), (4, "b".to_owned()), (5, "ü".to_owned())];
        assert_eq!(lines("\u{feff}{\"a\": 1}\r\n\n \t\r\nb\nü".as_bytes()).unwrap(), expected);
        assert_eq!(lines(b"").unwrap(), []);
    }

    #[test]
    fn gzip_is_told_by_its_bytes() {
        assert_eq!(lines(&gzip(b"a\nb\n")).unwrap(), [(1, "a".to_owned()), (2, "b".to_owned())]);
        // Members one after the other are one text, as gunzip has it.
        assert_eq!(lines(&[gzip(b"a\n"), gzip(b"b\n")].concat()).unwrap().len(), 2);
    }

    #[test]
    fn bad_files_name_the_line() {
        let cut = gzip(&b"0123456789abcdef\n".repeat(1000));
        for (bytes, says) in [
            (&b"ok\n\xff\xfe\n"[..], "rows.jsonl:2: not UTF-8"),
            (&cut[..cut.len() - 9], "cannot be read on"),
            (&vec![b'x'; MAX_LINE as usize + 1], "rows.jsonl:1: a line of more than"),
        ] {
            let error = lines(bytes).unwrap_err();
            assert!(error.exit_code() == 3 && error.to_string().contains(says), "{error}");
        }
        let error = Lines::open(Path::new("/nowhere/rows.jsonl")).err().unwrap();
        assert!(error.to_string().contains("/nowhere/rows.jsonl: cannot be read"), "{error}");
    }

    #[test]
    fn globs_are_sorted_and_names_taken_as_they_stand() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.jsonl", "c[1].jsonl", ".b.jsonl"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let path = |name: &str| folder.path().join(name);
        let pattern = |name: &str| path(name).to_string_lossy().into_owned();
        let all = expand(&[pattern("c[1].jsonl"), pattern("[ab].jsonl"), pattern("missing.jsonl")]).unwrap();
        assert_eq!(all, [path("c[1].jsonl"), path("a.jsonl"), path("b.jsonl"), path("missing.jsonl")]);
        // what an editor or a copy left half-done is hidden, and is no data
        assert_eq!(expand(&[pattern("*b.jsonl")]).unwrap(), [path("b.jsonl")]);
        assert_eq!(expand(&[pattern(".*.jsonl")]).unwrap(), [path(".b.jsonl")]);
        assert!(expand(&[pattern("z*.jsonl")]).unwrap_err().to_string().contains("no file matches"));
    }
}
