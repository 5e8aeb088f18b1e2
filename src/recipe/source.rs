//! Where a recipe's values come from: the file and `--set`, each value with the place that errors name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Value};

use super::nearest::{key_without_section, listed, unknown_key, unknown_section};
use super::schema::{KEYS, Key, SECTIONS, find};
use crate::{Error, Result};

/// One value that somebody wrote.
pub(super) struct Entry {
    /// Which key it is for.
    pub key: &'static Key,
    /// What was written.
    pub value: Value,
    /// `recipes/hh.toml:12` or `--set train.seed=1`.
    pub place: String,
    /// The places of a list's items.
    pub item_places: Vec<String>,
    /// The folder at which its relative paths start.
    pub folder: PathBuf,
    /// Whether it came from the command line.
    pub typed: bool,
}

/// A recipe's file, taken apart.
pub(super) struct File {
    /// Its values, in the order in which they stand.
    pub entries: Vec<Entry>,
    /// The place to name for a section, or for the file where the section is absent.
    places: BTreeMap<String, String>,
    start: String,
}

impl File {
    /// The place where a key that is missing should have stood.
    pub fn place_of_section(&self, section: &str) -> &str {
        self.places.get(section).unwrap_or(&self.start)
    }
}

/// Takes a recipe's text apart. `path` is named in errors; relative paths start at its folder.
pub(super) fn from_file(path: &Path, text: &str) -> Result<File> {
    let ends: Vec<usize> = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect();
    let at = |offset: usize| format!("{}:{}", path.display(), ends.partition_point(|end| *end < offset) + 1);
    let document = DeTable::parse(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        Error::recipe(format!("{}: not valid TOML: {}", at(offset), error.message().replace('\n', ", ")))
    })?;
    let folder = folder_of(path)?;
    let mut entries = Vec::new();
    let mut places = BTreeMap::new();
    for (section, content) in in_order(document.get_ref()) {
        let place = at(section.span().start);
        let section = section.get_ref().as_ref();
        let DeValue::Table(keys) = content.get_ref() else {
            return Err(fault(&place, value_without_section(section)));
        };
        if !SECTIONS.contains(&section) {
            return Err(fault(&place, unknown_section(section)));
        }
        places.insert(section.to_string(), place);
        for (name, value) in in_order(keys) {
            let place = at(name.span().start);
            let key =
                find(section, name.get_ref()).ok_or_else(|| fault(&place, unknown_key(section, name.get_ref())))?;
            let item_places = match value.get_ref() {
                DeValue::Array(items) => items.iter().map(|item| at(item.span().start)).collect(),
                _ => Vec::new(),
            };
            let value = plain(value.get_ref()).map_err(|message| fault(&place, message))?;
            entries.push(Entry { key, value, place, item_places, folder: folder.clone(), typed: false });
        }
    }
    Ok(File { entries, places, start: at(0) })
}

/// Reads one `--set KEY=VALUE`: the value is TOML, or else a bare string. Relative paths start at `folder`.
pub(super) fn from_argument(argument: &str, folder: &Path) -> Result<Entry> {
    let place = format!("--set {argument}");
    let Some((path, written)) = argument.split_once('=') else {
        return Err(fault(&place, "expected KEY=VALUE, for example `--set train.epochs=2`"));
    };
    let Some((section, name)) = path.trim().split_once('.') else {
        return Err(fault(&place, value_without_section(path.trim())));
    };
    if !SECTIONS.contains(&section) {
        return Err(fault(&place, unknown_section(section)));
    }
    let key = find(section, name).ok_or_else(|| fault(&place, unknown_key(section, name)))?;
    let bare = || Value::String(written.to_string());
    let value = match DeValue::parse(written.trim()) {
        Err(_) => bare(),
        Ok(value) if key.kind.is_text() && !value.get_ref().is_str() => bare(),
        Ok(value) => plain(value.get_ref()).map_err(|message| fault(&place, message))?,
    };
    let items = value.as_array().map_or(0, Vec::len);
    Ok(Entry { key, value, item_places: vec![place.clone(); items], place, folder: folder.into(), typed: true })
}

/// An unusable recipe: the place and what is wrong there.
pub(super) fn fault(place: &str, message: impl AsRef<str>) -> Error {
    Error::recipe(format!("{place}: {}", message.as_ref()))
}

/// The folder of a file as an absolute path without links, so that a leading `..` can be taken off by name.
fn folder_of(path: &Path) -> Result<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    folder.canonicalize().map_err(|error| Error::recipe(format!("{}: {error}", folder.display())))
}

/// What is wrong with `name = value` outside all sections, or `--set name=value`.
fn value_without_section(name: &str) -> String {
    if !SECTIONS.contains(&name) {
        return key_without_section(name);
    }
    let keys: Vec<_> = KEYS.iter().filter(|key| key.section == name).map(|key| key.name).collect();
    format!("`{name}` is a section, not a value; it holds {}: write `{name}.{} = …`", listed(&keys), keys[0])
}

/// A table's entries as they stand in the file, so that the first error reported is the first one written.
fn in_order<'t, 'i>(table: &'t DeTable<'i>) -> Vec<(&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

fn plain(value: &DeValue) -> std::result::Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => Value::Integer(
            i64::from_str_radix(number.as_str(), number.radix())
                .map_err(|_| format!("{number} is too large; whole numbers end at {}", i64::MAX))?,
        ),
        DeValue::Float(number) => Value::Float(number.as_str().parse().map_err(|_| format!("{number} is no number"))?),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(date) => Value::Datetime(*date),
        DeValue::Array(items) => {
            Value::Array(items.iter().map(|item| plain(item.get_ref())).collect::<std::result::Result<_, _>>()?)
        }
        DeValue::Table(table) => Value::Table(
            table
                .iter()
                .map(|(key, value)| Ok((key.get_ref().to_string(), plain(value.get_ref())?)))
                .collect::<std::result::Result<_, String>>()?,
        ),
    })
}
