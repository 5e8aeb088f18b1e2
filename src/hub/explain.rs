//! What a person is told when the hub gave nothing: what was wanted, why it did not come, what would do instead.

use super::client::Failure;
use super::env::HubEnv;
use super::repo::{Kind, Repo};
use crate::Error;

/// What was asked for.
pub(super) struct Wanted<'a> {
    pub repo: &'a Repo,
    pub revision: &'a str,
    /// Of a data repository.
    pub file: Option<&'a str>,
}

impl Wanted<'_> {
    fn name(&self) -> String {
        let Self { repo, revision, file } = self;
        match (repo.kind, file) {
            (Kind::Model, _) => format!("model {} (revision {revision})", repo.id),
            (Kind::Dataset, file) => {
                format!("data file {} of {} (revision {revision})", file.unwrap_or("?"), repo.id)
            }
        }
    }

    /// The way without the hub.
    fn local(&self) -> &'static str {
        match self.repo.kind {
            Kind::Model => "fetch its folder elsewhere and pass --set model.base=/path/to/folder",
            Kind::Dataset => "fetch the file elsewhere and pass --set data.train='[\"/path/to/file\"]'",
        }
    }

    /// The failure as the error that the user reads: exit 3, or what the disk said.
    pub fn explain(&self, failure: Failure, env: &HubEnv) -> Error {
        let (name, endpoint, cache) = (self.name(), &env.endpoint, env.cache.display());
        let token = match env.token {
            Some(_) => "the token of HF_TOKEN (or HF_TOKEN_PATH) has no access to it",
            None => "set HF_TOKEN to a token that has access to it",
        };
        let text = match failure {
            Failure::Local(error) => return error,
            Failure::Unreachable(why) => format!(
                "{name}: {endpoint} gives no answer ({why}) and the cache {cache} does not hold all of it; {}, or set \
                 HF_HOME to a cache that holds it or HF_ENDPOINT to a mirror",
                self.local()
            ),
            Failure::Unusable(why) => format!("{name}: {why}"),
            Failure::Status { status, code } if code == "GatedRepo" => format!(
                "{name}: {endpoint} answers {status}: its owner gives access on request; ask for it on \
                 {endpoint}/{}, and {token}",
                self.page()
            ),
            Failure::Status { status: status @ (401 | 403), .. } => {
                format!("{name}: {endpoint} answers {status}: there is no such name, or it is private; {token}")
            }
            Failure::Status { status: 404, code } => format!(
                "{name}: {endpoint} answers 404: no such {}",
                match code.as_str() {
                    "RevisionNotFound" => "revision; the default is main",
                    "EntryNotFound" => "file in this repository",
                    "RepoNotFound" => "repository (or, on this machine, folder)",
                    _ => "name, revision or file",
                }
            ),
            Failure::Status { status, .. } => {
                format!("{name}: {endpoint} answers {status}; try again later, or {}", self.local())
            }
        };
        Error::input(text)
    }

    /// Offline, and the cache lacks `missing`.
    pub fn offline(&self, missing: &str, env: &HubEnv) -> Error {
        Error::input(format!(
            "{}: HF_HUB_OFFLINE is set and {missing} is not in the cache {}; unset HF_HUB_OFFLINE, or set HF_HOME to \
             a cache that holds it, or {}",
            self.name(),
            env.cache.display(),
            self.local()
        ))
    }

    fn page(&self) -> String {
        match self.repo.kind {
            Kind::Model => self.repo.id.clone(),
            Kind::Dataset => format!("datasets/{}", self.repo.id),
        }
    }
}
