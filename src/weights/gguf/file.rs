//! One GGUF file, memory-mapped and checked in full before a byte of it is used.
//!
//! The layout (ggml's `gguf.h`): magic, version, two counts, the metadata, a description of each tensor, and after
//! padding the tensors' bytes. Refused is all that ggml's own reader refuses; nothing is allocated by a count that the
//! file's size does not bear out.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::blocks::GgmlType;
use super::metadata::{Checked, Cursor, Kind, Metadata, Value};
use crate::weights::mapped::MappedFile;
use crate::{Error, Result, outside};

/// ggml's limit on a tensor's dimensions.
const MAX_DIMS: u32 = 4;
/// ggml's limit on a tensor's name, without its end.
const MAX_NAME: usize = 63;
/// The format's own limit on a key.
const MAX_KEY: usize = 65_535;
/// Where a file does not say to what its tensors are aligned.
const ALIGNMENT: u64 = 32;

/// An open file.
#[derive(Debug)]
pub struct GgufFile {
    metadata: Metadata,
    tensors: BTreeMap<String, GgufTensor>,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its number format.
    pub kind: GgmlType,
    /// Its dimensions, outermost first: the reverse of the file's order.
    pub shape: Vec<usize>,
    /// Its bytes within the file.
    pub range: Range<usize>,
}

impl GgufFile {
    /// Opens and checks a file. The map stays valid only while nobody shortens the file.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and, where there is one, the key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, length) = outside::open(path)?;
        if length == 0 {
            return Err(Error::input(format!("{}: it is empty; fetch the file again", path.display())));
        }
        let map = Arc::new(MappedFile::new(file, path).map_err(|e| Error::reading(path, e))?);
        let (values, tensors) = parse(&map)
            .map_err(|reason| Error::input(format!("{}: {reason}; fetch the file again", path.display())))?;
        Ok(Self { metadata: Metadata { path: path.to_path_buf(), map, values }, tensors })
    }

    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Its tensors by the names in the file.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// The map, to be held by whoever reads from it.
    pub(crate) fn map(&self) -> &Arc<MappedFile> {
        &self.metadata.map
    }
}

type Parsed = (BTreeMap<String, Value>, BTreeMap<String, GgufTensor>);

fn parse(file: &[u8]) -> Checked<Parsed> {
    let mut cursor = Cursor::new(file);
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err("it does not begin with GGUF; is it a GGUF file?".into());
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        1 => return Err("it is of version 1, which no current program reads; use a newer conversion".into()),
        version if version.trailing_zeros() >= 16 && version != 0 => {
            return Err("it is big-endian; use a little-endian conversion".into());
        }
        version => return Err(format!("it is of version {version}; 2 and 3 are read")),
    }
    let (tensors, keys) = (cursor.u64("the count of tensors")?, cursor.u64("the count of keys")?);
    // a description takes at least 8 + 1 + 4 + 8 + 4 + 8 bytes, a key at least 8 + 1 + 4 + 1
    for (count, least, what) in [(tensors, 33, "tensors"), (keys, 14, "keys")] {
        if count > (cursor.left() / least) as u64 {
            return Err(format!("it claims {count} {what} in {} bytes", cursor.left()));
        }
    }

    let mut values = BTreeMap::new();
    for _ in 0..keys {
        let key = cursor.name("a key", MAX_KEY)?;
        let kind = cursor.at;
        let value = cursor.value(&key)?;
        // ggml asks for a u32 and ends the program at another kind
        if key == "general.alignment" && file[kind..kind + 4] != (Kind::U32 as u32).to_le_bytes() {
            return Err("general.alignment is not a u32".into());
        }
        if values.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key:?} stands twice"));
        }
    }
    let alignment = match values.get("general.alignment") {
        None => ALIGNMENT,
        Some(Value::Unsigned(n)) if n.is_power_of_two() => *n,
        Some(_) => return Err("general.alignment is not a power of two".into()),
    };

    let described = (0..tensors).map(|_| tensor(&mut cursor)).collect::<Checked<Vec<_>>>()?;
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let mut at = 0u64;
    let (mut entries, mut seen) = (BTreeMap::new(), HashSet::new());
    for Described { name, kind, shape, bytes, offset } in described {
        if !seen.insert(name.clone()) {
            return Err(format!("the tensor {name:?} stands twice"));
        }
        // as ggml has it: each tensor begins where the one before it ends, padded; so none overlap or leave the file
        if offset != at {
            return Err(format!("tensor {name:?} has the offset {offset} where {at} is due"));
        }
        let end = start.checked_add(at).and_then(|from| from.checked_add(bytes));
        let Some(end) = end.filter(|end| *end <= file.len() as u64) else {
            return Err(format!("tensor {name:?} reaches beyond the file's {} bytes; it is cut short", file.len()));
        };
        entries.insert(name, GgufTensor { kind, shape, range: (end - bytes) as usize..end as usize });
        at = (at + bytes).next_multiple_of(alignment);
    }
    Ok((values, entries))
}

struct Described {
    name: String,
    kind: GgmlType,
    shape: Vec<usize>,
    bytes: u64,
    offset: u64,
}

fn tensor(cursor: &mut Cursor) -> Checked<Described> {
    let name = cursor.name("a tensor's name", MAX_NAME)?;
    let count = cursor.u32(&name)?;
    if count == 0 || count > MAX_DIMS {
        return Err(format!("tensor {name:?} has {count} dimensions; 1 to {MAX_DIMS} are possible"));
    }
    let dims = (0..count).map(|_| cursor.u64(&name)).collect::<Checked<Vec<u64>>>()?;
    let number = cursor.u32(&name)?;
    let kind = GgmlType::of(number).ok_or_else(|| format!("tensor {name:?} has the unknown type {number}"))?;
    let offset = cursor.u64(&name)?;
    let elements = dims.iter().try_fold(1u64, |n, dim| n.checked_mul(*dim)).filter(|n| *n > 0 && *n < 1 << 62);
    let shape: Option<Vec<usize>> = dims.iter().rev().map(|dim| usize::try_from(*dim).ok()).collect();
    let (Some(elements), Some(shape)) = (elements, shape) else {
        return Err(format!("tensor {name:?} has the impossible dimensions {dims:?}"));
    };
    let (block, size) = kind.block();
    if !dims[0].is_multiple_of(block as u64) {
        return Err(format!("tensor {name:?}: rows of {} are not in whole blocks of {block} ({kind})", dims[0]));
    }
    let bytes = (elements / block as u64).checked_mul(size as u64).filter(|bytes| *bytes < 1 << 62);
    let bytes = bytes.ok_or_else(|| format!("tensor {name:?} has the impossible dimensions {dims:?}"))?;
    Ok(Described { name, kind, shape, bytes, offset })
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
