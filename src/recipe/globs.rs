//! What a glob finds: as in a shell, a name that begins with a dot is found where the pattern writes the dot.
//!
//! The library's own switch for this finds hidden names for no pattern at all, and panics at names that are not UTF-8.

use std::ffi::OsStr;
use std::path::{Component, Path};

use glob::{GlobResult, PatternError};

/// The names of any number of folders.
const ANY_FOLDERS: &str = "**";

/// The paths that `pattern` finds, sorted by name.
///
/// # Errors
/// Where it is no glob.
pub fn matches(pattern: &str) -> Result<impl Iterator<Item = GlobResult> + use<>, PatternError> {
    let written = pattern.to_string();
    let is_shown = move |found: &GlobResult| {
        let path = match found {
            Ok(path) => path.as_path(),
            Err(error) => error.path(),
        };
        !is_hidden(Path::new(&written), path)
    };
    Ok(glob::glob(pattern)?.filter(is_shown))
}

/// Whether a name in `found` begins with a dot where that of the pattern does not. Names stand side by side with the
/// pattern's, from the start up to its first `**` and from the end back to its last one.
fn is_hidden(pattern: &Path, found: &Path) -> bool {
    let (pattern, found) = (names(pattern), names(found));
    let any = |name: &&OsStr| *name == ANY_FOLDERS;
    let ahead = pattern.iter().position(any).unwrap_or(pattern.len());
    let behind = pattern.iter().rev().position(any).unwrap_or(pattern.len());
    let between = pattern.get(ahead..pattern.len() - behind).unwrap_or_default();
    found.iter().enumerate().filter(|(_, name)| is_dotted(name)).any(|(i, _)| {
        let from_end = found.len() - i;
        let beside = match i < ahead {
            true => pattern.get(i),
            false => pattern.len().checked_sub(from_end).filter(|_| from_end <= behind).map(|at| &pattern[at]),
        };
        !beside.map_or_else(|| between.iter().any(is_dotted), is_dotted)
    })
}

fn names(path: &Path) -> Vec<&OsStr> {
    path.components().filter(|part| *part != Component::CurDir).map(Component::as_os_str).collect()
}

fn is_dotted(name: &&OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dot_is_found_where_the_pattern_writes_it() {
        let hidden = |pattern: &str, found: &str| is_hidden(Path::new(pattern), Path::new(found));
        for (pattern, found) in [
            ("/a/*.jsonl", "/a/b.jsonl"),
            ("/a/.*", "/a/.b"),
            ("/a/[.]b", "/a/b"),
            ("/.a/*/b", "/.a/c/b"),
            ("./a/*", "a/b"),
            ("../*", "../a"),
            ("/.a/**/*", "/.a/b/c/d"),
            ("/a/**/.b", "/a/c/d/.b"),
            ("/a/**/.b/**/*", "/a/c/.b/d"),
        ] {
            assert!(!hidden(pattern, found), "{found} by {pattern}");
        }
        for (pattern, found) in [
            ("/a/*.jsonl", "/a/.b.jsonl"),
            ("/a/?b", "/a/.b"),
            ("/.a/*", "/.a/.b"),
            ("/.a/*/b", "/.a/.c/b"),
            ("/a/**/*", "/a/.b/c"),
            ("/a/**/*", "/a/b/.c"),
        ] {
            assert!(hidden(pattern, found), "{found} by {pattern}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_name_that_is_no_text_is_found_like_others() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(OsStr::from_bytes(b"\xff.gz")), "").unwrap();
        let pattern = folder.path().join("*.jsonl");
        assert_eq!(matches(pattern.to_str().unwrap()).unwrap().count(), 0);
    }
}
