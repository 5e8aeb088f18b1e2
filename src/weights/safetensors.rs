//! One safetensors file, memory-mapped and checked in full before a byte of it is used.
//!
//! The format (github.com/huggingface/safetensors): a u64 length, a JSON header of that length, the tensors' bytes.
//! The checks go beyond the format's own crate, which lets the last of two equal keys win and takes any name.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::dtype::DType;
use super::mapped::MappedFile;
use super::unique::UniqueMap;
use crate::{Error, Result, outside};

/// Most bytes of a header: room for 100,000 tensors. The format allows 100 MB; what a reader holds of a header is a
/// few times its size, and the largest one that was seen has 2 MB.
const MAX_HEADER: u64 = 16 << 20;
/// The one key that is no tensor.
const METADATA: &str = "__metadata__";
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;
/// Most bytes of a name.
const MAX_NAME: usize = 1024;

/// An open file; its tensors are read from the map, where and when they are used.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Arc<MappedFile>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number format.
    pub dtype: Stored,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes within the file.
    pub range: Range<usize>,
}

/// A number format of the file format; not all of them are read as weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// One that weights are read from.
    Float(DType),
    /// Another one, by its name in the header.
    Other(&'static str),
}

impl SafetensorsFile {
    /// Opens and checks a file. The map stays valid only while nobody shortens the file.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and, where there is one, the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, length) = outside::open(path)?;
        if length < 8 {
            return Err(bad(path, format!("it holds {length} bytes, less than a header's length; download it again")));
        }
        let map = MappedFile::new(file, path).map_err(|e| Error::reading(path, e))?;
        if let Some(other) = other_kind(&map) {
            return Err(bad(path, other.to_string()));
        }
        let (entries, metadata) = parse(&map).map_err(|reason| bad(path, format!("{reason}; fetch the file again")))?;
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), entries, metadata })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The header's free-form `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of a tensor, aligned to nothing; `None` where there is no such tensor.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entries.get(name).map(|entry| &self.map[entry.range.clone()])
    }

    /// The map, to be held by whoever reads from it.
    pub(super) fn map(&self) -> &Arc<MappedFile> {
        &self.map
    }
}

/// Formats that are no weights by themselves, and their bytes.
const OTHERS: [(&str, usize); 16] = [
    ("BOOL", 1),
    ("U8", 1),
    ("I8", 1),
    ("F8_E4M3", 1),
    ("F8_E5M2", 1),
    ("F8_E8M0", 1),
    ("F8_E4M3FNUZ", 1),
    ("F8_E5M2FNUZ", 1),
    ("U16", 2),
    ("I16", 2),
    ("U32", 4),
    ("I32", 4),
    ("U64", 8),
    ("I64", 8),
    ("F64", 8),
    ("C64", 8),
];

impl Stored {
    /// The format of a name in the header, with its size in bytes. Formats under a byte are not known here.
    pub(super) fn parse(name: &str) -> Option<(Self, usize)> {
        if let Some(dtype) = [DType::F32, DType::F16, DType::BF16].into_iter().find(|d| d.safetensors_name() == name) {
            return Some((Self::Float(dtype), dtype.size()));
        }
        OTHERS.into_iter().find(|(other, _)| *other == name).map(|(other, size)| (Self::Other(other), size))
    }

    /// The name in the header, and the bytes of an element.
    pub fn name_and_size(self) -> (&'static str, usize) {
        match self {
            Self::Float(dtype) => (dtype.safetensors_name(), dtype.size()),
            Self::Other(name) => (name, OTHERS.iter().find(|(other, _)| *other == name).map_or(1, |(_, size)| *size)),
        }
    }
}

impl From<DType> for Stored {
    fn from(dtype: DType) -> Self {
        Self::Float(dtype)
    }
}

type Parsed = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Checks the whole layout: `Err` says what is wrong.
fn parse(file: &[u8]) -> std::result::Result<Parsed, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err("it is shorter than a header's length".into());
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("its header claims {length} bytes, over the {MAX_HEADER} of any; is it safetensors?"));
    }
    if length > rest.len() as u64 {
        return Err(format!("its header claims {length} bytes of {}; the file is cut short", rest.len()));
    }
    let (header, data) = rest.split_at(length as usize);
    let data_start = 8 + header.len();
    let header = std::str::from_utf8(header).map_err(|e| format!("its header is not UTF-8: {e}"))?;
    let header: Header = serde_json::from_str(header).map_err(|e| format!("its header is not as it should be: {e}"))?;

    let mut entries = BTreeMap::new();
    for (name, tensor) in header.tensors {
        check_name(&name)?;
        let [start, end] = tensor.data_offsets;
        if start > end || end > data.len() as u64 {
            let held = data.len();
            return Err(format!("tensor {name:?}: offsets {start}..{end} do not lie within the {held} bytes of data"));
        }
        let Some((dtype, size)) = Stored::parse(&tensor.dtype) else {
            return Err(format!("tensor {name:?}: the dtype {:?} is not known", tensor.dtype));
        };
        let shape = tensor.shape.0.as_slice();
        let bytes = shape.iter().try_fold(size as u64, |n, dim| n.checked_mul(*dim));
        if bytes != Some(end - start) {
            let held = end - start;
            return Err(format!("tensor {name:?}: {} of shape {shape:?} does not fill its {held} bytes", tensor.dtype));
        }
        // A dimension can be larger than memory where another one is 0.
        let Ok(shape) = shape.iter().map(|dim| usize::try_from(*dim)).collect() else {
            return Err(format!("tensor {name:?}: shape {shape:?} is beyond this machine"));
        };
        let range = data_start + start as usize..data_start + end as usize;
        entries.insert(name, Entry { dtype, shape, range });
    }

    let mut spans: Vec<(&String, &Range<usize>)> = entries.iter().map(|(name, entry)| (name, &entry.range)).collect();
    spans.sort_by_key(|(_, range)| (range.start, range.end));
    let mut at = data_start;
    for (name, range) in spans {
        match range.start {
            start if start < at => return Err(format!("tensor {name:?} overlaps the tensor before it")),
            start if start > at => return Err(format!("{} bytes before tensor {name:?} belong to none", start - at)),
            _ => at = range.end,
        }
    }
    if at != file.len() {
        return Err(format!("{} bytes after the last tensor belong to none", file.len() - at));
    }
    Ok((entries, header.metadata))
}

/// Names end in messages and in other files: nothing that a terminal does not show as it is, nothing that leads out of
/// a folder on any system.
fn check_name(name: &str) -> std::result::Result<(), String> {
    let unseen = |c: char| {
        c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
    };
    let improper = name.contains("..") || name.contains(['/', '\\', ':']) || name.contains(unseen);
    if name.is_empty() || name.len() > MAX_NAME || improper {
        return Err(format!("tensor {name:?} has no proper name"));
    }
    Ok(())
}

fn bad(path: &Path, reason: String) -> Error {
    Error::input(format!("{}: {reason}", path.display()))
}

/// What the first bytes show to be something else, and what to do.
fn other_kind(file: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", PICKLE),
        (b"\x80\x02", PICKLE),
        (b"\x80\x04", PICKLE),
        (b"\x80\x05", PICKLE),
        (b"GGUF", "it is GGUF under another name; give it its own ending, .gguf, and name the file"),
        (b"version https://git-lfs", "it is a pointer of git-lfs, not the weights; run `git lfs pull` in its folder"),
        (b"<", "it is a web page, not the weights; fetch the file again, by its download address"),
    ];
    const PICKLE: &str = "it is a pickle under another name, which can run code when it is read and is refused; convert \
                          it in Python: save_pretrained(OUT, safe_serialization=True)";
    // A header of the length that such a start would be is over any limit, or, after a pickle's two bytes, is none.
    let starts = |start: &[u8]| file.starts_with(start) && file.get(8) != Some(&b'{');
    KINDS.iter().find(|(start, _)| starts(start)).map(|(_, kind)| *kind)
}

struct Header {
    tensors: BTreeMap<String, RawEntry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Shape,
    data_offsets: [u64; 2],
}

/// The dimensions, [`MAX_DIMENSIONS`] at most: a list of millions is refused where it passes them.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = list.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(A::Error::custom(format!("a shape of more than {MAX_DIMENSIONS} dimensions")));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let (mut tensors, mut metadata) = (BTreeMap::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            if tensors.contains_key(&key) || (key == METADATA && metadata.is_some()) {
                return Err(A::Error::custom(format!("the key {key:?} stands twice")));
            }
            if key == METADATA {
                metadata = Some(map.next_value::<UniqueMap<String>>()?.0);
            } else {
                tensors.insert(key, map.next_value()?);
            }
        }
        Ok(Header { tensors, metadata: metadata.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and so many bytes of data.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn refusal(header: &str, data: usize) -> String {
        parse(&file(header, data)).expect_err(header)
    }

    fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    #[test]
    fn a_good_file_is_read_in_any_order_of_its_entries() {
        let header = format!(
            r#"{{"b":{},"__metadata__":{{"format":"pt"}},"a":{},"none":{}}}"#,
            tensor("BF16", "[2,3]", "[4,16]"),
            tensor("F32", "[]", "[0,4]"),
            tensor("I64", "[0,5]", "[4,4]"),
        );
        let (entries, metadata) = parse(&file(&header, 16)).unwrap();
        let start = 8 + header.len();
        assert_eq!(metadata["format"], "pt");
        assert_eq!(
            entries["b"],
            Entry { dtype: Stored::Float(DType::BF16), shape: vec![2, 3], range: start + 4..start + 16 }
        );
        assert_eq!(entries["a"], Entry { dtype: Stored::Float(DType::F32), shape: vec![], range: start..start + 4 });
        assert_eq!(entries["none"].dtype, Stored::Other("I64"));
    }

    #[test]
    fn the_reference_writer_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let data: Vec<u8> = (0..24).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &data).unwrap();
        safetensors::serialize_to_file([("w", view)], Some([("k".into(), "v".into())].into()), &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.bytes("w").unwrap(), data);
        assert_eq!(file.bytes("v"), None);
        assert_eq!(file.metadata()["k"], "v");
    }

    #[test]
    fn lying_headers_are_refused() {
        let good = tensor("F32", "[2]", "[0,8]");
        let cases = [
            (format!(r#"{{"a":{good},"a":{good}}}"#), 8, "stands twice"),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "stands twice"),
            (r#"{"__metadata__":{"k":"1","k":"2"}}"#.into(), 0, "stands twice"),
            (r#"{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, "duplicate field"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}}"#.into(), 8, "unknown field"),
            (r#"{"a":{"dtype":"F32","shape":[2]}}"#.into(), 8, "missing field"),
            (r#"{"__metadata__":{"k":1}}"#.into(), 0, "invalid type"),
            ("[]".into(), 0, "an object of tensors"),
            (r#"{"a":"#.into(), 0, "EOF"),
            (format!(r#"{{"a":{good}}} {{}}"#), 8, "trailing"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[0,9]")), 8, "do not lie within"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[8,0]")), 8, "do not lie within"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[-8,0]")), 8, "invalid value"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[0,8,8]")), 8, "trailing characters"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[3]", "[0,8]")), 8, "does not fill"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[4294967296,4294967296]", "[0,0]")), 0, "does not fill"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[18446744073709551616]", "[0,0]")), 0, "invalid type"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2.0]", "[0,8]")), 8, "invalid type"),
            (format!(r#"{{"a":{}}}"#, tensor("Q4", "[8]", "[0,8]")), 8, "is not known"),
            (format!(r#"{{"a":{good},"b":{}}}"#, tensor("F32", "[2]", "[4,12]")), 12, "overlaps"),
            (format!(r#"{{"a":{good},"b":{good}}}"#), 8, "overlaps"),
            (format!(r#"{{"a":{good},"b":{}}}"#, tensor("F32", "[2]", "[12,20]")), 20, "belong to none"),
            (format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[4,12]")), 12, "belong to none"),
            (format!(r#"{{"a":{good}}}"#), 9, "1 bytes after the last tensor"),
            (format!(r#"{{"../../x":{good}}}"#), 8, "no proper name"),
            (format!(r#"{{"a\u001b[2J":{good}}}"#), 8, "no proper name"),
            (format!(r#"{{"":{good}}}"#), 8, "no proper name"),
        ];
        for (header, data, reason) in cases {
            let said = refusal(&header, data);
            assert!(said.contains(reason), "{header}: said {said:?}, not {reason:?}");
        }
    }

    #[test]
    fn no_change_of_a_byte_and_no_cut_panics() {
        let header = format!(r#"{{"a":{},"b":{}}}"#, tensor("F32", "[1,2]", "[0,8]"), tensor("F16", "[2]", "[8,12]"));
        let whole = file(&header, 12);
        parse(&whole).unwrap();
        for at in 0..whole.len() {
            assert!(parse(&whole[..at]).is_err(), "cut to {at} bytes");
            for byte in 0..=u8::MAX {
                let mut changed = whole.clone();
                changed[at] = byte;
                if let Ok((entries, _)) = parse(&changed) {
                    assert!(entries.values().all(|entry| changed.get(entry.range.clone()).is_some()));
                }
            }
        }
    }

    #[test]
    fn lying_lengths_are_refused_by_file_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let whole = file(&format!(r#"{{"a":{}}}"#, tensor("F32", "[2]", "[0,8]")), 8);
        let mut not_utf8 = whole.clone();
        not_utf8[10] = 0xff;
        let cases = [
            (Vec::new(), "holds 0 bytes"),
            (whole[..7].to_vec(), "holds 7 bytes"),
            (whole[..8].to_vec(), "cut short"),
            (whole[..30].to_vec(), "cut short"),
            (whole[..whole.len() - 1].to_vec(), "do not lie within"),
            (u64::MAX.to_le_bytes().to_vec(), "over the 16777216 of any"),
            (100_000_001u64.to_le_bytes().to_vec(), "over the 16777216 of any"),
            (b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "under another name"),
            (not_utf8, "not UTF-8"),
            (0u64.to_le_bytes().to_vec(), "EOF"),
        ];
        for (bytes, reason) in cases {
            std::fs::write(&path, bytes).unwrap();
            let said = SafetensorsFile::open(&path).unwrap_err().to_string();
            assert!(said.contains(reason) && said.contains("weights.safetensors"), "said {said:?}, not {reason:?}");
        }
    }
}
