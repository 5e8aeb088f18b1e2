//! What the environment says about the hub, read as the Python client (`huggingface_hub`) reads it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::outside;

/// Most bytes of a token's file; a token has some 40.
const MAX_TOKEN: u64 = 64 << 10;

/// Where the hub is, where its cache lies, and who asks.
///
/// A value and not the process's environment, so that a test can have its own.
#[derive(Clone)]
pub struct HubEnv {
    /// The cache's folder: `HF_HUB_CACHE` (or `HUGGINGFACE_HUB_CACHE`, its former name), else `HF_HOME/hub`, where
    /// `HF_HOME` is `$XDG_CACHE_HOME/huggingface` or else `~/.cache/huggingface`.
    pub cache: PathBuf,
    /// `HF_ENDPOINT` without a slash at its end, else `https://huggingface.co`.
    pub endpoint: String,
    /// `HF_TOKEN` (or `HUGGING_FACE_HUB_TOKEN`, its former name), else the text of the file `HF_TOKEN_PATH`, which is
    /// `HF_HOME/token` by default; none where `HF_HUB_DISABLE_IMPLICIT_TOKEN` is true.
    pub token: Option<String>,
    /// `HF_HUB_OFFLINE`, else `TRANSFORMERS_OFFLINE`, is true (1, ON, YES or TRUE in any case): no socket is opened.
    pub offline: bool,
}

impl HubEnv {
    /// The process's environment.
    pub fn from_env() -> Self {
        Self::from_vars(&|name| std::env::var_os(name), std::env::home_dir())
    }

    /// The same from any lookup of variables; `home` is what `~` stands for. An empty variable counts as unset.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let home = home.unwrap_or_default();
        let text = |name| var(name).and_then(|v| v.into_string().ok()).map(|v| v.trim().to_string());
        let text = |name| text(name).filter(|v| !v.is_empty());
        let path = |name| var(name).filter(|v| !v.is_empty()).map(|v| expand(v, &home, var));
        let is_true = |value: &String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());

        let hf_home = path("HF_HOME")
            .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token_file = || outside::read_text(&token_path, MAX_TOKEN).ok();
        let token = || text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(token_file);
        let clean = |token: String| token.replace(['\r', '\n'], "").trim().to_string();
        let keep_token = !text("HF_HUB_DISABLE_IMPLICIT_TOKEN").as_ref().is_some_and(is_true);
        Self {
            cache: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| hf_home.join("hub")),
            endpoint: text("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".to_string(), |e| e.trim_end_matches('/').to_string()),
            token: keep_token.then(token).flatten().map(clean).filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE")).as_ref().is_some_and(is_true),
        }
    }
}

/// `~` and `~/…` from the home folder and `$NAME` and `${NAME}` from the environment: a variable set in a file has met
/// no shell. Names that are not set stay as they are.
fn expand(path: OsString, home: &Path, var: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let path = match Path::new(&path).strip_prefix("~") {
        Ok(rest) => home.join(rest),
        Err(_) => PathBuf::from(path),
    };
    let Some(text) = path.to_str().filter(|text| text.contains('$')) else { return path };
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        let (name, end) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        out.push_str(before);
        match var(name).and_then(|value| value.into_string().ok()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..at + 1 + end]),
        }
        rest = &after[end..];
    }
    PathBuf::from(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(vars: &[(&str, &str)]) -> HubEnv {
        let vars: Vec<(String, OsString)> = vars.iter().map(|(k, v)| (k.to_string(), v.into())).collect();
        HubEnv::from_vars(
            &move |name| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()),
            Some(PathBuf::from("/home/ada")),
        )
    }

    #[test]
    fn the_cache_is_where_the_python_client_has_it() {
        assert_eq!(env(&[]).cache, PathBuf::from("/home/ada/.cache/huggingface/hub"));
        assert_eq!(env(&[("XDG_CACHE_HOME", "/x")]).cache, PathBuf::from("/x/huggingface/hub"));
        assert_eq!(env(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]).cache, PathBuf::from("/home/ada/hf/hub"));
        assert_eq!(env(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]).cache, PathBuf::from("/c"));
        assert_eq!(env(&[("HF_HOME", "")]).cache, PathBuf::from("/home/ada/.cache/huggingface/hub"));
    }

    #[test]
    fn variables_in_paths_are_filled_in() {
        let cache = |path: &str| env(&[("BIG", "/mnt/big"), ("HF_HUB_CACHE", path)]).cache;
        assert_eq!(cache("$BIG/hf"), PathBuf::from("/mnt/big/hf"));
        assert_eq!(cache("${BIG}x/$BIG"), PathBuf::from("/mnt/bigx//mnt/big"));
        assert_eq!(cache("/a$NONE/${NONE}/$"), PathBuf::from("/a$NONE/${NONE}/$"));
    }

    #[test]
    fn the_endpoint_loses_its_last_slash() {
        assert_eq!(env(&[]).endpoint, "https://huggingface.co");
        assert_eq!(env(&[("HF_ENDPOINT", "http://mirror:80/")]).endpoint, "http://mirror:80");
    }

    #[test]
    fn offline_is_one_of_four_words() {
        for yes in ["1", "on", "YES", "True"] {
            assert!(env(&[("HF_HUB_OFFLINE", yes)]).offline, "{yes}");
        }
        for no in ["0", "", "off", "2"] {
            assert!(!env(&[("HF_HUB_OFFLINE", no)]).offline, "{no}");
        }
    }

    #[test]
    fn the_token_is_the_variable_or_else_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "hf_file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(env(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        assert_eq!(env(&[("HF_TOKEN_PATH", file.to_str().unwrap())]).token.as_deref(), Some("hf_file"));
        assert_eq!(env(&[("HF_HOME", home), ("HF_TOKEN", " hf_var ")]).token.as_deref(), Some("hf_var"));
        assert_eq!(env(&[("HF_HOME", "/nowhere")]).token, None);
    }
}
