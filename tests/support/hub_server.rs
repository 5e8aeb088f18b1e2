//! A hub on this machine: enough of the protocol to download from, a log of what was asked, and faults on demand.
//!
//! Small files are sent by the hub itself; large ones by a redirection to a second server (another origin), as the
//! real one does with its store.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// One repository: `acme/tiny`, or `datasets/acme/pairs`.
#[derive(Clone, Default)]
pub struct Repo {
    /// Its path in an address.
    pub path: String,
    /// What `main` is.
    pub commit: String,
    /// Name, bytes, and whether it lies in the store for large files.
    pub files: Vec<(String, Vec<u8>, bool)>,
    /// Files need this token.
    pub token: Option<String>,
    /// The hub answers with a redirection to this other path: the repository was renamed.
    pub moved_to: Option<String>,
    /// What it says in place of the right etags.
    pub etag: Option<String>,
    /// What it says in place of a large file's right size.
    pub size: Option<String>,
    /// What it answers in place of the list of files.
    pub listing: Option<String>,
}

/// What goes wrong with a file's bytes, so many times.
#[derive(Clone)]
pub enum Fault {
    /// The connection closes after so many bytes.
    Cut(usize),
    /// As many bytes, but others.
    Garble,
    /// More bytes than announced.
    TooMany,
    /// This status and nothing else.
    Status(u16),
    /// The connection closes after so many bytes, of another file of the same length.
    Swap(usize),
    /// The whole file, whatever part was asked for.
    Whole,
    /// A part that begins one byte later than was asked for, and says so.
    Later,
    /// A length that is one byte short of the bytes that follow.
    Short,
    /// The bytes without their length, to the connection's end.
    NoLength,
    /// A redirection to this address.
    Redirect(String),
}

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
    /// By the second server.
    pub store: bool,
}

#[derive(Default)]
struct State {
    repos: Mutex<Vec<Repo>>,
    faults: Mutex<HashMap<String, (Fault, usize)>>,
    seen: Mutex<Vec<Seen>>,
    connections: Mutex<usize>,
    store: Mutex<String>,
}

/// The two servers; they live as long as the process.
pub struct HubServer {
    /// For `HF_ENDPOINT`.
    pub url: String,
    state: Arc<State>,
}

impl HubServer {
    pub fn start(repos: &[Repo]) -> Self {
        let state = Arc::new(State::default());
        *state.repos.lock().unwrap() = repos.to_vec();
        *state.store.lock().unwrap() = listen(&state, true);
        Self { url: listen(&state, false), state }
    }

    /// Puts a repository in the place of the one with its path.
    pub fn replace(&self, repo: Repo) {
        let mut repos = self.state.repos.lock().unwrap();
        repos.retain(|r| r.path != repo.path);
        repos.push(repo);
    }

    /// From now on the next `times` answers with the bytes of `file` are at fault.
    pub fn fault(&self, file: &str, fault: Fault, times: usize) {
        self.state.faults.lock().unwrap().insert(file.to_string(), (fault, times));
    }

    /// The requests since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// How many connections were ever opened.
    pub fn connections(&self) -> usize {
        *self.state.connections.lock().unwrap()
    }
}

/// SHA-256 in hex, the etag of a large file.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The etag of a small file: 40 digits, as git's hash has.
pub fn small_etag(bytes: &[u8]) -> String {
    sha256(bytes)[..40].to_string()
}

fn listen(state: &Arc<State>, store: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let state = state.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            *state.connections.lock().unwrap() += 1;
            let state = state.clone();
            // a client that hangs up is its own affair
            thread::spawn(move || drop(answer(stream, &state, store)));
        }
    });
    url
}

fn answer(mut stream: TcpStream, state: &State, store: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_string()),
            None => break,
        };
    }
    let (authorization, range) = (headers.remove("authorization"), headers.remove("range"));
    let seen = Seen { method: method.into(), path: path.into(), authorization, range, store };
    state.seen.lock().unwrap().push(seen.clone());
    let reply = if store { from_store(state, &seen) } else { from_hub(state, &seen) };
    let head: String = reply.headers.iter().map(|(k, v)| format!("{k}: {v}\r\n")).collect();
    write!(stream, "HTTP/1.1 {} X\r\n{head}Connection: close\r\n\r\n", reply.status)?;
    if method == "GET" {
        stream.write_all(&reply.body)?;
    }
    stream.flush()
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16, headers: &[(&str, &str)]) -> Self {
        let headers = headers.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Self { status, headers, body: Vec::new() }
    }

    fn not_found(code: &str) -> Self {
        Self::new(404, &[("X-Error-Code", code), ("Content-Length", "0")])
    }
}

fn from_hub(state: &State, seen: &Seen) -> Reply {
    let path =
        seen.path.trim_start_matches('/').split('?').next().unwrap_or("").replace("%2F", "/").replace("%20", " ");
    let repos = state.repos.lock().unwrap().clone();
    if let Some(rest) = path.strip_prefix("api/models/") {
        let Some(repo) = repos.iter().find(|r| rest.starts_with(&format!("{}/revision/", r.path))) else {
            return Reply::not_found("RepoNotFound");
        };
        let revision = &rest[repo.path.len() + "/revision/".len()..];
        if let Some(to) = &repo.moved_to {
            let location = format!("/api/models/{to}/revision/{revision}");
            return Reply::new(307, &[("Location", &location), ("Content-Length", "0")]);
        }
        if revision != "main" && revision != repo.commit {
            return Reply::not_found("RevisionNotFound");
        }
        let siblings: Vec<_> = repo.files.iter().map(|f| serde_json::json!({"rfilename": f.0})).collect();
        let body = serde_json::json!({"id": repo.path, "sha": repo.commit, "siblings": siblings}).to_string();
        let body = repo.listing.clone().unwrap_or(body);
        let mut reply = Reply::new(200, &[("Content-Length", &body.len().to_string())]);
        reply.body = body.into_bytes();
        return reply;
    }
    let Some(repo) = repos.iter().find(|r| path.starts_with(&format!("{}/resolve/", r.path))) else {
        return Reply::not_found("RepoNotFound");
    };
    let rest = &path[repo.path.len() + "/resolve/".len()..];
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    if let Some(to) = &repo.moved_to {
        let location = format!("/{to}/resolve/{revision}/{file}");
        return Reply::new(307, &[("Location", &location), ("Content-Length", "0")]);
    }
    if revision != "main" && revision != repo.commit {
        return Reply::not_found("RevisionNotFound");
    }
    if let Some(token) = &repo.token {
        let status = match &seen.authorization {
            None => 401,
            Some(given) if *given != format!("Bearer {token}") => 403,
            Some(_) => 200,
        };
        if status != 200 {
            return Reply::new(status, &[("X-Error-Code", "GatedRepo"), ("Content-Length", "0")]);
        }
    }
    let Some((_, bytes, large)) = repo.files.iter().find(|f| f.0 == file) else {
        let mut reply = Reply::not_found("EntryNotFound");
        reply.headers.push(("X-Repo-Commit".into(), repo.commit.clone()));
        return reply;
    };
    let etag = repo.etag.clone().unwrap_or_else(|| if *large { sha256(bytes) } else { small_etag(bytes) });
    if *large {
        let location = format!("{}/{file}?in={}", state.store.lock().unwrap(), repo.path);
        return Reply::new(
            302,
            &[
                ("Location", &location),
                ("X-Repo-Commit", &repo.commit),
                ("X-Linked-Etag", &format!("\"{etag}\"")),
                ("X-Linked-Size", &repo.size.clone().unwrap_or_else(|| bytes.len().to_string())),
                ("ETag", "\"of the redirection\""),
                ("Content-Length", "0"),
            ],
        );
    }
    let mut reply = send(state, file, bytes, seen);
    reply.headers.push(("X-Repo-Commit".into(), repo.commit.clone()));
    reply.headers.push(("ETag".into(), format!("W/\"{etag}\"")));
    reply
}

fn from_store(state: &State, seen: &Seen) -> Reply {
    let (file, repo) = seen.path.trim_start_matches('/').split_once("?in=").unwrap_or_default();
    let repos = state.repos.lock().unwrap().clone();
    let repo = repos.iter().find(|r| r.path == repo);
    match repo.and_then(|r| r.files.iter().find(|f| f.0 == file)) {
        Some((_, bytes, _)) => send(state, file, bytes, seen),
        None => Reply::not_found(""),
    }
}

/// The bytes, from where they are asked for, and whatever fault was ordered.
fn send(state: &State, file: &str, bytes: &[u8], seen: &Seen) -> Reply {
    let start = seen.range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let (mut status, mut start) = start.map_or((200, 0), |s| (206, s.min(bytes.len())));
    let fault = match seen.method.as_str() {
        "GET" => state.faults.lock().unwrap().get_mut(file).filter(|(_, times)| *times > 0).map(|(fault, times)| {
            *times -= 1;
            fault.clone()
        }),
        _ => None,
    };
    match fault {
        Some(Fault::Whole) => (status, start) = (200, 0),
        Some(Fault::Later) => start = (start + 1).min(bytes.len()),
        _ => {}
    }
    let mut body = bytes[start..].to_vec();
    let length = body.len().to_string();
    let range = format!("bytes {start}-{}/{}", bytes.len().saturating_sub(1), bytes.len());
    let mut headers = vec![("Content-Length", length.as_str())];
    if status == 206 {
        headers.push(("Content-Range", &range));
    }
    let mut reply = Reply::new(status, &headers);
    match fault {
        None | Some(Fault::Whole | Fault::Later) => {}
        Some(Fault::Cut(keep)) => body.truncate(keep),
        Some(Fault::Garble) => body.iter_mut().for_each(|b| *b ^= 1),
        Some(Fault::Swap(keep)) => {
            body.truncate(keep);
            body.iter_mut().for_each(|b| *b ^= 1);
        }
        Some(Fault::TooMany) => {
            body.push(0);
            reply.headers[0].1 = body.len().to_string();
        }
        Some(Fault::Short) => reply.headers[0].1 = body.len().saturating_sub(1).to_string(),
        Some(Fault::NoLength) => drop(reply.headers.remove(0)),
        Some(Fault::Status(status)) => return Reply::new(status, &[("Content-Length", "0")]),
        Some(Fault::Redirect(to)) => return Reply::new(302, &[("Location", &to), ("Content-Length", "0")]),
    }
    reply.body = body;
    reply
}
