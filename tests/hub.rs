//! Models and data files by their hub names, from a hub on this machine.

#[path = "hub/downloads.rs"]
mod downloads;
#[path = "support/hub_server.rs"]
mod hub_server;
mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dpo_lora::Error;
use dpo_lora::hub::{Hub, HubEnv, Progress};
use hub_server::{Fault, HubServer, Repo, sha256, small_etag};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const NEXT_COMMIT: &str = "fedcba9876543210fedcba9876543210fedcba98";
const ID: &str = "acme/tiny";

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// A model with what is needed, what is used where it is there, and what must never be fetched.
fn tiny() -> Repo {
    let small = |name: &str, text: &str| (name.to_string(), text.as_bytes().to_vec(), false);
    Repo {
        path: ID.into(),
        commit: COMMIT.into(),
        files: vec![
            small("README.md", "a model"),
            small("config.json", r#"{"model_type": "llama"}"#),
            small("tokenizer.json", r#"{"version": "1.0"}"#),
            small("tokenizer_config.json", "{}"),
            ("model.safetensors".into(), weights(), true),
            ("pytorch_model.bin".into(), vec![1; 1000], true),
            ("onnx/model.onnx".into(), vec![2; 1000], true),
        ],
        ..Repo::default()
    }
}

/// A cache of its own, and what was said.
struct Place {
    cache: TempDir,
    said: Said,
}

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Place {
    fn new() -> Self {
        Self { cache: tempfile::tempdir().unwrap(), said: Said::default() }
    }

    fn env(&self, endpoint: &str) -> HubEnv {
        HubEnv { cache: self.cache.path().join("hub"), endpoint: endpoint.into(), token: None, offline: false }
    }

    fn hub(&self, endpoint: &str) -> Hub {
        self.hub_with(self.env(endpoint))
    }

    fn hub_with(&self, env: HubEnv) -> Hub {
        Hub::new(env, Progress::lines(self.said.clone()))
    }

    fn said(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.said.0.lock().unwrap())).unwrap()
    }

    fn repo(&self) -> PathBuf {
        self.cache.path().join("hub/models--acme--tiny")
    }

    /// All that lies below a folder of the repository, sorted.
    fn files(&self, below: &str) -> Vec<String> {
        let mut names = Vec::new();
        let mut folders = vec![self.repo().join(below)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                match fs::symlink_metadata(&path).unwrap().is_dir() {
                    true => folders.push(path),
                    false => names.push(path.strip_prefix(self.repo().join(below)).unwrap().display().to_string()),
                }
            }
        }
        names.sort();
        names
    }
}

/// An address at which nobody listens.
fn nowhere() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn input(result: dpo_lora::Result<PathBuf>) -> String {
    match result {
        Err(error @ Error::Input(_)) => {
            assert_eq!(error.exit_code(), 3);
            error.to_string()
        }
        other => panic!("expected bad input, got {other:?}"),
    }
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn a_model_comes_into_the_shared_layout() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let folder = place.hub(&server.url).model(ID, "main").unwrap();

    assert_eq!(folder, place.repo().join("snapshots").join(COMMIT));
    let needed = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(place.files(&format!("snapshots/{COMMIT}")), needed);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert_eq!(fs::read_to_string(place.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(place.files("blobs").len(), needed.len());
    assert!(place.repo().join("blobs").join(sha256(&weights())).is_file());
    assert!(place.repo().join("blobs").join(small_etag(b"{}")).is_file());
    let absent = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "quantize_config.json",
        "special_tokens_map.json",
    ];
    assert_eq!(place.files(&format!(".no_exist/{COMMIT}")), absent);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(&weights()))
    );
    says(&place.said(), &["downloading config.json (23 B)", "downloading model.safetensors (292.97 KiB)"]);
}

#[test]
fn what_is_cached_is_not_fetched_again() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    server.take_seen();

    assert_eq!(place.hub(&server.url).model(ID, "main").unwrap(), folder);
    let seen = server.take_seen();
    assert_eq!(seen.len(), 1, "a branch may have moved, which is one question: {seen:?}");
    assert_eq!(seen[0].path, "/api/models/acme/tiny/revision/main");

    let before = server.connections();
    assert_eq!(place.hub(&server.url).model(ID, COMMIT).unwrap(), folder);
    assert_eq!(server.connections(), before, "a commit does not move");
}

#[test]
fn a_branch_that_moved_brings_only_what_changed() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let former = place.hub(&server.url).model(ID, "main").unwrap();
    let mut next = tiny();
    next.commit = NEXT_COMMIT.into();
    next.files[1].1 = br#"{"model_type": "mistral"}"#.to_vec();
    server.replace(next);
    server.fault("config.json", Fault::Status(404), 1);
    input(place.hub(&server.url).model(ID, "main"));
    assert_eq!(place.hub(&nowhere()).model(ID, "main").unwrap(), former, "it is whole, the next one is not yet");
    place.said();

    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(folder.file_name().unwrap(), NEXT_COMMIT);
    assert_eq!(fs::read_to_string(place.repo().join("refs/main")).unwrap(), NEXT_COMMIT);
    assert_eq!(place.said().lines().collect::<Vec<_>>(), ["downloading config.json (25 B)"]);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_sharded_model_brings_the_shards_of_its_index() {
    let mut repo = tiny();
    repo.files.retain(|f| f.0 != "model.safetensors");
    let index = r#"{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}"#;
    repo.files.push(("model.safetensors.index.json".into(), index.into(), false));
    for shard in ["part-1", "part-2", "unused"] {
        repo.files.push((format!("{shard}.safetensors"), shard.into(), true));
    }
    let (server, place) = (HubServer::start(&[repo.clone()]), Place::new());
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    assert_eq!(fs::read(folder.join("part-2.safetensors")).unwrap(), b"part-2");
    assert!(!folder.join("unused.safetensors").exists());

    // an interrupted download of the shards is gone on with
    fs::remove_file(folder.join("part-2.safetensors")).unwrap();
    let error = input(place.hub_with(HubEnv { offline: true, ..place.env(&server.url) }).model(ID, COMMIT));
    says(&error, &["HF_HUB_OFFLINE is set", "part-2.safetensors is not in the cache"]);
    place.hub(&server.url).model(ID, COMMIT).unwrap();
    assert!(folder.join("part-2.safetensors").exists());

    // an index must not lead out of the snapshot
    repo.commit = NEXT_COMMIT.into();
    repo.files.iter_mut().find(|f| f.0.ends_with("index.json")).unwrap().1 =
        br#"{"weight_map": {"a": "../../../evil.safetensors"}}"#.to_vec();
    server.replace(repo);
    says(&input(place.hub(&server.url).model(ID, "main")), &["../../../evil.safetensors"]);
}

#[test]
fn a_renamed_model_is_followed() {
    let old = Repo { path: "acme/old".into(), moved_to: Some(ID.into()), ..Repo::default() };
    let (server, place) = (HubServer::start(&[tiny(), old]), Place::new());
    let folder = place.hub(&server.url).model("acme/old", "main").unwrap();
    assert!(folder.ends_with(Path::new("models--acme--old/snapshots").join(COMMIT)));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn without_network_the_cached_commit_serves() {
    let (server, place) = (HubServer::start(&[tiny()]), Place::new());
    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    place.said();
    let away = nowhere();
    assert_eq!(place.hub(&away).model(ID, "main").unwrap(), folder);
    says(&place.said(), &[&away, "no answer", "using the cached copy", COMMIT]);
}

#[test]
fn without_network_or_cache_the_ways_out_are_named() {
    let (place, away) = (Place::new(), nowhere());
    let error = input(place.hub(&away).model(ID, "main"));
    says(&error, &["model acme/tiny (revision main)", &away, "--set model.base=", "HF_HOME", "HF_ENDPOINT"]);
    says(&error, &[&place.cache.path().display().to_string()]);
    assert!(!place.repo().exists());

    let error = input(place.hub(&away).data("hf://datasets/acme/pairs/a.jsonl"));
    says(&error, &["data file a.jsonl of acme/pairs", "--set data.train=", "HF_HOME", "HF_ENDPOINT"]);
}

#[test]
fn offline_opens_no_socket() {
    let (server, place) = (HubServer::start(&[tiny(), pairs()]), Place::new());
    let offline = || place.hub_with(HubEnv { offline: true, ..place.env(&server.url) });
    let spec = "hf://datasets/acme/pairs/harmless/test.jsonl.gz";

    says(&input(offline().model(ID, "main")), &["HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE", "model.base"]);
    says(&input(offline().data(spec)), &["HF_HUB_OFFLINE is set", "harmless/test.jsonl.gz", "data.train"]);
    assert_eq!(server.connections(), 0);

    let folder = place.hub(&server.url).model(ID, "main").unwrap();
    let file = place.hub(&server.url).data(spec).unwrap();
    let before = server.connections();
    assert_eq!(offline().model(ID, "main").unwrap(), folder);
    assert_eq!(offline().model(ID, COMMIT).unwrap(), folder);
    assert_eq!(offline().data(spec).unwrap(), file);
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    says(&input(offline().model(ID, "main")), &["tokenizer.json is not in the cache"]);
    assert_eq!(server.connections(), before);
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    let gated = Repo { token: Some("hf_secret".into()), ..tiny() };
    let (server, place) = (HubServer::start(&[gated]), Place::new());
    let with = |token: Option<&str>| HubEnv { token: token.map(String::from), ..place.env(&server.url) };

    let error = input(place.hub_with(with(None)).model(ID, "main"));
    says(&error, &["answers 401", "set HF_TOKEN", &format!("{}/{ID}", server.url)]);
    let error = input(place.hub_with(with(Some("hf_other"))).model(ID, "main"));
    says(&error, &["answers 403", "has no access"]);
    assert!(!error.contains("hf_other"), "a token is never printed: {error}");
    assert!(place.files("blobs").is_empty());

    server.take_seen();
    place.hub_with(with(Some("hf_secret"))).model(ID, "main").unwrap();
    let seen = server.take_seen();
    assert!(seen.iter().any(|s| s.store));
    for request in seen {
        let expected = if request.store { None } else { Some("Bearer hf_secret") };
        assert_eq!(request.authorization.as_deref(), expected, "{request:?}");
    }
}

#[test]
fn what_the_hub_does_not_have_is_said() {
    let (server, place) = (HubServer::start(&[tiny(), pairs()]), Place::new());
    let hub = place.hub(&server.url);
    says(&input(hub.model("acme/none", "main")), &["acme/none", "answers 404", "no such repository", "folder"]);
    says(&input(hub.model(ID, "v9")), &["revision v9", "answers 404", "no such revision"]);
    says(&input(hub.data("hf://datasets/acme/pairs/none.jsonl")), &["none.jsonl", "no such file"]);
    // nor does a cached copy stand in for what the hub says is not there
    hub.model(ID, "main").unwrap();
    server.replace(Repo { commit: NEXT_COMMIT.into(), ..tiny() });
    fs::write(place.repo().join("refs/v9"), COMMIT).unwrap();
    says(&input(hub.model(ID, "v9")), &["no such revision"]);
}

#[test]
fn a_model_that_cannot_be_read_is_refused_before_a_byte_of_it() {
    for (file, why) in [("model.safetensors", "neither model.safetensors nor"), ("tokenizer.json", "no tokenizer.json")]
    {
        let mut repo = tiny();
        repo.files.retain(|f| f.0 != file);
        let (server, place) = (HubServer::start(&[repo]), Place::new());
        says(&input(place.hub(&server.url).model(ID, "main")), &[ID, why]);
        assert_eq!(server.take_seen().len(), 1);
        assert!(!place.repo().exists());
    }
}

fn pairs() -> Repo {
    let files = vec![("harmless/test.jsonl.gz".into(), b"rows".to_vec(), true), ("a b.jsonl".into(), vec![7], false)];
    Repo { path: "datasets/acme/pairs".into(), commit: COMMIT.into(), files, ..Repo::default() }
}

#[test]
fn a_data_file_comes_into_the_shared_layout() {
    let (server, place) = (HubServer::start(&[pairs()]), Place::new());
    let hub = place.hub(&server.url);
    let file = hub.data("hf://datasets/acme/pairs/harmless/test.jsonl.gz").unwrap();
    let repo = place.cache.path().join("hub/datasets--acme--pairs");
    assert_eq!(file, repo.join("snapshots").join(COMMIT).join("harmless/test.jsonl.gz"));
    assert_eq!(fs::read(&file).unwrap(), b"rows");
    #[cfg(unix)]
    assert_eq!(fs::read_link(&file).unwrap(), Path::new("../../../blobs").join(sha256(b"rows")));

    server.take_seen();
    let before = server.connections();
    let pinned = format!("hf://datasets/acme/pairs@{COMMIT}/harmless/test.jsonl.gz");
    assert_eq!(hub.data(&pinned).unwrap(), file);
    assert_eq!(server.connections(), before);
    assert_eq!(hub.data("hf://datasets/acme/pairs/harmless/test.jsonl.gz").unwrap(), file);
    assert_eq!(server.take_seen().len(), 1);
    assert_eq!(place.hub(&nowhere()).data("hf://datasets/acme/pairs/harmless/test.jsonl.gz").unwrap(), file);
    assert_eq!(fs::read(hub.data("hf://datasets/acme/pairs/a b.jsonl").unwrap()).unwrap(), [7]);
}

#[test]
fn a_folder_is_itself_and_other_names_are_refused() {
    let place = Place::new();
    let hub = place.hub(&nowhere());
    let folder = place.cache.path().to_str().unwrap();
    assert_eq!(hub.model(folder, "main").unwrap(), place.cache.path());
    let gguf = place.cache.path().join("model.gguf");
    fs::write(&gguf, "").unwrap();
    assert_eq!(hub.model(gguf.to_str().unwrap(), "main").unwrap(), gguf);
    let file = place.cache.path().join("model.safetensors");
    fs::write(&file, "").unwrap();
    says(&input(hub.model(file.to_str().unwrap(), "main")), &["is a file", "folder"]);
    says(&input(hub.model("./not/here", "main")), &["./not/here", "no such folder", "OWNER/NAME"]);
    says(&input(hub.model("gpt2", "main")), &["gpt2", "no such folder", "OWNER/NAME"]);
    says(&input(hub.model(ID, "../main")), &["../main", "cannot be a revision"]);
    // tests run in the package's folder, which holds one of this name
    assert!(Path::new("assets/quickstart").is_dir());
    says(&input(hub.model("assets/quickstart", "main")), &["model assets/quickstart (revision main)"]);
}

/// Cache, endpoint, token and offline switch under many environments, by both programs.
#[test]
fn the_environment_is_read_as_the_python_client_reads_it() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().to_str().unwrap();
    for (name, text) in [("token", "hf_file\n"), ("other", " hf_\r\nother \n"), ("empty", "\n")] {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let at = |name: &str| format!("{home}/{name}");
    let cases: Vec<Vec<(&str, String)>> = vec![
        vec![],
        vec![("XDG_CACHE_HOME", "/xdg".into())],
        vec![("HF_HOME", home.into())],
        vec![("HF_HOME", "~/hf".into())],
        vec![("HF_HOME", "$BIG/hf".into())],
        vec![("HF_HOME", "${BIG}/$NONE/hf".into()), ("XDG_CACHE_HOME", "/xdg".into())],
        vec![("HF_HOME", "/h".into()), ("HF_HUB_CACHE", "~/c".into())],
        vec![("HUGGINGFACE_HUB_CACHE", "/former".into())],
        vec![("HUGGINGFACE_HUB_CACHE", "/former".into()), ("HF_HUB_CACHE", "/now".into())],
        vec![("HF_ENDPOINT", "http://mirror:8080/".into())],
        vec![("HF_ENDPOINT", "https://mirror/path//".into())],
        vec![("HF_TOKEN", "hf_var".into()), ("HF_HOME", home.into())],
        vec![("HF_TOKEN", " hf_\nvar ".into())],
        vec![("HF_TOKEN", "".into()), ("HF_HOME", home.into())],
        vec![("HUGGING_FACE_HUB_TOKEN", "hf_former".into()), ("HF_HOME", home.into())],
        vec![("HUGGING_FACE_HUB_TOKEN", "hf_former".into()), ("HF_TOKEN", "hf_now".into())],
        vec![("HF_TOKEN_PATH", at("other"))],
        vec![("HF_TOKEN_PATH", at("empty"))],
        vec![("HF_TOKEN_PATH", at("none")), ("HF_HOME", home.into())],
        vec![("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1".into()), ("HF_TOKEN", "hf_var".into())],
        vec![("HF_HUB_OFFLINE", "1".into())],
        vec![("HF_HUB_OFFLINE", "yes".into())],
        vec![("HF_HUB_OFFLINE", "True".into())],
        vec![("HF_HUB_OFFLINE", "on".into())],
        vec![("HF_HUB_OFFLINE", "2".into())],
        vec![("HF_HUB_OFFLINE", "0".into()), ("TRANSFORMERS_OFFLINE", "1".into())],
        vec![("HF_HUB_OFFLINE", "".into()), ("TRANSFORMERS_OFFLINE", "1".into())],
        vec![("TRANSFORMERS_OFFLINE", "TRUE".into())],
    ];
    let code = "import json, os, sys, importlib\n\
                import huggingface_hub.constants as c\n\
                from huggingface_hub.utils import build_hf_headers\n\
                base = dict(os.environ)\n\
                for case in json.load(sys.stdin):\n\
                \x20   os.environ.clear(); os.environ.update(base); os.environ.update(dict(case))\n\
                \x20   importlib.reload(c)\n\
                \x20   token = build_hf_headers().get('authorization')\n\
                \x20   print(json.dumps([c.HF_HUB_CACHE, c.ENDPOINT, token, c.HF_HUB_OFFLINE]))\n";
    let child = std::process::Command::new(&python)
        .args(["-c", code])
        .env_clear()
        .envs([("HOME", "/home/ada"), ("BIG", "/mnt/big")])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    child.stdin.take().unwrap().write_all(serde_json::to_string(&cases).unwrap().as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    let theirs: Vec<serde_json::Value> =
        String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(theirs.len(), cases.len());
    for (case, theirs) in cases.iter().zip(theirs) {
        let lookup = |name: &str| match case.iter().find(|(set, _)| *set == name) {
            Some((_, value)) => Some(value.into()),
            None => (name == "BIG").then(|| "/mnt/big".into()),
        };
        let ours = HubEnv::from_vars(&lookup, Some("/home/ada".into()));
        let token = ours.token.map(|token| format!("Bearer {token}"));
        assert_eq!(serde_json::json!([ours.cache, ours.endpoint, token, ours.offline]), theirs, "{case:?}");
    }
}

/// Both ways with the Python client: what one downloads, the other finds without a question.
#[test]
fn the_python_client_shares_the_cache() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let server = HubServer::start(&[tiny()]);
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let absent = [
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "quantize_config.json",
    ];
    let run = |place: &Place, offline: &str, code: &str| {
        let out = std::process::Command::new(&python)
            .args(["-c", code])
            .env("HF_HUB_CACHE", place.cache.path().join("hub"))
            .env("HF_ENDPOINT", &server.url)
            .env("HF_HUB_OFFLINE", offline)
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };

    let ours = Place::new();
    let folder = ours.hub(&server.url).model(ID, "main").unwrap();
    let code = format!(
        "import huggingface_hub as h\n\
         print(h.snapshot_download({ID:?}))\n\
         for f in {files:?}: print(h.hf_hub_download({ID:?}, f))\n\
         for f in {absent:?}: assert h.try_to_load_from_cache({ID:?}, f) is h._CACHED_NO_EXIST, f\n"
    );
    let expected: Vec<_> = std::iter::once(folder.clone()).chain(files.iter().map(|f| folder.join(f))).collect();
    let found: Vec<_> = run(&ours, "1", &code).lines().map(PathBuf::from).collect();
    assert_eq!(found, expected);

    let theirs = Place::new();
    let code = format!(
        "import huggingface_hub as h\n\
         from huggingface_hub.errors import EntryNotFoundError\n\
         for f in {files:?}: h.hf_hub_download({ID:?}, f)\n\
         for f in {absent:?}:\n  try: h.hf_hub_download({ID:?}, f); raise SystemExit(f)\n  except EntryNotFoundError: pass\n"
    );
    run(&theirs, "0", &code);
    let before = server.connections();
    let folder = theirs.hub(&server.url).model(ID, COMMIT).unwrap();
    assert_eq!(server.connections(), before);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert_eq!(ours.files(""), theirs.files(""));
}
