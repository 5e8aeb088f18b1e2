//! A GGUF file's metadata: typed values by key, and the reader that takes them out of untrusted bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A value of a key. Texts and lists stay where they are in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned kind.
    Unsigned(u64),
    /// Any signed kind.
    Signed(i64),
    /// An f32 or f64; an f32 as the shortest decimal that means it, so that 1e-5 stays 1e-5.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Bytes of a text within the file, checked to be UTF-8.
    Text(Range<usize>),
    /// A list of values of one kind.
    List {
        /// What its values are.
        kind: Kind,
        /// How many there are.
        count: usize,
        /// Their bytes within the file.
        range: Range<usize>,
    },
}

/// The kinds of values in a file, by their numbers there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 0
    U8,
    /// 1
    I8,
    /// 2
    U16,
    /// 3
    I16,
    /// 4
    U32,
    /// 5
    I32,
    /// 6
    F32,
    /// 7
    Bool,
    /// 8
    Text,
    /// 9
    List,
    /// 10
    U64,
    /// 11
    I64,
    /// 12
    F64,
}

impl Kind {
    fn of(number: u32) -> Option<Self> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64].get(number as usize).copied()
    }

    /// Bytes of one value; texts and lists have no fixed size.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::List => None,
        }
    }
}

/// What a reader of untrusted bytes says is wrong.
pub(super) type Checked<T> = std::result::Result<T, String>;

/// A place in the file's bytes; every step is checked against their end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    /// The next byte.
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub fn take(&mut self, n: usize, what: &str) -> Checked<&'a [u8]> {
        if n > self.left() {
            return Err(format!("{what} would take {n} bytes where {} are left; the file is cut short", self.left()));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Checked<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    pub fn u32(&mut self, what: &str) -> Checked<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Checked<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A length and so many bytes of UTF-8: their place.
    pub fn text(&mut self, what: &str) -> Checked<Range<usize>> {
        let length = self.u64(what)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let start = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|e| format!("{what} is not UTF-8: {e}"))?;
        Ok(start..self.at)
    }

    /// A text that names something: short, not empty, without control characters.
    pub fn name(&mut self, what: &str, longest: usize) -> Checked<String> {
        let range = self.text(what)?;
        let name = String::from_utf8_lossy(&self.bytes[range]).into_owned();
        if name.is_empty() || name.len() > longest || name.chars().any(char::is_control) {
            let shown: String = name.chars().take(80).collect();
            return Err(format!("{what} {shown:?} is no proper name of at most {longest} bytes"));
        }
        Ok(name)
    }

    fn kind(&mut self, key: &str) -> Checked<Kind> {
        let number = self.u32(key)?;
        Kind::of(number).ok_or_else(|| format!("key {key:?} has the unknown type {number}"))
    }

    /// The value of a key.
    pub fn value(&mut self, key: &str) -> Checked<Value> {
        match self.kind(key)? {
            Kind::Text => self.text(key).map(Value::Text),
            Kind::List => self.list(key),
            kind => self.scalar(kind, key),
        }
    }

    fn list(&mut self, key: &str) -> Checked<Value> {
        let kind = self.kind(key)?;
        let count = self.u64(key)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let start = self.at;
        match (kind, kind.size()) {
            (Kind::List, _) => return Err(format!("key {key:?} is a list of lists, which no reader knows")),
            (Kind::Bool, _) => {
                let flags = self.take(count, key)?;
                if flags.iter().any(|flag| *flag > 1) {
                    return Err(format!("key {key:?} holds a bool that is neither 0 nor 1"));
                }
            }
            (_, Some(size)) => {
                self.take(count.saturating_mul(size), key)?;
            }
            (_, None) => {
                // every text takes its length's 8 bytes: an absurd count ends here and not in a long loop
                if count > self.left() / 8 {
                    return Err(format!("key {key:?} claims {count} texts in {} bytes", self.left()));
                }
                for _ in 0..count {
                    self.text(key)?;
                }
            }
        }
        Ok(Value::List { kind, count, range: start..self.at })
    }

    fn scalar(&mut self, kind: Kind, key: &str) -> Checked<Value> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            Kind::U32 => Value::Unsigned(self.u32(key)?.into()),
            Kind::U64 => Value::Unsigned(self.u64(key)?),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            Kind::F32 => Value::Float(shortest(f32::from_le_bytes(self.array(key)?))),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            Kind::Bool => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(format!("key {key:?} is a bool of {other}, which is neither 0 nor 1")),
            },
            Kind::Text | Kind::List => return Err(format!("key {key:?}: a list within a list")),
        })
    }
}

/// The f64 that reads like this f32.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// All metadata of a file. Complaints name file and key.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub(super) path: PathBuf,
    pub(super) map: std::sync::Arc<crate::weights::mapped::MappedFile>,
    pub(super) values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A complaint about a key.
    pub fn bad(&self, key: &str, reason: &str) -> Error {
        Error::input(format!("{}: {key}: {reason}", self.path.display()))
    }

    /// A complaint about a key that is not there.
    pub fn missing(&self, key: &str) -> Error {
        self.bad(key, "it is missing; the file is not a whole model, fetch another one")
    }

    /// The keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    fn typed<T>(&self, key: &str, what: &str, take: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let taken = |value| {
            take(value).ok_or_else(|| self.bad(key, &format!("it is not {what}; fetch another file of this model")))
        };
        self.value(key).map(taken).transpose()
    }

    /// A whole number that is not negative.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number", unsigned)
    }

    /// A number of any kind.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            _ => None,
        })
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a text", |value| match value {
            Value::Text(range) => std::str::from_utf8(&self.map[range.clone()]).ok(),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of texts", |value| match value {
            Value::List { kind: Kind::Text, count, range } => {
                let mut cursor = Cursor { bytes: &self.map[..range.end], at: range.start };
                (0..*count).map(|_| std::str::from_utf8(&self.map[cursor.text(key).ok()?]).ok()).collect()
            }
            _ => None,
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |value| match value {
            Value::List { kind, count, range } if !matches!(kind, Kind::Text | Kind::List) => {
                let mut cursor = Cursor { bytes: &self.map[..range.end], at: range.start };
                let mut next = || match cursor.scalar(*kind, key).ok()? {
                    Value::Float(number) => Some(number),
                    Value::Unsigned(number) => Some(number as f64),
                    Value::Signed(number) => Some(number as f64),
                    Value::Bool(flag) => Some(f64::from(u8::from(flag))),
                    Value::Text(_) | Value::List { .. } => None,
                };
                (0..*count).map(|_| next()).collect()
            }
            _ => None,
        })
    }
}

/// Counts are u32 in some files and i32 in others.
pub(super) fn unsigned(value: &Value) -> Option<u64> {
    match value {
        Value::Unsigned(number) => Some(*number),
        Value::Signed(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}
