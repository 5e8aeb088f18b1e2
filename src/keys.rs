//! JSON objects from outside whose values are taken by key and type; every complaint names the file and the key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result, outside};

/// No size in a model's or an adapter's config is larger; products of two of them stay within 64 bits.
const MAX_SIZE: u64 = 1 << 24;

/// Reads a file that should hold one object.
pub(crate) fn object_file(path: &Path) -> Result<Map<String, Value>> {
    let text = outside::read(path, outside::MAX_JSON)?;
    outside::json(&text)
        .map_err(|e| Error::input(format!("{}: not a JSON object: {e}; fetch the file again", path.display())))
}

/// An object and where it stands. A value of `null` counts as absent.
#[derive(Clone)]
pub(crate) struct Keys<'a> {
    path: PathBuf,
    /// The dotted path of the object within the file.
    under: String,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The whole object of a file.
    pub fn of(path: &Path, map: &'a Map<String, Value>) -> Self {
        Self { path: path.to_path_buf(), under: String::new(), map }
    }

    /// A complaint about a key.
    pub fn bad(&self, key: &str, reason: &str) -> Error {
        Error::input(format!("{}: {}{key}: {reason}", self.path.display(), self.under))
    }

    pub fn missing(&self, key: &str) -> Error {
        self.bad(key, "it is missing")
    }

    /// The value of a key, `null` included.
    pub fn raw(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    /// The value of a key as `take` reads it; `what` names the type that it should have.
    pub fn typed<T>(&self, key: &str, what: &str, take: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let wrong = |value: &Value| self.bad(key, &format!("{value} is not {what}"));
        let stated = self.raw(key).filter(|value| !value.is_null());
        stated.map(|value| take(value).ok_or_else(|| wrong(value))).transpose()
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a text", Value::as_str)
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a positive number", positive)
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, &format!("a whole number from 1 to {MAX_SIZE}"), size)
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// The object of a key; an empty one counts as absent.
    pub fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        let object = self.typed(key, "an object", Value::as_object)?.filter(|map| !map.is_empty());
        Ok(object.map(|map| Keys { path: self.path.clone(), under: format!("{}{key}.", self.under), map }))
    }

    /// The keys in the file's order.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }
}

/// A number above 0 that f32 can hold.
fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| *number > 0.0 && (*number as f32).is_finite())
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|size| (1..=MAX_SIZE).contains(size)).map(|size| size as usize)
}
