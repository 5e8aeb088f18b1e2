//! One file from the hub into the cache: locked, resumed, checked, and only then named.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::cache::{RepoCache, create_parent};
use super::client::{Client, Failure, FileInfo};
use super::progress::{Progress, Transfer};
use super::repo::Repo;
use crate::{Error, sha256};

/// How often a download that brings nothing new is tried again, and the first pause (each next one is longer by it).
const RETRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);

/// Brings `file` of `commit` into the cache and returns its path in the snapshot. A blob that is there already is
/// only linked.
///
/// What broke off lies beside the blobs as `<etag>.incomplete`. It is gone on with, now or in a later run, if the etag
/// is the content's SHA-256 (all large files): only then can the joined bytes be checked.
pub(super) fn download(
    client: &Client,
    cache: &RepoCache,
    repo: &Repo,
    commit: &str,
    file: &str,
    progress: &Progress,
) -> Result<PathBuf, Failure> {
    let pointer = cache.snapshot(commit).join(file);
    if pointer.exists() {
        return Ok(pointer);
    }
    let info = persistently(progress, &|| client.info(repo, commit, file))?;
    let etag = info.etag.clone();
    let _lock = cache.lock(&etag, || progress.note(&format!("{file}: waiting for another process's download")))?;
    let blob = cache.blob(&etag);
    if !blob.exists() {
        create_parent(&blob)?;
        let mut transfer = progress.begin(file, info.size);
        let part = PathBuf::from(format!("{}.incomplete", blob.display()));
        let download = Download { client, repo, commit, file, info, part };
        let brought = download
            .bring(&mut transfer)
            .and_then(|()| download.check())
            .and_then(|()| fs::rename(&download.part, &blob).map_err(|e| Error::writing(&blob, e).into()));
        if let Err(failure) = brought {
            if !(download.is_resumable() && failure.is_passing()) {
                let _ = fs::remove_file(&download.part);
            }
            return Err(failure);
        }
    }
    Ok(cache.link(&etag, commit, file)?)
}

/// A file on its way into `part`.
struct Download<'a> {
    client: &'a Client,
    repo: &'a Repo,
    commit: &'a str,
    file: &'a str,
    info: FileInfo,
    part: PathBuf,
}

impl Download<'_> {
    /// Whether bytes of two connections may be joined: the whole can be checked.
    fn is_resumable(&self) -> bool {
        is_sha256(&self.info.etag) && self.info.size.is_some()
    }

    /// The whole file, over as many connections as it takes while each brings something.
    fn bring(&self, transfer: &mut Transfer) -> Result<(), Failure> {
        let out = OpenOptions::new().write(true).create(true).truncate(false).open(&self.part);
        let mut out = out.map_err(self.writing())?;
        let mut fruitless = 0;
        loop {
            let have = out.metadata().map_err(self.writing())?.len();
            let start = if self.is_resumable() && self.info.size >= Some(have) { have } else { 0 };
            if start > 0 && self.info.size == Some(start) {
                break;
            }
            let outcome = self.copy(&mut out, start, transfer);
            let gained = self.is_resumable() && out.metadata().map_err(self.writing())?.len() > start;
            match outcome {
                Ok(()) => break,
                Err(failure) if failure.is_passing() && (gained || fruitless < RETRIES) => {
                    fruitless = if gained { 0 } else { fruitless + 1 };
                    transfer.note(&format!("{}: broke off, trying again", self.file));
                    std::thread::sleep(PAUSE * (fruitless + 1));
                }
                Err(failure) => return Err(failure),
            }
        }
        out.sync_all().map_err(self.writing())
    }

    /// One connection's bytes from `start` on, or from 0 where the server will not begin there.
    fn copy(&self, out: &mut File, start: u64, transfer: &mut Transfer) -> Result<(), Failure> {
        let (mut body, continues) = self.client.read(self.repo, self.commit, self.file, start)?;
        let mut at = if continues { start } else { 0 };
        out.set_len(at).and_then(|()| out.seek(SeekFrom::Start(at))).map_err(self.writing())?;
        let mut buffer = vec![0; 1 << 17];
        loop {
            let n = body.read(&mut buffer).map_err(|e| Failure::Unreachable(format!("{}: {e}", self.file)))?;
            if n == 0 {
                break;
            }
            at += n as u64;
            if self.info.size.is_some_and(|size| at > size) {
                return Err(Failure::Unusable(format!("{}: more bytes came than the hub announced", self.file)));
            }
            out.write_all(&buffer[..n]).map_err(self.writing())?;
            transfer.at(at);
        }
        match self.info.size {
            Some(size) if at < size => {
                Err(Failure::Unreachable(format!("{}: ended after {at} of {size} bytes", self.file)))
            }
            _ => Ok(()),
        }
    }

    /// Whether the bytes are the etag's, where the etag is their SHA-256.
    fn check(&self) -> Result<(), Failure> {
        if !is_sha256(&self.info.etag) {
            return Ok(());
        }
        let mut hash = Sha256::new();
        sha256::add(&mut hash, &self.part).map_err(|e| Error::reading(&self.part, e))?;
        let found = sha256::hex(&hash.finalize());
        match found == self.info.etag {
            true => Ok(()),
            false => Err(Failure::Unusable(format!(
                "{}: its bytes have the SHA-256 {found}, the hub announced {}; they were thrown away, try again",
                self.file, self.info.etag
            ))),
        }
    }

    fn writing(&self) -> impl Fn(std::io::Error) -> Failure {
        let part = self.part.clone();
        move |e| Failure::Local(Error::writing(&part, e))
    }
}

/// Asks again after a pause where that may help, and says so.
pub(super) fn persistently<T>(progress: &Progress, question: &dyn Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    for attempt in 1..=RETRIES {
        match question() {
            Err(failure) if failure.is_passing() => {
                progress.note(&format!("{failure}; trying again ({attempt} of {RETRIES})"));
                std::thread::sleep(PAUSE * attempt);
            }
            answer => return answer,
        }
    }
    question()
}

/// Large files have their content's SHA-256 as etag, small ones git's blob hash (40 digits).
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
