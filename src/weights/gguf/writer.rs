//! A GGUF file written as a stream: metadata and the tensors' places first, then their bytes as they come.

use std::io::{self, Write};

use super::blocks::GgmlType;

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;

/// The metadata in the making.
#[derive(Debug, Default)]
pub struct Keys {
    bytes: Vec<u8>,
    count: u64,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.count += 1;
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        &mut self.bytes
    }

    /// A u32.
    pub fn size(&mut self, key: &str, value: u32) {
        self.key(key, 4).extend(value.to_le_bytes());
    }

    /// An f32.
    pub fn number(&mut self, key: &str, value: f32) {
        self.key(key, 6).extend(value.to_le_bytes());
    }

    /// A bool.
    pub fn flag(&mut self, key: &str, value: bool) {
        self.key(key, 7).push(value.into());
    }

    /// A text.
    pub fn text(&mut self, key: &str, value: &str) {
        text(self.key(key, 8), value);
    }

    /// A list of texts.
    pub fn texts<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        let bytes = self.key(key, 9);
        bytes.extend(8u32.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| text(bytes, value));
    }

    /// A list of i32.
    pub fn integers(&mut self, key: &str, values: &[i32]) {
        let bytes = self.key(key, 9);
        bytes.extend(5u32.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// A list of f32.
    pub fn numbers(&mut self, key: &str, values: &[f32]) {
        let bytes = self.key(key, 9);
        bytes.extend(6u32.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

fn text(bytes: &mut Vec<u8>, value: &str) {
    bytes.extend((value.len() as u64).to_le_bytes());
    bytes.extend(value.as_bytes());
}

/// A tensor that is to come: its name, its format, its shape (outermost first).
pub type Entry = (String, GgmlType, Vec<usize>);

/// Bytes that the tensors take in the file.
pub fn data_bytes(entries: &[Entry]) -> usize {
    entries.iter().map(|(_, kind, shape)| padded(*kind, shape)).sum()
}

/// A tensor's bytes with those that follow up to the next one.
fn padded(kind: GgmlType, shape: &[usize]) -> usize {
    let (block, size) = kind.block();
    (shape.iter().product::<usize>() / block * size).next_multiple_of(ALIGNMENT)
}

/// Writes one file into `out`.
#[derive(Debug)]
pub struct GgufWriter<W> {
    out: W,
    /// Bytes of the data so far.
    written: usize,
}

impl<W: Write> GgufWriter<W> {
    /// Begins a file with these tensors, in this order.
    ///
    /// # Errors
    /// What `out` says.
    pub fn begin(mut out: W, keys: &Keys, entries: &[Entry]) -> io::Result<Self> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((entries.len() as u64).to_le_bytes());
        header.extend(keys.count.to_le_bytes());
        header.extend(&keys.bytes);
        let mut offset = 0usize;
        for (name, kind, shape) in entries {
            text(&mut header, name);
            header.extend((shape.len() as u32).to_le_bytes());
            header.extend(shape.iter().rev().flat_map(|dim| (*dim as u64).to_le_bytes()));
            header.extend(kind.number().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += padded(*kind, shape);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&header)?;
        Ok(Self { out, written: 0 })
    }

    /// Appends bytes of the current tensor.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Ends the current tensor.
    pub fn end_tensor(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.write(&[0; ALIGNMENT][..padding])
    }
}
