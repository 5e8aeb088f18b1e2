//! Files from outside: regular files, no larger than their kind ever is, and JSON that takes no more memory than it
//! may.
//!
//! A value of parsed JSON takes some 100 bytes of memory and as few as two of the file, so the values are counted
//! before any of them is built.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Largest JSON file of a model or an adapter but `tokenizer.json`, in bytes. The index of a model of 1T parameters
/// has 15 MB.
pub(crate) const MAX_JSON: u64 = 64 << 20;
/// Most values in one JSON text that is parsed as a whole: their memory then stays below 64 MiB. The index of a model
/// of 1T parameters has 150,000.
const MAX_VALUES: usize = 300_000;

/// Opens a regular file; a pipe or a device would be read without end. Its length comes with it.
///
/// # Errors
/// [`Error::Input`] that names the file.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    // Looked at before it is opened: opening a pipe waits for its other end.
    let about = std::fs::metadata(path).map_err(|error| Error::reading(path, error))?;
    if !about.is_file() {
        let shown = path.display();
        return Err(Error::input(format!("{shown}: not a regular file; put the file itself in its place")));
    }
    let file = File::open(path).map_err(|error| Error::reading(path, error))?;
    Ok((file, about.len()))
}

/// The bytes of a file that has at most `most` of them.
///
/// # Errors
/// [`Error::Input`] that names the file.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    let mut bytes = Vec::new();
    if length <= most {
        bytes.reserve_exact(length as usize);
        file.take(most + 1).read_to_end(&mut bytes).map_err(|error| Error::reading(path, error))?;
    }
    let length = length.max(bytes.len() as u64);
    if length > most {
        let shown = path.display();
        return Err(Error::input(format!(
            "{shown}: {length} bytes, and no such file has more than {most}; fetch the file again"
        )));
    }
    Ok(bytes)
}

/// As [`read`], as text.
pub(crate) fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|_| Error::input(format!("{}: not UTF-8 text; fetch the file again", path.display())))
}

/// JSON as a `T`; what is wrong with it in words.
pub(crate) fn json<T: DeserializeOwned>(text: &[u8]) -> std::result::Result<T, String> {
    let values = values(text);
    if values > MAX_VALUES {
        return Err(format!("it holds {values} values, and {MAX_VALUES} at most are read"));
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

/// How many values a JSON text has at most: each stands after a comma or an opening bracket, outside of texts.
fn values(text: &[u8]) -> usize {
    let (mut values, mut within, mut escaped) = (1, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            b',' | b'[' | b'{' if !within => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_of_texts() {
        assert_eq!(values(b"3"), 1);
        assert_eq!(values(br#"{"a,[{": [1, 2, "\",,"], "b": {}}"#), 7);
    }

    #[test]
    fn as_many_values_as_fit_are_read() {
        let list = |n: usize| format!("[{}0]", "0,".repeat(n - 2));
        let parsed: serde_json::Value = json(list(MAX_VALUES).as_bytes()).unwrap();
        assert_eq!(parsed.as_array().unwrap().len(), MAX_VALUES - 1);
        let said = json::<serde_json::Value>(list(MAX_VALUES + 1).as_bytes()).unwrap_err();
        assert!(said.contains("300001 values, and 300000 at most"), "{said}");
    }

    #[test]
    fn only_regular_files_of_their_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        std::fs::write(&file, "12345").unwrap();
        assert_eq!(read_text(&file, 5).unwrap(), "12345");
        assert!(read(&file, 4).unwrap_err().to_string().contains("5 bytes, and no such file has more than 4"));
        assert!(read(folder.path(), 4).unwrap_err().to_string().contains("not a regular file"));
        #[cfg(unix)]
        assert!(read(Path::new("/dev/zero"), 4).unwrap_err().to_string().contains("not a regular file"));
        assert!(read(&folder.path().join("none"), 4).unwrap_err().to_string().contains("no such file"));
    }
}
