//! What the environment says about the hub, read as the Python client (`huggingface_hub`) reads it.

use std::ffi::OsString;
use std::path::PathBuf;

/// Where the hub is, where its cache lies, and who asks.
///
/// A value and not the process's environment, so that a test can have its own.
#[derive(Clone)]
pub struct HubEnv {
    /// The cache's folder: `HF_HUB_CACHE`, else `HF_HOME/hub`, where `HF_HOME` is `$XDG_CACHE_HOME/huggingface` or
    /// else `~/.cache/huggingface`.
    pub cache: PathBuf,
    /// `HF_ENDPOINT` without a slash at its end, else `https://huggingface.co`.
    pub endpoint: String,
    /// `HF_TOKEN`, else the text of the file `HF_TOKEN_PATH`, which is `HF_HOME/token` by default.
    pub token: Option<String>,
    /// `HF_HUB_OFFLINE` is 1, ON, YES or TRUE in any case: no socket is opened.
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
        let path = |name| var(name).filter(|v| !v.is_empty()).map(|v| expand(PathBuf::from(v), &home));

        let hf_home = path("HF_HOME")
            .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface"));
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token_file = || std::fs::read_to_string(&token_path).ok().map(|t| t.trim().to_string());
        Self {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| hf_home.join("hub")),
            endpoint: text("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".to_string(), |e| e.trim_end_matches('/').to_string()),
            token: text("HF_TOKEN").or_else(|| token_file().filter(|t| !t.is_empty())),
            offline: text("HF_HUB_OFFLINE")
                .is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.to_uppercase().as_str())),
        }
    }
}

/// `~` and `~/…` from the home folder: a variable set in a file has met no shell.
fn expand(path: PathBuf, home: &std::path::Path) -> PathBuf {
    match path.strip_prefix("~") {
        Ok(rest) => home.join(rest),
        Err(_) => path,
    }
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
