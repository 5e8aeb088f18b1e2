//! Models and data files by their hub names, in the cache that all clients of the hub share.
//!
//! `env` reads the environment, `repo` the names, `cache` knows the folders, `client` the protocol; `download` brings
//! one file, `model_files` says which ones a model needs, `explain` words what went wrong, `progress` shows the way.

mod cache;
mod client;
mod download;
mod env;
mod explain;
mod model_files;
mod progress;
mod repo;

use std::path::{Path, PathBuf};

pub use env::HubEnv;
pub use progress::Progress;

use crate::{Error, Result};
use cache::RepoCache;
use client::{Client, Failure, Listing};
use download::{download, persistently};
use explain::Wanted;
use repo::{DataFile, Kind, Repo, is_commit, is_relative, is_repo_id};

/// The hub of the process's environment, for [`Hub::model`].
///
/// # Errors
/// Those of [`Hub::model`].
pub fn model(base: &str, revision: &str) -> Result<PathBuf> {
    Hub::new(HubEnv::from_env(), Progress::stderr()).model(base, revision)
}

/// A model as the command line names it: an absolute path where there is such a folder or file, else as it stands.
///
/// # Errors
/// [`Error::Input`] where the current folder is gone, or no UTF-8.
pub fn folder_or_name(given: &str) -> Result<String> {
    if !Path::new(given).exists() {
        return Ok(given.to_string());
    }
    let path = std::path::absolute(given).map_err(|error| Error::reading(Path::new(given), error))?;
    let unreadable = |path: std::ffi::OsString| Error::input(format!("{} is not UTF-8; rename it", path.display()));
    path.into_os_string().into_string().map_err(unreadable)
}

/// The hub of the process's environment, for [`Hub::data`].
///
/// # Errors
/// Those of [`Hub::data`].
pub fn data(spec: &str) -> Result<PathBuf> {
    Hub::new(HubEnv::from_env(), Progress::stderr()).data(spec)
}

/// A hub and its cache.
pub struct Hub {
    env: HubEnv,
    client: Client,
    progress: Progress,
}

impl Hub {
    /// Opens no socket and creates no folder.
    pub fn new(env: HubEnv, progress: Progress) -> Self {
        Self { client: Client::new(&env), env, progress }
    }

    /// The folder of a base model: the snapshot of the hub's `OWNER/NAME` at `revision` (branch, tag or commit),
    /// downloaded as far as the cache lacks it, or `base` itself where it is no such name but a folder or a GGUF file.
    /// A folder `OWNER/NAME` under the current one does not count: who asks has decided, and says an absolute path
    /// where a folder is meant ([`folder_or_name`]).
    ///
    /// A commit that is all in the cache opens no socket. A branch is asked for, as it may have moved; where no answer
    /// comes, the commit that it was last known to be at is used, and that is said.
    ///
    /// # Errors
    /// `Error::Input`, with the setting or folder that would do: `base` is neither folder nor name, no network, no
    /// access, not found, offline and not cached, a repository without safetensors or `tokenizer.json`, bytes that
    /// are not what the hub announced. `Error::Resource` or `Error::Run` where the cache cannot be written.
    pub fn model(&self, base: &str, revision: &str) -> Result<PathBuf> {
        let path = Path::new(base);
        let gguf = base.to_lowercase().ends_with(".gguf");
        if !gguf && is_repo_id(base) {
            return self.named_model(base, revision);
        }
        if path.is_dir() || (gguf && path.exists()) {
            return Ok(path.to_path_buf());
        }
        if gguf {
            return Err(Error::input(format!("{base}: there is no such file; check the path")));
        }
        if path.exists() {
            return Err(Error::input(format!(
                "{base} is a file; model.base is a folder with config.json, tokenizer.json and safetensors, or a .gguf \
                 file"
            )));
        }
        Err(Error::input(format!(
            "{base}: no such folder, and not a name on the hub, which is OWNER/NAME \
             (HuggingFaceTB/SmolLM2-135M-Instruct)"
        )))
    }

    fn named_model(&self, base: &str, revision: &str) -> Result<PathBuf> {
        if !is_relative(revision) {
            return Err(Error::input(format!("`{revision}` cannot be a revision of {base}; the default is main")));
        }
        self.hub_model(&Repo { kind: Kind::Model, id: base.to_string() }, revision)
    }

    fn hub_model(&self, repo: &Repo, revision: &str) -> Result<PathBuf> {
        let wanted = Wanted { repo, revision, file: None };
        let cache = RepoCache::new(&self.env.cache, repo);
        let known = cache.commit(revision);
        let cached = known.as_ref().map(|commit| cache.snapshot(commit));
        let missing = match &cached {
            Some(snapshot) => model_files::missing(snapshot)?,
            None => vec!["its commit".to_string()],
        };
        if let (Some(snapshot), true, true) = (&cached, missing.is_empty(), is_commit(revision)) {
            let is_settled = |f: &&str| snapshot.join(f).exists() || cache.is_known_absent(revision, f);
            if model_files::OPTIONAL.iter().all(is_settled) {
                return Ok(snapshot.clone());
            }
        }
        if self.env.offline {
            return match cached.filter(|_| missing.is_empty()) {
                Some(snapshot) => Ok(snapshot),
                None => Err(wanted.offline(&missing.join(", "), &self.env)),
            };
        }
        let whole = cached.filter(|_| missing.is_empty());
        let listing = match self.ask(whole.is_some(), &|| self.client.listing(repo, revision)) {
            Ok(listing) => listing,
            Err(failure) => return self.fall_back(failure, whole, &wanted),
        };
        self.bring_model(&cache, repo, revision, &listing).map_err(|failure| wanted.explain(failure, &self.env))
    }

    /// Small files first: they are what a run fails on early, and whole weights then mean a whole snapshot.
    fn bring_model(
        &self,
        cache: &RepoCache,
        repo: &Repo,
        revision: &str,
        listing: &Listing,
    ) -> std::result::Result<PathBuf, Failure> {
        let commit = listing.commit.as_str();
        for file in model_files::REQUIRED {
            if !listing.has(file) {
                return Err(Failure::Unusable(format!("the repository has no {file}; choose one that has it")));
            }
        }
        let weights = [model_files::WEIGHTS, model_files::INDEX].into_iter().find(|f| listing.has(f)).ok_or_else(|| {
            Failure::Unusable(format!(
                "the repository has neither {} nor {}; weights in other formats are not read, choose one that has them",
                model_files::WEIGHTS,
                model_files::INDEX
            ))
        })?;
        let get = |file: &str| download(&self.client, cache, repo, commit, file, &self.progress);
        for file in model_files::REQUIRED {
            get(file)?;
        }
        for file in model_files::OPTIONAL {
            match listing.has(file) {
                true => drop(get(file)?),
                // a mark that cannot be made costs one question more the next time
                false => drop(cache.keep_absent(commit, file)),
            }
        }
        let weights_path = get(weights)?;
        if weights == model_files::INDEX {
            for shard in model_files::shards(&weights_path)? {
                get(&shard)?;
            }
        }
        self.keep_commit(cache, revision, commit);
        Ok(cache.snapshot(commit))
    }

    /// A data file of the hub: the cached path of `hf://datasets/OWNER/NAME[@REVISION]/PATH`, downloaded where it is
    /// absent. Branches and a lost network are treated as by [`Hub::model`].
    ///
    /// # Errors
    /// As for [`Hub::model`]; `Error::Input` for another form of address.
    pub fn data(&self, spec: &str) -> Result<PathBuf> {
        let DataFile { repo, revision, path } = DataFile::parse(spec)?;
        let wanted = Wanted { repo: &repo, revision: &revision, file: Some(&path) };
        let cache = RepoCache::new(&self.env.cache, &repo);
        let known = cache.commit(&revision).map(|commit| cache.snapshot(&commit).join(&path));
        let cached = known.filter(|file| file.exists());
        match cached {
            Some(file) if is_commit(&revision) || self.env.offline => return Ok(file),
            None if self.env.offline => return Err(wanted.offline(&path, &self.env)),
            _ => {}
        }
        let info = match self.ask(cached.is_some(), &|| self.client.info(&repo, &revision, &path)) {
            Ok(info) => info,
            Err(failure) => return self.fall_back(failure, cached, &wanted),
        };
        let file = download(&self.client, &cache, &repo, &info.commit, &path, &self.progress)
            .map_err(|failure| wanted.explain(failure, &self.env))?;
        self.keep_commit(&cache, &revision, &info.commit);
        Ok(file)
    }

    /// Asks once where the cache would do, else again and again for a while.
    fn ask<T>(
        &self,
        have_cached: bool,
        question: &dyn Fn() -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, Failure> {
        if have_cached { question() } else { persistently(&self.progress, question) }
    }

    /// The cached copy where the hub gave no answer; not where it says that there is no such thing.
    fn fall_back(&self, failure: Failure, cached: Option<PathBuf>, wanted: &Wanted) -> Result<PathBuf> {
        match cached {
            Some(cached) if !failure.is_not_found() => {
                let (endpoint, cached_at) = (&self.env.endpoint, cached.display());
                self.progress.note(&format!("{endpoint}: {failure}; using the cached copy {cached_at}"));
                Ok(cached)
            }
            _ => Err(wanted.explain(failure, &self.env)),
        }
    }

    /// Only when all is there: until then the commit before it is the one to fall back to.
    ///
    /// A cache that cannot be written may still hold all that is needed: what cannot be kept is asked for again.
    fn keep_commit(&self, cache: &RepoCache, revision: &str, commit: &str) {
        if let Err(error) = cache.keep_commit(revision, commit) {
            self.progress.note(&format!("{error}"));
        }
    }
}
