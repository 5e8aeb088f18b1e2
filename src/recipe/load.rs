//! From a recipe's file and `--set` to a [`Recipe`], and back to text.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use toml::{Table, Value};

use super::schema::{Absent, KEYS};
use super::source::{Entry, fault, from_argument, from_file};
use super::{Recipe, combination, paths, value};
use crate::{Error, Result};

/// The resolved recipe's name in a run's folder.
pub const RESOLVED: &str = "recipe.toml";

/// Largest recipe in bytes; a thousand files of rows are named in a tenth of it.
const MAX_TEXT: u64 = 1 << 20;

impl Recipe {
    /// Reads a recipe, with `set` (each `KEY=VALUE`, the last of a key wins) over it and the defaults under it. All
    /// that it names on this machine must be there.
    ///
    /// # Errors
    /// [`Error::Recipe`]: the first thing that is wrong, with its file and line (or its `--set`), what was expected
    /// and, for a name, the nearest right one.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        read(path, set, true)
    }

    /// Reads the resolved recipe in a run's folder, as [`Recipe::load`] does, but what it names need not be there
    /// any more: the rows are not needed to generate or to export. What `set` names must be there.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn load_run(folder: &Path, set: &[String]) -> Result<Self> {
        read(&folder.join(RESOLVED), set, false)
    }

    /// The recipe as TOML, every default written out. It loads again as an equal recipe.
    pub fn to_toml(&self) -> String {
        // Fails only for whole numbers above 2^63 - 1 and paths that are not UTF-8; no recipe that was loaded has any.
        toml::to_string(self).expect("a loaded recipe fits TOML")
    }
}

impl super::Model {
    /// The folder, where `base` is one; else `base` is a hub id.
    pub fn folder(&self) -> Option<&Path> {
        Some(Path::new(&self.base)).filter(|path| path.is_absolute())
    }
}

/// Reads a recipe; with `must_exist`, what the file names must be there.
fn read(path: &Path, set: &[String], must_exist: bool) -> Result<Recipe> {
    let text = text_of(path)?;
    let mut file = from_file(path, &text)?;
    let here = std::env::current_dir().and_then(|folder| folder.canonicalize());
    let here = here.map_err(|error| Error::recipe(format!("the current folder cannot be read: {error}")))?;
    let set = set.iter().map(|argument| from_argument(argument, &here)).collect::<Result<Vec<_>>>()?;

    let mut entries = std::mem::take(&mut file.entries);
    entries.extend(set);
    let mut values = defaults(path)?;
    let mut places = Vec::new();
    for mut entry in last_of_each(entries) {
        entry.value = value::checked(entry.key, entry.value).map_err(|message| fault(&entry.place, message))?;
        let must_exist = must_exist || entry.typed;
        paths::resolve(&mut entry, must_exist)?;
        section(&mut values, entry.key.section).insert(entry.key.name.into(), entry.value);
        places.push((entry.key, entry.place));
    }
    for key in KEYS.iter().filter(|key| matches!(key.absent, Absent::Required)) {
        if !section(&mut values, key.section).contains_key(key.name) {
            let message = format!("`{}` is missing; expected {}", key.path(), key.kind.expected());
            return Err(fault(file.place_of_section(key.section), message));
        }
    }
    let recipe: Recipe = Value::Table(values)
        .try_into()
        .map_err(|error: toml::de::Error| Error::recipe(format!("{}: {}", path.display(), error.message())))?;
    match combination::clash(&recipe) {
        None => Ok(recipe),
        Some((section, name, message)) => {
            let place = places.iter().find(|(key, _)| key.section == section && key.name == name);
            let place = place.map_or_else(|| file.place_of_section(section), |(_, place)| place);
            Err(fault(place, format!("`{section}.{name}` {message}")))
        }
    }
}

/// The text of a recipe's file, [`MAX_TEXT`] at most.
fn text_of(path: &Path) -> Result<String> {
    let mut text = Vec::new();
    // a pipe is as good as a file, and says nothing of its length
    let read = File::open(path).and_then(|file| file.take(MAX_TEXT + 1).read_to_end(&mut text));
    read.map_err(|error| unreadable(path, &error))?;
    if text.len() as u64 > MAX_TEXT {
        return Err(Error::recipe(format!("{}: no recipe has more than {MAX_TEXT} bytes", path.display())));
    }
    String::from_utf8(text).map_err(|_| unreadable(path, &ErrorKind::InvalidData.into()))
}

/// Of several values for one key, the last: a `--set` replaces what the file says, right or wrong.
fn last_of_each(entries: Vec<Entry>) -> Vec<Entry> {
    let mut kept: Vec<Entry> = Vec::new();
    for entry in entries {
        kept.retain(|earlier| !std::ptr::eq(earlier.key, entry.key));
        kept.push(entry);
    }
    kept
}

fn section<'t>(values: &'t mut Table, name: &str) -> &'t mut Table {
    match values.entry(name).or_insert_with(|| Value::Table(Table::new())) {
        Value::Table(section) => section,
        _ => unreachable!("only sections are inserted"),
    }
}

fn defaults(path: &Path) -> Result<Table> {
    let mut values = Table::new();
    for key in KEYS {
        let value = match key.absent {
            Absent::Required => continue,
            Absent::Default(text) => text.parse().expect("the schema's defaults are TOML"),
            Absent::RunsAndStem => {
                let stem = path.file_stem().and_then(|stem| stem.to_str());
                let stem = stem.ok_or_else(|| Error::recipe(format!("{}: its name is not UTF-8", path.display())))?;
                Value::String(format!("runs/{stem}"))
            }
        };
        section(&mut values, key.section).insert(key.name.into(), value);
    }
    Ok(values)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    let path_text = path.display();
    Error::recipe(match error.kind() {
        std::io::ErrorKind::NotFound => match paths::neighbour(path) {
            Some(name) => format!("{path_text}: there is no such recipe; did you mean `{name}`?"),
            None => format!("{path_text}: there is no such recipe"),
        },
        std::io::ErrorKind::InvalidData => format!("{path_text}: is not UTF-8 text; expected a TOML recipe"),
        _ if path.is_dir() => format!("{path_text}: is a folder; expected a recipe's file"),
        _ => format!("{path_text}: cannot be read: {error}"),
    })
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
