//! A folder's tokenizer as GGUF metadata: the way back of [`crate::weights::gguf::tokenizer`].

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};

use crate::data::TokenizerConfig;
use crate::keys::object_file;
use crate::model::Config;
use crate::weights::gguf::tokenizer::{
    GPT4O_WORDS, LLAMA3_WORDS, PHI3_LEAVING, QWEN2_WORDS, TEKKEN_WORDS, TOOL_USE, Words, phi3_takes_spaces, pre_name,
};
use crate::weights::gguf::writer::Keys;
use crate::{Error, Result};

/// Types of tokens, by llama.cpp's numbers.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Adds the tokenizer and the chat template of a folder.
///
/// # Errors
/// [`Error::Input`] where the tokenizer is of a kind that GGUF has no name for.
pub fn describe(keys: &mut Keys, folder: &Path, config: &Config) -> Result<()> {
    let path = folder.join("tokenizer.json");
    let tokenizer = object_file(&path)?;
    let refuse = |reason: &str| {
        Error::input(format!("{}: {reason}, which is not written as GGUF; choose --to nf4", path.display()))
    };
    let model = tokenizer.get("model").and_then(Value::as_object).ok_or_else(|| refuse("it has no model"))?;
    if model.get("type").and_then(Value::as_str) != Some("BPE") {
        return Err(refuse("its model is no BPE"));
    }
    let vocab = model.get("vocab").and_then(Value::as_object).ok_or_else(|| refuse("it has no vocabulary"))?;
    let mut tokens: Vec<Option<String>> = vec![None; config.vocab_size];
    let mut types = vec![NORMAL; config.vocab_size];
    let row = |id: u64| usize::try_from(id).ok().filter(|id| *id < config.vocab_size);
    let no_tokens = Vec::new();
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).unwrap_or(&no_tokens);
    let mut beyond = HashSet::new();
    for token in added {
        let (Some(id), Some(content)) = (token["id"].as_u64(), token["content"].as_str()) else {
            return Err(refuse("an added token has no id or no content"));
        };
        match row(id) {
            Some(row) => {
                tokens[row] = Some(content.to_string());
                types[row] = if token["special"].as_bool() == Some(true) { CONTROL } else { USER_DEFINED };
            }
            // as Gemma 3 has one for images: the model has no row for it, so the file cannot have one
            None => {
                beyond.insert(content);
            }
        }
    }
    for (token, id) in vocab {
        match id.as_u64().and_then(row) {
            Some(row) => tokens[row] = tokens[row].take().or_else(|| Some(token.clone())),
            None if beyond.contains(token.as_str()) => {}
            None => return Err(refuse(&format!("its token {token:?} has no row in the model"))),
        }
    }
    let tokens: Vec<String> = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| {
            token.unwrap_or_else(|| {
                types[id] = UNUSED;
                format!("[PAD{id}]")
            })
        })
        .collect();
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    // llama.cpp knows by the model's name alone that tokens take spaces
    match as_phi3(added, &ids) {
        Ok(true) => keys.text("general.name", "Phi-3"),
        Ok(false) => {}
        Err(token) => {
            let what = "takes the spaces around it or stands for whole words alone (lstrip, rstrip, single_word)";
            return Err(refuse(&format!("its added token {token:?} {what}")));
        }
    }
    let merges = merges(model).ok_or_else(|| refuse("its merges are not pairs"))?;
    if model.get("byte_fallback").and_then(Value::as_bool) == Some(true) {
        for id in 0..256 {
            if let Some(id) = ids.get(format!("<0x{id:02X}>").as_str()) {
                types[*id] = BYTE;
            }
        }
        if let Some(id) = model.get("unk_token").and_then(Value::as_str).and_then(|token| ids.get(token)) {
            types[*id] = UNKNOWN;
        }
        keys.text("tokenizer.ggml.model", "llama");
        keys.text("tokenizer.ggml.pre", "default");
        keys.numbers("tokenizer.ggml.scores", &scores(&tokens, &merges));
        let prefix = space_prefix(&tokenizer)
            .ok_or_else(|| refuse("it puts spaces before words in a way that llama.cpp does not"))?;
        keys.flag("tokenizer.ggml.add_space_prefix", prefix);
    } else {
        let whole_words = model.get("ignore_merges").and_then(Value::as_bool).unwrap_or(false);
        let pre = words(&tokenizer).and_then(|words| pre_name(words, whole_words));
        keys.text("tokenizer.ggml.model", "gpt2");
        keys.text(
            "tokenizer.ggml.pre",
            pre.ok_or_else(|| refuse("it cuts words in a way that llama.cpp has no name for"))?,
        );
        let joined: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        keys.texts("tokenizer.ggml.merges", joined.iter().map(String::as_str));
    }
    keys.texts("tokenizer.ggml.tokens", tokens.iter().map(String::as_str));
    keys.integers("tokenizer.ggml.token_type", &types);
    keys.flag("tokenizer.ggml.add_bos_token", leads_with_special(tokenizer.get("post_processor")));
    let eos = special(keys, folder, config, &ids)?;
    match trailing(tokenizer.get("post_processor")).as_slice() {
        [] => {}
        [token] if eos.is_some() && ids.get(*token).map(|id| *id as u32) == eos => {
            keys.flag("tokenizer.ggml.add_eos_token", true);
        }
        _ => return Err(refuse("it puts other tokens than its end token after a text")),
    }
    Ok(())
}

/// Whether added tokens take the spaces after them, all as llama.cpp has a Phi-3's do so; the first that takes any
/// where they do so otherwise.
fn as_phi3<'a>(added: &'a [Value], ids: &HashMap<&str, usize>) -> std::result::Result<bool, &'a str> {
    let set = |token: &Value, key: &str| token[key].as_bool() == Some(true);
    let content = |token: &'a Value| token["content"].as_str().unwrap_or_default();
    let written: Vec<&Value> = added.iter().filter(|&token| ids.contains_key(content(token))).collect();
    let takes_any = |token: &Value| ["lstrip", "rstrip", "single_word"].iter().any(|key| set(token, key));
    let Some(first) = written.iter().find(|token| takes_any(token)) else { return Ok(false) };
    // llama.cpp does not load a model of that name without these
    let known = PHI3_LEAVING.iter().chain(&["</s>"]).all(|token| ids.contains_key(*token));
    let fits = |token: &&'a Value| {
        let otherwise = set(token, "lstrip") || set(token, "single_word");
        !otherwise && set(token, "rstrip") == phi3_takes_spaces(content(token))
    };
    if known && written.iter().all(fits) { Ok(true) } else { Err(content(first)) }
}

fn merges(model: &Map<String, Value>) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(left, right)| (left.to_string(), right.to_string())),
        Value::Array(pair) => Some((pair.first()?.as_str()?.to_string(), pair.get(1)?.as_str()?.to_string())),
        _ => None,
    };
    model.get("merges")?.as_array()?.iter().map(pair).collect()
}

/// Whether a SentencePiece tokenizer puts a space before a text and after each special token, as llama.cpp does; `None`
/// where it does so in another way, as `Metaspace` does, which leaves it out where there is one.
fn space_prefix(tokenizer: &Map<String, Value>) -> Option<bool> {
    let section = |name: &str| tokenizer.get(name).filter(|section| !section.is_null());
    let kind = |section: &Value| section["type"].as_str().unwrap_or_default().to_string();
    let spaces = |section: &Value| {
        kind(section) == "Replace" && section["pattern"]["String"] == " " && section["content"] == "▁"
    };
    let steps = match section("normalizer") {
        Some(one) if kind(one) == "Sequence" => one["normalizers"].as_array()?.clone(),
        one => one.cloned().into_iter().collect(),
    };
    let cut = section("pre_tokenizer");
    // no space is left to cut at where all have been replaced
    let whole = cut.is_none_or(|cut| kind(cut) == "Split" && cut["pattern"]["String"] == " ");
    match steps.as_slice() {
        [] => cut
            .filter(|cut| kind(cut) == "Metaspace" && cut["prepend_scheme"] == "never" && cut["split"] == false)
            .map(|_| false),
        [one] if spaces(one) && whole => Some(false),
        [first, one] if kind(first) == "Prepend" && first["prepend"] == "▁" && spaces(one) && whole => Some(true),
        _ => None,
    }
}

/// SentencePiece orders merges by the score of what they make: the earlier, the higher.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut rank = HashMap::new();
    for (at, (left, right)) in merges.iter().enumerate() {
        rank.entry(format!("{left}{right}")).or_insert(at);
    }
    tokens.iter().map(|token| -(*rank.get(token).unwrap_or(&merges.len()) as f32)).collect()
}

/// How words are cut, where it is one of the known ways.
fn words(tokenizer: &Map<String, Value>) -> Option<Words> {
    let section = |name: &str| without_offsets(tokenizer.get(name).cloned().unwrap_or(Value::Null));
    let ours = (section("normalizer"), section("pre_tokenizer"));
    let split = [LLAMA3_WORDS, QWEN2_WORDS, GPT4O_WORDS, TEKKEN_WORDS]
        .into_iter()
        .flat_map(|e| [Words::Split(e, false), Words::Split(e, true)]);
    [Words::Gpt2, Words::Digits].into_iter().chain(split).find(|words| {
        let (normalizer, pre_tokenizer) = words.sections();
        (without_offsets(normalizer), without_offsets(pre_tokenizer)) == ours
    })
}

/// `trim_offsets` says nothing of the tokens.
fn without_offsets(mut section: Value) -> Value {
    match &mut section {
        Value::Object(map) => {
            map.shift_remove("trim_offsets");
            map.values_mut().for_each(|value| *value = without_offsets(value.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| *value = without_offsets(value.take())),
        _ => {}
    }
    section
}

/// Whether a post-processor puts a special token before a text.
fn leads_with_special(processor: Option<&Value>) -> bool {
    let Some(processor) = processor else { return false };
    let inner = processor.get("processors").and_then(Value::as_array);
    processor.pointer("/single/0/SpecialToken").is_some()
        || inner.is_some_and(|inner| inner.iter().any(|one| leads_with_special(Some(one))))
}

/// The special tokens that a post-processor puts after a text.
fn trailing(processor: Option<&Value>) -> Vec<&str> {
    let list = |key: &str| processor.and_then(|processor| processor.get(key)?.as_array()).into_iter().flatten();
    let after = list("single").skip_while(|piece| piece.get("Sequence").is_none());
    let own = after.filter_map(|piece| piece.pointer("/SpecialToken/id")?.as_str());
    own.chain(list("processors").flat_map(|inner| trailing(Some(inner)))).collect()
}

/// The tokens with a part to play, and the chat templates; the token that ends a text.
fn special(keys: &mut Keys, folder: &Path, config: &Config, ids: &HashMap<&str, usize>) -> Result<Option<u32>> {
    let stated = TokenizerConfig::read(folder)?;
    let token = |name: &str| stated.special.get(name).and_then(|token| ids.get(token.as_str())).map(|id| *id as u32);
    let fits = |id: u32| (id as usize) < config.vocab_size;
    let eos = token("eos_token").or(stated.eos_ids.first().copied());
    // GGUF has a key each for the ends of a text, a turn and a message. Without the second a reader looks for one by
    // its text, so where the folder has no other end it is the first again.
    let others: BTreeSet<u32> = stated.eos_ids.iter().copied().filter(|id| Some(*id) != eos && fits(*id)).collect();
    let mut other_ends = others.into_iter();
    for (name, id) in [
        ("bos", token("bos_token").or(config.bos_token_id)),
        ("eos", eos),
        ("eot", other_ends.next().or(eos)),
        ("eom", other_ends.next()),
        ("unknown", token("unk_token")),
        ("padding", token("pad_token")),
    ] {
        if let Some(id) = id.filter(|id| fits(*id)) {
            keys.size(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    if let Some(template) = stated.template {
        keys.text("tokenizer.chat_template", &template.text);
        if let Some(template) = template.tool_use {
            keys.texts("tokenizer.chat_templates", ["tool_use"].into_iter());
            keys.text(TOOL_USE, &template);
        }
    }
    Ok(eos)
}
