//! Which files of a model repository are needed: its shapes, its tokenizer, its weights as safetensors; nothing else.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::repo::is_relative;
use crate::{Error, Result, outside};

/// Without these no model can be trained.
pub(super) const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Used where they exist.
pub(super) const OPTIONAL: [&str; 7] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "quantize_config.json",
];
/// The weights in one file; it goes before the index, as in transformers.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// Which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The required files that a snapshot lacks, by name; the shards that its index names among them.
///
/// # Errors
/// `Error::Input` for an index that cannot be read.
pub(super) fn missing(snapshot: &Path) -> Result<Vec<String>> {
    let lacks = |file: &&str| !snapshot.join(file).exists();
    let mut missing: Vec<String> = REQUIRED.iter().filter(|f| lacks(f)).map(|f| f.to_string()).collect();
    if snapshot.join(WEIGHTS).exists() {
        return Ok(missing);
    }
    let index = snapshot.join(INDEX);
    match index.exists() {
        true => missing.extend(shards(&index)?.into_iter().filter(|shard| lacks(&shard.as_str()))),
        false => missing.push(WEIGHTS.to_string()),
    }
    Ok(missing)
}

/// The names of the shards in an index, sorted.
///
/// # Errors
/// `Error::Input` for an index without `weight_map`, or with a name that is no safetensors file beside it.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let text = outside::read(index, outside::MAX_JSON)?;
    let bad = |why: String| Error::input(format!("{}: {why}", index.display()));
    let json: Value = outside::json(&text).map_err(|e| bad(format!("not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| bad("no `weight_map` from tensors to files".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str().filter(|f| f.ends_with(".safetensors") && is_relative(f)) {
            Some(name) => names.insert(name.to_string()),
            None => return Err(bad(format!("`weight_map` sends {tensor} to {file}, which is no safetensors file"))),
        };
    }
    match names.is_empty() {
        true => Err(bad("`weight_map` names no file".into())),
        false => Ok(names.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(INDEX);
        std::fs::write(&file, text).unwrap();
        shards(&file)
    }

    #[test]
    fn an_index_names_each_shard_once() {
        let text = r#"{"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        assert_eq!(index(text).unwrap(), ["m-1.safetensors", "m-2.safetensors"]);
    }

    #[test]
    fn an_index_that_leads_elsewhere_is_refused() {
        for (text, why) in [
            ("{", "not JSON"),
            ("[]", "weight_map"),
            (r#"{"weight_map": {}}"#, "names no file"),
            (r#"{"weight_map": {"a": "pytorch_model.bin"}}"#, "pytorch_model.bin"),
            (r#"{"weight_map": {"a": "../a.safetensors"}}"#, "../a.safetensors"),
            (r#"{"weight_map": {"a": "/a.safetensors"}}"#, "/a.safetensors"),
            (r#"{"weight_map": {"a": 1}}"#, "sends a to 1"),
        ] {
            let error = index(text).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(INDEX), "{text}: {error}");
        }
    }

    #[test]
    fn a_snapshot_lacks_the_shards_that_its_index_names() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(missing(folder.path()).unwrap(), ["config.json", "tokenizer.json", WEIGHTS]);
        for file in REQUIRED {
            std::fs::write(folder.path().join(file), "{}").unwrap();
        }
        std::fs::write(folder.path().join(INDEX), r#"{"weight_map": {"a": "m-1.safetensors"}}"#).unwrap();
        assert_eq!(missing(folder.path()).unwrap(), ["m-1.safetensors"]);
        std::fs::write(folder.path().join("m-1.safetensors"), "").unwrap();
        assert!(missing(folder.path()).unwrap().is_empty());
    }
}
