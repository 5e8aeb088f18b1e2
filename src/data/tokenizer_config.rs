//! The files beside `tokenizer.json` that say which tokens begin and end a text, and what the chat template is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::template::MAX_SOURCE;
use crate::weights::TOOL_USE_TEMPLATE;
use crate::{Error, Result, outside};

/// The names transformers hands to chat templates.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template as the model brings it.
#[derive(Debug, Clone)]
pub struct TemplateSource {
    /// Where it stands.
    pub file: PathBuf,
    /// Its text.
    pub text: String,
    /// The text of the one beside it, `tool_use`, for chats with tools.
    pub tool_use: Option<String>,
}

/// What the files beside `tokenizer.json` say.
#[derive(Debug, Default)]
pub struct TokenizerConfig {
    /// `bos_token`, `eos_token`, … and their text, those that are set.
    pub special: BTreeMap<String, String>,
    /// The template for chats, and the one beside it for those with tools.
    pub template: Option<TemplateSource>,
    /// Tokens that end a generation by `generation_config.json`, or else by `config.json`.
    pub eos_ids: Vec<u32>,
}

impl TokenizerConfig {
    /// Reads them from `folder`; each may be absent.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut config = Self::default();
        // `add_bos_token` and `add_eos_token` are passed over: beside a tokenizer.json, transformers 5 drops them.
        let path = folder.join("tokenizer_config.json");
        if let Some(object) = read_object(&path)? {
            config.read_special_tokens(&path, &object)?;
            config.set_templates(&path, named_templates(&path, object.get("chat_template"))?);
        }
        // Written by older versions, and looked at for what the other file leaves open.
        let path = folder.join("special_tokens_map.json");
        if let Some(object) = read_object(&path)? {
            config.read_special_tokens(&path, &object)?;
        }
        config.read_template_files(folder)?;
        for name in ["generation_config.json", "config.json"] {
            let path = folder.join(name);
            if config.eos_ids.is_empty()
                && let Some(object) = read_object(&path)?
            {
                config.eos_ids = eos_ids(&path, object.get("eos_token_id"))?;
            }
        }
        Ok(config)
    }

    /// Takes them out of what a GGUF file stands for, [`crate::weights::gguf::tokenizer::files`].
    pub fn of_gguf(path: &Path, files: &BTreeMap<&str, String>) -> Result<Self> {
        let mut config = Self::default();
        let object = |name: &str| -> Result<Map<String, Value>> {
            let text = files.get(name).map_or("{}", String::as_str);
            serde_json::from_str(text).map_err(|error| Error::input(format!("{}: {name}: {error}", path.display())))
        };
        config.read_special_tokens(path, &object("tokenizer_config.json")?)?;
        config.eos_ids = eos_ids(path, object("generation_config.json")?.get("eos_token_id"))?;
        let named = [("default", "chat_template.jinja"), ("tool_use", TOOL_USE_TEMPLATE)];
        let text = |(name, file): (&str, &str)| Some((name.to_owned(), files.get(file)?.clone()));
        config.set_templates(path, named.into_iter().filter_map(text).collect());
        Ok(config)
    }

    /// Takes the template named `default`, where there is one, and the one for tools beside it.
    fn set_templates(&mut self, file: &Path, mut named: BTreeMap<String, String>) {
        let Some(text) = named.remove("default") else { return };
        let tool_use = named.remove("tool_use");
        self.template = Some(TemplateSource { file: file.to_owned(), text, tool_use });
    }

    fn read_special_tokens(&mut self, path: &Path, object: &Map<String, Value>) -> Result<()> {
        for name in SPECIAL_TOKENS {
            if let Some(token) = special_token(path, name, object.get(name))? {
                self.special.entry(name.to_owned()).or_insert(token);
            }
        }
        Ok(())
    }

    /// `chat_template.jinja` goes before `tokenizer_config.json`; `chat_template.json`, an older way, comes last.
    /// `additional_chat_templates/` holds those for special chats.
    fn read_template_files(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join("chat_template.jinja");
        if let Some(text) = read_template(&path)? {
            let tool_use = read_template(&folder.join(TOOL_USE_TEMPLATE))?.map(|text| ("tool_use".to_owned(), text));
            self.set_templates(&path, [("default".to_owned(), text)].into_iter().chain(tool_use).collect());
        }
        if self.template.is_none() {
            let path = folder.join("chat_template.json");
            if let Some(object) = read_object(&path)? {
                self.set_templates(&path, named_templates(&path, object.get("chat_template"))?);
            }
        }
        Ok(())
    }
}

fn read_template(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read_if_present(path, MAX_SOURCE)? else { return Ok(None) };
    let not_text = |_| Error::input(format!("{}: not UTF-8 text; fetch the file again", path.display()));
    String::from_utf8(bytes).map(Some).map_err(not_text)
}

/// The bytes of a file of at most `most`, or nothing where there is no such file.
pub(super) fn read_if_present(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        _ => outside::read(path, most).map(Some),
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(bytes) = read_if_present(path, outside::MAX_JSON)? else { return Ok(None) };
    outside::json(&bytes).map(Some).map_err(|error| {
        Error::input(format!("{}: expected a JSON object: {error}; fetch the model's files again", path.display()))
    })
}

fn malformed(path: &Path, key: &str, expected: &str) -> Error {
    Error::input(format!("{}: `{key}` must be {expected}; fetch the model's files again or mend it", path.display()))
}

/// A token written as text or as `{"content": text, …}`.
fn special_token(path: &Path, name: &str, value: Option<&Value>) -> Result<Option<String>> {
    let content = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
        Some(other) => other.as_str(),
    };
    match content {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(malformed(path, name, "text or an object with a text `content`")),
    }
}

/// Templates by name; a single one is the `default`.
fn named_templates(path: &Path, value: Option<&Value>) -> Result<BTreeMap<String, String>> {
    let malformed = || malformed(path, "chat_template", "text or a list of {name, template}");
    let named = |template: &Value| {
        let text = |key: &str| template.get(key).and_then(Value::as_str).map(str::to_owned);
        Some((text("name")?, text("template")?))
    };
    match value {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(text)) => Ok([("default".to_owned(), text.clone())].into()),
        Some(Value::Array(templates)) => {
            templates.iter().map(|template| named(template).ok_or_else(malformed)).collect()
        }
        Some(_) => Err(malformed()),
    }
}

fn eos_ids(path: &Path, value: Option<&Value>) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| malformed(path, "eos_token_id", "a token id or a list of token ids"))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => Ok(vec![id(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn read(files: &[(&str, &str)]) -> Result<TokenizerConfig> {
        TokenizerConfig::read(folder(files).path())
    }

    #[test]
    fn tokens_are_text_or_objects() {
        let config = read(&[(
            "tokenizer_config.json",
            r#"{"bos_token": null, "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<pad>"}"#,
        )])
        .unwrap();
        let expected = [("eos_token", "</s>"), ("pad_token", "<pad>")];
        assert_eq!(config.special, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    #[test]
    fn the_older_file_fills_gaps() {
        let config = ("tokenizer_config.json", r#"{"eos_token": "a"}"#);
        let map = ("special_tokens_map.json", r#"{"eos_token": "b", "bos_token": {"content": "c"}}"#);
        let special = read(&[config, map]).unwrap().special;
        assert_eq!((special["eos_token"].as_str(), special["bos_token"].as_str()), ("a", "c"));
    }

    #[test]
    fn the_jinja_file_goes_before_the_config_and_json_comes_last() {
        let config = ("tokenizer_config.json", r#"{"chat_template": "from config"}"#);
        let json = ("chat_template.json", r#"{"chat_template": "from json"}"#);
        let jinja = ("chat_template.jinja", "from jinja");
        let text = |files: &[_]| read(files).unwrap().template.map(|t| t.text);
        assert_eq!(text(&[config, json, jinja]).as_deref(), Some("from jinja"));
        assert_eq!(text(&[config, json]).as_deref(), Some("from config"));
        assert_eq!(text(&[json]).as_deref(), Some("from json"));
        assert_eq!(text(&[]), None);
    }

    #[test]
    fn of_named_templates_the_default_is_taken() {
        let named =
            r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        let template = read(&[("tokenizer_config.json", named)]).unwrap().template.unwrap();
        assert_eq!((template.text.as_str(), template.tool_use.as_deref()), ("D", Some("T")));
        let folder = folder(&[("chat_template.jinja", "D")]);
        let for_tools = || TokenizerConfig::read(folder.path()).unwrap().template.unwrap().tool_use;
        assert_eq!(for_tools(), None);
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        std::fs::write(folder.path().join(TOOL_USE_TEMPLATE), "T").unwrap();
        assert_eq!(for_tools().as_deref(), Some("T"));
    }

    #[test]
    fn a_gguf_file_may_bring_a_template_for_tools() {
        let of = |files: &[(&'static str, &str)]| {
            let files: BTreeMap<&str, String> = files.iter().map(|(name, text)| (*name, text.to_string())).collect();
            TokenizerConfig::of_gguf(Path::new("small.gguf"), &files).unwrap()
        };
        let both = of(&[("chat_template.jinja", "D"), (TOOL_USE_TEMPLATE, "T")]);
        let both = both.template.unwrap();
        assert_eq!((both.text.as_str(), both.tool_use.as_deref()), ("D", Some("T")));
        assert_eq!(of(&[("chat_template.jinja", "D")]).template.unwrap().tool_use, None);
    }

    #[test]
    fn generation_config_goes_before_config_for_eos_ids() {
        let generation = ("generation_config.json", r#"{"eos_token_id": [5, 6]}"#);
        let model = ("config.json", r#"{"eos_token_id": 7}"#);
        assert_eq!(read(&[generation, model]).unwrap().eos_ids, [5, 6]);
        assert_eq!(read(&[("generation_config.json", "{}"), model]).unwrap().eos_ids, [7]);
    }

    #[test]
    fn malformed_files_are_named() {
        for (file, text, says) in [
            ("tokenizer_config.json", "[]", "expected a JSON object"),
            ("tokenizer_config.json", r#"{"eos_token": 3}"#, "`eos_token` must be text"),
            ("tokenizer_config.json", r#"{"chat_template": {}}"#, "`chat_template` must be text"),
            ("tokenizer_config.json", r#"{"chat_template": [3]}"#, "`chat_template` must be text"),
            ("generation_config.json", r#"{"eos_token_id": -1}"#, "`eos_token_id` must be a token id"),
            ("config.json", r#"{"eos_token_id": [1, "x"]}"#, "`eos_token_id` must be a token id"),
        ] {
            let error = read(&[(file, text)]).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains(file) && error.to_string().contains(says), "{error}");
        }
    }
}
