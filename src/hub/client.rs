//! The hub's protocol: which files a commit has, what a file is, and its bytes.
//!
//! Written over `ureq` and not over `hf-hub` 0.5, which sends the token to whatever host a file is redirected to,
//! names a file complete without a look at its size or hash, writes over the blobs that it already has, and reads
//! neither `HF_TOKEN`, `HF_HUB_CACHE` nor `HF_HUB_OFFLINE`.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Method, Request, Response, Uri};
use ureq::{Agent, Body, BodyReader};

use super::env::HubEnv;
use super::repo::{Repo, is_commit};
use crate::Error;

/// Why the hub gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer, or one that broke off.
    Unreachable(String),
    /// An answer of 4xx or 5xx; `code` is the hub's own word for it (`RepoNotFound`, `GatedRepo`, …) or empty.
    Status { status: u16, code: String },
    /// An answer that a hub would not give, or bytes that are not what was promised.
    Unusable(String),
    /// Not the hub's doing.
    Local(Error),
}

impl Failure {
    /// Whether another try may help: the network, or a server that is busy.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether the hub itself says that there is no such thing (and a cached copy would be another thing).
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: 404, .. })
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable(why) => write!(f, "no answer ({why})"),
            Self::Status { status, .. } => write!(f, "the answer {status}"),
            Self::Unusable(why) => f.write_str(why),
            Self::Local(error) => error.fmt(f),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

/// The files of one commit of a model.
#[derive(Deserialize)]
pub(super) struct Listing {
    /// The commit.
    #[serde(rename = "sha")]
    pub commit: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    /// Whether the commit has this file.
    pub fn has(&self, file: &str) -> bool {
        self.siblings.iter().any(|s| s.rfilename == file)
    }
}

/// What the hub says of a file before it sends it.
pub(super) struct FileInfo {
    /// The commit that it was found at.
    pub commit: String,
    /// Its name in the cache: the SHA-256 of a large file, git's blob hash of a small one.
    pub etag: String,
    /// Bytes.
    pub size: Option<u64>,
}

/// A hub at an endpoint. Opens no socket before it is asked.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// How far a redirection is followed.
#[derive(PartialEq)]
enum Follow {
    /// Anywhere: large files lie on other hosts.
    Anywhere,
    /// Only within the endpoint: the headers that describe a file are on the answer that points elsewhere.
    Within,
}

/// A server that does not take the connection is given up after so long, as in the Python client.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// And one that falls silent.
const READ_PATIENCE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 8;
/// A model's listing is some kilobytes; one of thousands of files stays below this.
const MAX_LISTING_BYTES: u64 = 64 << 20;

impl Client {
    pub fn new(env: &HubEnv) -> Self {
        let agent = Agent::config_builder()
            .user_agent(concat!("dpo-lora/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_PATIENCE))
            .timeout_recv_response(Some(READ_PATIENCE))
            .timeout_per_read(Some(READ_PATIENCE))
            .build()
            .into();
        Self { agent, endpoint: env.endpoint.clone(), token: env.token.clone() }
    }

    /// Which commit a model's revision is, and which files it has.
    pub fn listing(&self, repo: &Repo, revision: &str) -> Result<Listing, Failure> {
        let url = format!("{}/{}", self.endpoint, repo.listing_path(revision));
        let answer = self.send(Method::GET, &url, 0, Follow::Within)?;
        let mut text = String::new();
        let mut body = answer.into_body().into_with_config().limit(MAX_LISTING_BYTES).reader();
        body.read_to_string(&mut text).map_err(|e| Failure::Unreachable(format!("{url}: {e}")))?;
        let listing: Listing = serde_json::from_str(&text).map_err(|e| not_a_hub(&url, &e.to_string()))?;
        match is_commit(&listing.commit) {
            true => Ok(listing),
            false => Err(not_a_hub(&url, "its `sha` is no commit")),
        }
    }

    /// What a file of a revision is.
    pub fn info(&self, repo: &Repo, revision: &str, file: &str) -> Result<FileInfo, Failure> {
        let url = format!("{}/{}", self.endpoint, repo.resolve_path(revision, file));
        let answer = self.send(Method::HEAD, &url, 0, Follow::Within)?;
        let redirected = answer.status().is_redirection();
        let header = |name| answer.headers().get(name).and_then(|v| v.to_str().ok());
        let commit = header("x-repo-commit").filter(|c| is_commit(c));
        let etag = header("x-linked-etag").or(header("etag")).map(|e| e.trim_start_matches("W/").trim_matches('"'));
        let size = header("x-linked-size").or(header("content-length").filter(|_| !redirected));
        let is_name = |e: &&str| !e.is_empty() && e.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        Ok(FileInfo {
            commit: commit.ok_or_else(|| not_a_hub(&url, "no commit in X-Repo-Commit"))?.to_string(),
            etag: etag.filter(is_name).ok_or_else(|| not_a_hub(&url, "no usable ETag"))?.to_string(),
            size: size.and_then(|s| s.parse().ok()),
        })
    }

    /// A file's bytes from `start` on, and whether the server did begin there (else it begins at 0).
    pub fn read(
        &self,
        repo: &Repo,
        commit: &str,
        file: &str,
        start: u64,
    ) -> Result<(BodyReader<'static>, bool), Failure> {
        let url = format!("{}/{}", self.endpoint, repo.resolve_path(commit, file));
        let answer = self.send(Method::GET, &url, start, Follow::Anywhere)?;
        let from_start = format!("bytes {start}-");
        let range = answer.headers().get("content-range").and_then(|v| v.to_str().ok());
        let continues = answer.status().as_u16() == 206 && range.is_some_and(|r| r.starts_with(&from_start));
        Ok((answer.into_body().into_reader(), continues))
    }

    /// One request and what it is redirected to. The token goes to the endpoint's scheme, host and port alone.
    fn send(&self, method: Method, url: &str, start: u64, follow: Follow) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..MAX_REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(&url).header("Accept-Encoding", "identity");
            if start > 0 {
                request = request.header("Range", format!("bytes={start}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| self.is_ours(&url)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let request = request.body(()).map_err(|e| not_a_hub(&url, &e.to_string()))?;
            let answer = self.agent.run(request).map_err(|e| Failure::Unreachable(format!("{url}: {e}")))?;
            let status = answer.status();
            let header = |name| answer.headers().get(name).and_then(|v| v.to_str().ok());
            if status.is_redirection() {
                let location = header("location").ok_or_else(|| not_a_hub(&url, "a redirection without Location"))?;
                let next = absolute(&url, location).ok_or_else(|| not_a_hub(&url, "a redirection to nowhere"))?;
                if follow == Follow::Within && !self.is_ours(&next) {
                    return Ok(answer);
                }
                url = next;
            } else if status.is_success() {
                return Ok(answer);
            } else {
                let code = header("x-error-code").unwrap_or_default().to_string();
                return Err(Failure::Status { status: status.as_u16(), code });
            }
        }
        Err(not_a_hub(&url, "it redirects without end"))
    }

    /// Whether an address is of the endpoint's scheme, host and port.
    fn is_ours(&self, url: &str) -> bool {
        origin(url).is_some_and(|o| Some(o) == origin(&self.endpoint))
    }
}

fn not_a_hub(url: &str, why: &str) -> Failure {
    Failure::Unusable(format!("{url} does not answer as a hub does ({why}); check HF_ENDPOINT and your proxy"))
}

/// Scheme, host and port, lower-case, the port filled in.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// Where a redirection leads: an address, or a path on the same host. Never from https to http.
fn absolute(from: &str, location: &str) -> Option<String> {
    let (scheme, rest) = from.split_once("://")?;
    let to = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", rest.split('/').next()?)
    } else {
        location.to_string()
    };
    let (to_scheme, ..) = origin(&to)?;
    (to_scheme == "https" || (to_scheme == "http" && scheme == "http")).then_some(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirection_is_a_path_or_an_address_and_never_falls_to_http() {
        assert_eq!(absolute("https://hub/a/b", "/c?d=1").as_deref(), Some("https://hub/c?d=1"));
        assert_eq!(absolute("https://hub/a", "//cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(absolute("https://hub/a", "https://cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(absolute("https://hub/a", "http://hub/c"), None);
        assert_eq!(absolute("http://hub/a", "http://cdn/c").as_deref(), Some("http://cdn/c"));
        assert_eq!(absolute("http://hub/a", "file:///etc/passwd"), None);
        assert_eq!(absolute("http://hub/a", "c"), None);
    }

    #[test]
    fn the_token_is_for_one_origin() {
        let env = HubEnv {
            cache: Default::default(),
            endpoint: "https://hub.example".into(),
            token: Some("t".into()),
            offline: false,
        };
        let client = Client::new(&env);
        assert!(client.is_ours("https://HUB.example:443/a"));
        for other in ["http://hub.example/a", "https://hub.example:8443/a", "https://hub.example.org/a"] {
            assert!(!client.is_ours(other), "{other}");
        }
        assert!(!client.is_ours("https://hub.example@evil.example/a"));
    }
}
