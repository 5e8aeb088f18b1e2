//! Names on the hub: repositories, revisions, files.

use crate::{Error, Result};

/// A model or data repository on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repo {
    /// What it holds.
    pub kind: Kind,
    /// `OWNER/NAME`.
    pub id: String,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

impl Repo {
    /// The repository's folder in the cache: `models--OWNER--NAME`.
    pub fn folder(&self) -> String {
        let kind = match self.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// The path of a file's address, from the endpoint.
    pub fn resolve_path(&self, revision: &str, file: &str) -> String {
        let prefix = match self.kind {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        };
        format!("{prefix}{}/resolve/{}/{}", self.id, quote(revision, false), quote(file, true))
    }

    /// The path of the address that lists a model's files, from the endpoint.
    pub fn listing_path(&self, revision: &str) -> String {
        format!("api/models/{}/revision/{}", self.id, quote(revision, false))
    }
}

/// A file of a data repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DataFile {
    pub repo: Repo,
    pub revision: String,
    pub path: String,
}

impl DataFile {
    /// Parses `hf://datasets/OWNER/NAME[@REVISION]/PATH`, as the Python client writes it: a slash inside the revision
    /// is written `%2F`.
    ///
    /// # Errors
    /// `Error::Input` for any other form, and for names that could lead out of the cache.
    pub fn parse(spec: &str) -> Result<Self> {
        let malformed = |why: &str| {
            Error::input(format!(
                "{spec}: {why}; a data file on the hub is written hf://datasets/OWNER/NAME/PATH, \
                 or hf://datasets/OWNER/NAME@REVISION/PATH"
            ))
        };
        let rest = spec.strip_prefix("hf://datasets/").ok_or_else(|| malformed("not the address of a data set"))?;
        let mut parts = rest.splitn(3, '/');
        let (Some(owner), Some(name), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(malformed("owner, name or path is missing"));
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let id = format!("{owner}/{name}");
        let revision = revision.replace("%2F", "/").replace("%2f", "/");
        if !is_repo_id(&id) {
            return Err(malformed(&format!("{id} cannot be a repository's name")));
        }
        if !is_relative(&revision) {
            return Err(malformed(&format!("`{revision}` cannot be a revision")));
        }
        if path.contains(['*', '?']) {
            return Err(malformed("patterns are for local files: name one file of the hub after the other"));
        }
        if !is_relative(path) {
            return Err(malformed(&format!("`{path}` cannot be a file's path")));
        }
        Ok(Self { repo: Repo { kind: Kind::Dataset, id }, revision, path: path.to_string() })
    }
}

/// Whether this is `OWNER/NAME` by the Python client's rule: letters, digits, `-`, `_`, `.`; neither `--` nor `..`;
/// no `-` or `.` at an end; at most 96 characters.
pub(super) fn is_repo_id(id: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !p.starts_with(['-', '.'])
            && !p.ends_with(['-', '.'])
    };
    let two = id.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name));
    two && id.len() <= 96 && !id.contains("--") && !id.contains("..")
}

/// Whether this is a whole commit hash, which never moves.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a revision or a file's name stays below the folder that it is joined to, on every system.
pub(super) fn is_relative(path: &str) -> bool {
    !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.contains(['\\', ':', '\0'])
}

/// Percent-encodes all but letters, digits and `-_.~` (RFC 3986), and slashes where `keep_slash`.
fn quote(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(b as char),
            b'/' if keep_slash => out.push('/'),
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_file_has_owner_name_revision_and_path() {
        let file = DataFile::parse("hf://datasets/Anthropic/hh-rlhf/harmless-base/test.jsonl.gz").unwrap();
        assert_eq!(file.repo.folder(), "datasets--Anthropic--hh-rlhf");
        assert_eq!((file.revision.as_str(), file.path.as_str()), ("main", "harmless-base/test.jsonl.gz"));
        let file = DataFile::parse("hf://datasets/a/b@refs%2Fconvert%2Fparquet/c d.jsonl").unwrap();
        assert_eq!(file.revision, "refs/convert/parquet");
        assert_eq!(
            file.repo.resolve_path(&file.revision, &file.path),
            "datasets/a/b/resolve/refs%2Fconvert%2Fparquet/c%20d.jsonl"
        );
    }

    #[test]
    fn other_addresses_are_refused() {
        for bad in [
            "hf://a/b/c.jsonl",
            "hf://datasets/a/b",
            "hf://datasets/a/b/",
            "hf://datasets/a/b/../c",
            "hf://datasets/a/b@../c",
            "hf://datasets/a/b@/c",
            "hf://datasets/../b/c",
            "hf://datasets/a/b/*.jsonl",
            "hf://datasets/a/b/c\\..\\d",
        ] {
            let error = DataFile::parse(bad).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("hf://datasets/OWNER/NAME/PATH"), "{error}");
        }
    }

    #[test]
    fn a_repository_has_an_owner_and_a_name() {
        for good in ["HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "a_1/b.c"] {
            assert!(is_repo_id(good), "{good}");
        }
        for bad in ["gpt2", "/abs/path", "./a", "a/b/c", "a/", "a/..", "a--b/c", "-a/b", "a/b.", "a/b c"] {
            assert!(!is_repo_id(bad), "{bad}");
        }
    }
}
