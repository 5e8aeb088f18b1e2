//! Paths in a recipe: where they start, whether they name something, and what was probably meant.
//!
//! What is read starts at the folder of the recipe (or, from the command line, at the current folder) and is made
//! absolute, so that the resolved recipe in the run's folder names the same files. What is written, `run.output`,
//! starts at the current folder and stays as it is, but for a slash at its end.

use std::path::{Component, Path, PathBuf};

use toml::Value;

use super::globs;
use super::nearest::nearest;
use super::schema::Kind;
use super::source::{Entry, fault};

type Named<T> = Result<T, String>;

/// Resolves the paths of an entry that has passed [`super::value::checked`]. With `must_exist`, what they name must
/// be there.
pub(super) fn resolve(entry: &mut Entry, must_exist: bool) -> crate::Result<()> {
    let at = Place { folder: &entry.folder, must_exist };
    let name = entry.key.path();
    let failed = |place: &str, message: String| fault(place, format!("`{name}`: {message}"));
    match (&entry.key.kind, &mut entry.value) {
        (Kind::Rows { .. }, Value::Array(items)) => {
            for (item, place) in items.iter_mut().zip(&entry.item_places) {
                let Value::String(rows) = item else { continue };
                *rows = at.rows(rows).map_err(|message| failed(place, message))?;
            }
            Ok(())
        }
        (kind, Value::String(given)) => {
            let resolved = match kind {
                Kind::Base => at.base(given),
                Kind::Template if given == "auto" || given == "none" => return Ok(()),
                Kind::Template => at.file(given).map_err(|message| format!("{message}; expected {}", kind.expected())),
                Kind::File if !given.is_empty() => at.file(given),
                Kind::Folder if !given.is_empty() => at.folder(given),
                Kind::Output => from_home(given).and_then(output),
                _ => return Ok(()),
            };
            *given = resolved.map_err(|message| failed(&entry.place, message))?;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Where relative paths start, and whether what they name must be there.
struct Place<'a> {
    folder: &'a Path,
    must_exist: bool,
}

impl Place<'_> {
    fn absolute(&self, given: &str) -> Named<PathBuf> {
        Ok(joined(self.folder, &from_home(given)?))
    }

    fn file(&self, given: &str) -> Named<String> {
        let path = self.absolute(given)?;
        if self.must_exist && path.is_dir() {
            return Err(format!("{} is a folder; expected a file", path.display()));
        }
        if self.must_exist && !path.exists() {
            return Err(missing("file", &path));
        }
        utf8(path)
    }

    fn folder(&self, given: &str) -> Named<String> {
        let path = self.absolute(given)?;
        if self.must_exist && path.is_file() {
            return Err(format!("{} is a file; expected a folder", path.display()));
        }
        if self.must_exist && !path.exists() {
            return Err(missing("folder", &path));
        }
        utf8(path)
    }

    /// A folder, or a GGUF file, where the name says so or one is there; else a hub id.
    fn base(&self, given: &str) -> Named<String> {
        let says_folder = Path::new(given).is_absolute()
            || matches!(given, "." | ".." | "~")
            || ["./", "../", "~/"].iter().any(|start| given.starts_with(start));
        if given.to_lowercase().ends_with(".gguf") {
            return self.file(given);
        }
        if says_folder || self.absolute(given)?.exists() {
            return self.folder(given);
        }
        if is_hub_id(given) {
            return Ok(given.into());
        }
        Err(format!("\"{given}\" is neither a hub id like `owner/name` nor a folder in {}", self.folder.display()))
    }

    /// A file, a glob, or a file on the hub.
    fn rows(&self, given: &str) -> Named<String> {
        if let Some(on_hub) = given.strip_prefix("hf://") {
            let parts: Vec<_> = on_hub.splitn(4, '/').collect();
            if parts.len() == 4 && parts[0] == "datasets" && parts.iter().all(|part| !part.is_empty()) {
                return Ok(given.into());
            }
            return Err(format!("\"{given}\" names no file on the hub; expected hf://datasets/OWNER/NAME/PATH"));
        }
        if given.contains("://") {
            return Err(format!(
                "\"{given}\" cannot be read; expected a file, a glob or hf://datasets/OWNER/NAME/PATH (download it first)"
            ));
        }
        let path = self.absolute(given)?;
        if path.exists() || !given.contains(['*', '?', '[']) {
            return self.file(given).map_err(|message| {
                if path.is_dir() { format!("{message} or a glob, for example {given}/*.jsonl") } else { message }
            });
        }
        // The recipe's own folder may hold the signs of a glob.
        let folder = glob::Pattern::escape(&utf8(self.folder.into())?);
        let pattern = utf8(joined(Path::new(&folder), &from_home(given)?))?;
        let mut matches =
            globs::matches(&pattern).map_err(|error| format!("\"{given}\" is no usable glob: {error}"))?;
        if self.must_exist && !matches.any(|entry| entry.is_ok_and(|path| path.is_file())) {
            return Err(format!("no file matches {pattern}"));
        }
        Ok(pattern)
    }
}

/// `~` and `~/…` start at the home folder.
fn from_home(given: &str) -> Named<PathBuf> {
    let Some(rest) = given.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/')) else {
        return Ok(given.into());
    };
    let home = std::env::home_dir().ok_or_else(|| format!("\"{given}\": there is no home folder; write it out"))?;
    Ok(home.join(rest.trim_start_matches('/')))
}

/// `folder/path` without `.` and without leading `..`. `folder` is absolute and holds no links, so a `..` may be
/// taken off by name; one further inside may follow a link and stays.
fn joined(folder: &Path, path: &Path) -> PathBuf {
    let mut joined = folder.to_path_buf();
    let mut leading = true;
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if leading => {
                joined.pop();
            }
            part => {
                leading = false;
                joined.push(part);
            }
        }
    }
    joined
}

/// A hub id as [`crate::hub`] takes it: `owner/name`, of at most 96 characters.
fn is_hub_id(given: &str) -> bool {
    let is_name = |part: &str| {
        let edges = part.starts_with(['.', '-']) || part.ends_with(['.', '-']);
        !part.is_empty() && !edges && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let both = given.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name));
    both && given.len() <= 96 && !given.contains("--") && !given.contains("..")
}

fn missing(what: &str, path: &Path) -> String {
    match neighbour(path) {
        Some(name) => format!("there is no {what} {}; did you mean `{name}`?", path.display()),
        None => format!("there is no {what} {}", path.display()),
    }
}

/// The name beside `path`, which is not there, that is most like its own.
pub(super) fn neighbour(path: &Path) -> Option<String> {
    let folder = path.parent()?;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let names: Vec<_> =
        folder.read_dir().ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    nearest(path.file_name()?.to_str()?, names.iter().map(String::as_str)).map(String::from)
}

/// A folder that can be moved aside: it has a name of its own, and no slash at its end.
fn output(path: PathBuf) -> Named<String> {
    match path.file_name() {
        Some(_) => utf8(path.components().collect()),
        None => Err(format!("{:?} is no name for a folder; expected one like runs/hh", path.display().to_string())),
    }
}

fn utf8(path: PathBuf) -> Named<String> {
    path.into_os_string().into_string().map_err(|path| format!("{} is not UTF-8; rename it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_dots_are_taken_off_and_inner_ones_stay() {
        let at = |path: &str| joined(Path::new("/a/b"), Path::new(path));
        assert_eq!(at("../assets/x"), Path::new("/a/assets/x"));
        assert_eq!(at("./x/./y"), Path::new("/a/b/x/y"));
        assert_eq!(at("x/../y"), Path::new("/a/b/x/../y"));
        assert_eq!(at("/c/d"), Path::new("/c/d"));
    }

    #[test]
    fn an_output_has_a_name_and_no_slash_at_its_end() {
        let output = |path: &str| output(path.into());
        assert_eq!(output("runs/hh/"), Ok("runs/hh".into()));
        assert_eq!(output("/a//b/./"), Ok("/a/b".into()));
        assert_eq!(output("../b"), Ok("../b".into()));
        for nameless in [".", "./", "..", "a/..", "/", ""] {
            assert!(output(nameless).unwrap_err().contains("is no name for a folder"), "{nameless}");
        }
    }

    #[test]
    fn a_base_is_a_folder_where_one_is_there() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("owner/name")).unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let at = Place { folder: folder.path(), must_exist: true };
        let here = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        assert_eq!(at.base("owner/name"), Ok(here("owner/name")));
        assert_eq!(at.base("./owner/name"), Ok(here("owner/name")));
        assert_eq!(at.base("owner/other"), Ok("owner/other".into()));
        assert!(at.base("./ownr").unwrap_err().ends_with("ownr; did you mean `owner`?"));
        assert!(at.base("file").unwrap_err().ends_with("is a file; expected a folder"));
        for no_id in ["a/b/c", "gpt2", &format!("owner/{}", "n".repeat(91))] {
            assert!(at.base(no_id).unwrap_err().contains("neither a hub id like `owner/name` nor a folder"), "{no_id}");
        }
        let longest = format!("owner/{}", "n".repeat(90));
        assert_eq!(at.base(&longest), Ok(longest.clone()));
        std::fs::write(folder.path().join("m.Q4_1.gguf"), "").unwrap();
        assert_eq!(at.base("m.Q4_1.gguf"), Ok(here("m.Q4_1.gguf")));
        assert!(at.base("n.gguf").unwrap_err().contains("no file"));
        let elsewhere = Place { must_exist: false, ..at };
        assert_eq!(elsewhere.base("./ownr"), Ok(here("ownr")));
    }

    #[test]
    fn rows_are_files_globs_or_hub_files() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("odd[1]");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.jsonl"), "").unwrap();
        let at = Place { folder: &folder, must_exist: true };
        assert_eq!(at.rows("a.jsonl"), Ok(folder.join("a.jsonl").to_str().unwrap().to_string()));
        let pattern = at.rows("*.jsonl").unwrap();
        assert_eq!(glob::glob(&pattern).unwrap().count(), 1);
        std::fs::write(folder.join(".b.gz"), "").unwrap();
        assert!(at.rows("*.gz").unwrap_err().starts_with("no file matches"));
        assert!(at.rows("b.jsonl").unwrap_err().contains("did you mean `a.jsonl`?"));
        assert!(at.rows(".").unwrap_err().contains("or a glob"));
        assert!(at.rows("hf://datasets/owner/name/a/b.jsonl").is_ok());
        assert!(at.rows("hf://datasets/owner/name").is_err());
        assert!(at.rows("https://example.com/a.jsonl").is_err());
    }
}
