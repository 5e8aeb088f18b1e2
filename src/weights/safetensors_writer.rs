//! A safetensors file written as a stream: the header from the shapes alone, then each tensor as its bytes come.

use std::fmt::Write as _;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::safetensors::Stored;
use crate::store::disk::File;
use crate::{Error, Result};

/// Writes one file. The same entries and bytes give the same file, byte for byte.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: BufWriter<File>,
    /// Name and bytes of each tensor, in file order.
    entries: Vec<(String, usize)>,
    /// Which entry is being written, and how much of it has been.
    at: (usize, usize),
}

impl SafetensorsWriter {
    /// Begins a file with these tensors, in this order, and this free-form metadata. Readers want a tensor's offset
    /// to be a multiple of its element's size: f32 tensors go before 16-bit ones.
    ///
    /// # Errors
    /// [`Error::Run`], or [`Error::Resource`] on a full disk.
    pub fn create<T: Copy + Into<Stored>>(
        path: &Path,
        entries: &[(String, T, Vec<usize>)],
        metadata: &[(&str, &str)],
    ) -> Result<Self> {
        let (header, entries) = header(entries, metadata);
        let writing = |e| Error::writing(path, e);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(writing)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(writing)?;
        file.write_all(header.as_bytes()).map_err(writing)?;
        Ok(Self { path: path.to_path_buf(), file, entries, at: (0, 0) })
    }

    /// Appends bytes to tensor `name`, which is the one that is next or already begun.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        while self.entries.get(self.at.0).is_some_and(|(next, size)| next != name && *size == self.at.1) {
            self.at = (self.at.0 + 1, 0);
        }
        match self.entries.get(self.at.0) {
            Some((next, size)) if next == name && bytes.len() <= size - self.at.1 => {}
            next => {
                let shown = self.path.display();
                return Err(Error::run(format!(
                    "{shown}: {name:?} was written out of turn or over its size; {next:?}"
                )));
            }
        }
        self.at.1 += bytes.len();
        self.file.write_all(bytes).map_err(|e| Error::writing(&self.path, e))
    }

    /// Ends the file and brings it to the disk. Every byte that the header promises must have been written.
    pub fn finish(self) -> Result<()> {
        let (entry, written) = self.at;
        let rest = self.entries.iter().skip(entry).map(|(_, size)| size).sum::<usize>() - written;
        if rest != 0 {
            return Err(Error::run(format!("{}: {rest} bytes were never written", self.path.display())));
        }
        let end = |file: BufWriter<File>| file.into_inner().map_err(|e| e.into_error())?.sync();
        end(self.file).map_err(|e| Error::writing(&self.path, e))
    }
}

/// The header, filled up with spaces so that the data start at a multiple of 8, and the size of each tensor.
fn header<T: Copy + Into<Stored>>(
    tensors: &[(String, T, Vec<usize>)],
    metadata: &[(&str, &str)],
) -> (String, Vec<(String, usize)>) {
    let quoted = |text: &str| Value::from(text).to_string();
    let metadata: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
    let mut header = format!("{{\"__metadata__\":{{{}}}", metadata.join(","));
    let (mut entries, mut start) = (Vec::with_capacity(tensors.len()), 0);
    for (name, dtype, shape) in tensors {
        let (dtype, element) = (*dtype).into().name_and_size();
        let size = shape.iter().product::<usize>() * element;
        let (name_json, shape, end) = (quoted(name), Value::from(shape.clone()), start + size);
        // Writing to a String cannot fail.
        let _ =
            write!(header, ",{name_json}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}");
        entries.push((name.clone(), size));
        start = end;
    }
    header.push('}');
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    (header, entries)
}

#[cfg(test)]
mod tests {
    use super::super::{DType, SafetensorsFile};
    use super::*;

    fn entries() -> Vec<(String, DType, Vec<usize>)> {
        vec![
            ("a\"b".into(), DType::F32, vec![1, 2]),
            ("none".into(), DType::F32, vec![0, 3]),
            ("c".into(), DType::BF16, vec![3]),
        ]
    }

    #[test]
    fn the_reference_reader_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &entries(), &[("format", "pt")]).unwrap();
        writer.write("a\"b", &[1, 2, 3]).unwrap();
        writer.write("a\"b", &[4, 5, 6, 7, 8]).unwrap();
        writer.write("c", &[9; 6]).unwrap();
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let (start, meta) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((8 + start) % 8, 0);
        assert_eq!(meta.metadata().as_ref().unwrap()["format"], "pt");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("a\"b").unwrap().data(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(file.tensor("c").unwrap().dtype(), safetensors::Dtype::BF16);
        assert_eq!(file.tensor("none").unwrap().shape(), [0, 3]);
        // and so does ours
        let ours = SafetensorsFile::open(&path).unwrap();
        assert_eq!(ours.bytes("c").unwrap(), [9; 6]);
    }

    #[test]
    fn what_the_header_promises_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &entries(), &[]).unwrap();
        assert!(writer.write("c", &[0; 6]).is_err(), "out of turn");
        assert!(writer.write("a\"b", &[0; 9]).is_err(), "too long");
        writer.write("a\"b", &[0; 8]).unwrap();
        assert!(writer.write("d", &[]).is_err(), "unknown");
        let mut writer = SafetensorsWriter::create(&path, &entries(), &[]).unwrap();
        writer.write("a\"b", &[0; 8]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("6 bytes were never written"));
    }
}
