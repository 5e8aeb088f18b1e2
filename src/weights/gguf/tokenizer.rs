//! A GGUF file's tokenizer as the files of the folder that it was converted from: `tokenizer.json`,
//! `tokenizer_config.json` and `generation_config.json`.
//!
//! llama.cpp knows two kinds that are read here: byte-level BPE ("gpt2"), whose way of cutting text into words goes by
//! a name, and SentencePiece's BPE ("llama"), whose merges are what its scores order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value, json};

use super::super::folder::TOOL_USE_TEMPLATE;
use super::metadata::Metadata;
use crate::Result;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const PRE: &str = "tokenizer.ggml.pre";

/// Types of tokens, by llama.cpp's numbers.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The template for chats with tools, as gguf-py names it.
pub const TOOL_USE: &str = "tokenizer.chat_template.tool_use";

/// The added tokens of a Phi-3 that leave the spaces after them.
pub const PHI3_LEAVING: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Whether an added token of a Phi-3 takes the spaces after it.
pub fn phi3_takes_spaces(token: &str) -> bool {
    !PHI3_LEAVING.contains(&token)
}

/// Whether a model is a Phi-3, as llama.cpp knows one.
fn is_phi3(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["phi-3", "phi3"].iter().any(|part| name.contains(part))
}

/// Ends of a turn: Llama 3's, ChatML's, Phi's, Gemma's.
const TURN_ENDS: [&str; 4] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"];

/// Bytes of a SentencePiece token: all ways to cut it in two are looked at.
const LONGEST_PIECE: usize = 1024;
/// Ways to put a token together from two others, on average: published vocabularies have 2 (Llama 2, Gemma), and one of
/// runs of one letter would have hundreds, of 150 bytes each.
const MERGES_A_TOKEN: usize = 16;

/// Words as Llama 3 cuts them: numbers by up to three digits.
pub const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits.
pub const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: words are cut where case changes.
pub const GPT4O_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's since Nemo: as GPT-4o's, without its suffixes, and with single digits.
pub const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a byte-level tokenizer cuts text into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// As GPT-2.
    Gpt2,
    /// As GPT-2, after every digit has become a word.
    Digits,
    /// By an expression; with NFC before it.
    Split(&'static str, bool),
}

/// llama.cpp's names, how they cut, and whether a word that is a token as a whole is never split.
const PRE_TOKENIZERS: [(&str, Words, bool); 14] = [
    ("gpt-2", Words::Gpt2, false),
    ("olmo", Words::Gpt2, false),
    ("smollm", Words::Digits, false),
    ("starcoder", Words::Digits, false),
    ("refact", Words::Digits, false),
    ("llama-bpe", Words::Split(LLAMA3_WORDS, false), true),
    ("llama3", Words::Split(LLAMA3_WORDS, false), true),
    ("llama-v3", Words::Split(LLAMA3_WORDS, false), true),
    ("smaug-bpe", Words::Split(LLAMA3_WORDS, false), false),
    ("dbrx", Words::Split(LLAMA3_WORDS, false), false),
    ("qwen2", Words::Split(QWEN2_WORDS, true), false),
    ("deepseek-r1-qwen", Words::Split(QWEN2_WORDS, true), false),
    ("gpt-4o", Words::Split(GPT4O_WORDS, false), false),
    ("tekken", Words::Split(TEKKEN_WORDS, false), true),
];

/// llama.cpp's names of ways to cut words, of those that are read.
pub fn pre_names() -> [&'static str; 14] {
    PRE_TOKENIZERS.map(|row| row.0)
}

/// llama.cpp's name of a way to cut words, if it has one.
pub fn pre_name(words: Words, whole_words: bool) -> Option<&'static str> {
    PRE_TOKENIZERS.iter().find(|row| row.1 == words && row.2 == whole_words).map(|row| row.0)
}

impl Words {
    /// The `normalizer` and `pre_tokenizer` of `tokenizer.json`.
    pub fn sections(self) -> (Value, Value) {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let sequence = |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
        match self {
            Self::Gpt2 => (Value::Null, bytes(true)),
            Self::Digits => (Value::Null, sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true))),
            Self::Split(expression, nfc) => {
                let split = json!({
                    "type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false,
                });
                (if nfc { json!({"type": "NFC"}) } else { Value::Null }, sequence(split, bytes(false)))
            }
        }
    }
}

/// The folder's files, name and text.
///
/// # Errors
/// [`crate::Error::Input`] naming the key that is missing, contradicts another, or is of a kind that is not read.
pub fn files(metadata: &Metadata) -> Result<BTreeMap<&'static str, String>> {
    let tokens = metadata.texts(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?;
    let types = metadata.numbers(TYPES)?.unwrap_or_else(|| vec![1.0; tokens.len()]);
    if types.len() != tokens.len() {
        return Err(
            metadata.bad(TYPES, &format!("{} types for {} tokens; fetch another file", types.len(), tokens.len()))
        );
    }
    let types: Vec<i64> = types.into_iter().map(|kind| kind as i64).collect();
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(*token, id) {
            return Err(
                metadata.bad(TOKENS, &format!("{token:?} stands twice, as {first} and {id}; fetch another file"))
            );
        }
    }
    let vocabulary = Vocabulary { metadata, tokens, types, ids };
    let model = "tokenizer.ggml.model";
    let (mut tokenizer, bos_by_default) = match metadata.text(model)?.ok_or_else(|| metadata.missing(model))? {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => (vocabulary.sentence_piece()?, true),
        other => {
            return Err(
                metadata.bad(model, &format!("{other:?} is not read; gpt2 and llama are. Use the model's folder"))
            );
        }
    };
    tokenizer.insert("version".into(), json!("1.0"));
    tokenizer.insert("truncation".into(), Value::Null);
    tokenizer.insert("padding".into(), Value::Null);
    tokenizer.insert("added_tokens".into(), vocabulary.added_tokens()?);
    tokenizer.insert("post_processor".into(), vocabulary.post_processor(bos_by_default)?);

    let mut config = Map::new();
    for (name, kind) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, token)) = vocabulary.special(kind)? {
            config.insert(name.into(), json!(token));
        }
    }
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    let mut generation = Map::new();
    generation.insert("eos_token_id".into(), json!(vocabulary.ends()?));
    let mut files = BTreeMap::from([
        ("tokenizer.json", Value::Object(tokenizer).to_string()),
        ("tokenizer_config.json", format!("{:#}\n", Value::Object(config))),
        ("generation_config.json", format!("{:#}\n", Value::Object(generation))),
    ]);
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        files.insert("chat_template.jinja", template.to_string());
    }
    if let Some(template) = metadata.text(TOOL_USE)? {
        files.insert(TOOL_USE_TEMPLATE, template.to_string());
    }
    Ok(files)
}

struct Vocabulary<'a> {
    metadata: &'a Metadata,
    tokens: Vec<&'a str>,
    types: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

impl Vocabulary<'_> {
    /// The id and text of a token with a part to play.
    fn special(&self, kind: &str) -> Result<Option<(usize, &str)>> {
        let key = format!("tokenizer.ggml.{kind}_token_id");
        let Some(id) = self.metadata.size(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| Some((id, *self.tokens.get(id)?)));
        let outside = || {
            self.metadata.bad(&key, &format!("{id} is no token: there are {}; fetch another file", self.tokens.len()))
        };
        token.map(Some).ok_or_else(outside)
    }

    /// The tokens that end a generation. Converters of chat models leave the end of a turn to be known by its text, as
    /// llama.cpp knows it.
    fn ends(&self) -> Result<BTreeSet<usize>> {
        let stated = [self.special("eos")?, self.special("eot")?, self.special("eom")?];
        let mut ends: BTreeSet<usize> = stated.iter().flatten().map(|(id, _)| *id).collect();
        if stated[1].is_none() {
            let added = |id: &&usize| [CONTROL, USER_DEFINED].contains(&self.types[**id]);
            ends.extend(TURN_ENDS.iter().find_map(|token| self.ids.get(token).filter(added)));
        }
        Ok(ends)
    }

    fn vocab(&self) -> Value {
        Value::Object(self.tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect())
    }

    /// No key says which of them take the spaces around them: llama.cpp goes by the model's name, and so do we.
    fn added_tokens(&self) -> Result<Value> {
        let phi3 = self.metadata.text("general.name")?.is_some_and(is_phi3);
        let token = |(id, kind): (usize, &i64)| {
            let content = self.tokens[id];
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": phi3 && phi3_takes_spaces(content), "normalized": false, "special": *kind != USER_DEFINED,
            })
        };
        let added = self.types.iter().enumerate().filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
        Ok(added.map(token).collect())
    }

    /// BOS before and EOS after a text, as the file asks for.
    fn post_processor(&self, bos_by_default: bool) -> Result<Value> {
        let wanted =
            |name: &str, default| Result::Ok(self.metadata.flag(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default));
        let bos = if wanted("add_bos_token", bos_by_default)? { self.special("bos")? } else { None };
        let eos = if wanted("add_eos_token", false)? { self.special("eos")? } else { None };
        let token = |special: &Option<(usize, &str)>| {
            special.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": 0}}))
        };
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let around = |id: &str| [token(&bos), Some(text(id)), token(&eos)].into_iter().flatten().collect::<Vec<_>>();
        let named =
            |(id, token): (usize, &str)| (token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
        let special: Map<String, Value> = [bos, eos].into_iter().flatten().map(named).collect();
        let pair = [around("A"), around("B")].concat();
        Ok(json!({
            "type": "TemplateProcessing", "single": around("A"), "pair": pair,
            "special_tokens": special,
        }))
    }

    /// Byte-level BPE: the sections of `tokenizer.json`, and whether BOS stands before a text where nothing is said.
    fn byte_level(&self) -> Result<(Map<String, Value>, bool)> {
        let metadata = self.metadata;
        let name = metadata.text(PRE)?.ok_or_else(|| metadata.missing(PRE))?;
        let Some((_, words, whole_words)) = PRE_TOKENIZERS.iter().find(|row| row.0 == name) else {
            let reason = format!("{name:?} is not read; {} are. Use the model's folder", pre_names().join(", "));
            return Err(metadata.bad(PRE, &reason));
        };
        let merges = metadata.texts(MERGES)?.ok_or_else(|| metadata.missing(MERGES))?;
        let pair =
            |merge: &&str| match merge.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => Ok(json!([left, right])),
                _ => Err(metadata
                    .bad(MERGES, &format!("{merge:?} is not two parts with a space between; fetch another file"))),
            };
        let merges = merges.iter().map(pair).collect::<Result<Vec<_>>>()?;
        let (normalizer, pre_tokenizer) = words.sections();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        let sections = Map::from_iter([
            ("normalizer".to_string(), normalizer),
            ("pre_tokenizer".to_string(), pre_tokenizer),
            ("decoder".to_string(), byte_level),
            (
                "model".to_string(),
                json!({
                    "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                    "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
                    "ignore_merges": whole_words, "vocab": self.vocab(), "merges": merges,
                }),
            ),
        ]);
        Ok((sections, *whole_words))
    }

    /// SentencePiece's BPE, as transformers converts it.
    fn sentence_piece(&self) -> Result<Map<String, Value>> {
        let metadata = self.metadata;
        let scores = metadata.numbers(SCORES)?.ok_or_else(|| metadata.missing(SCORES))?;
        if scores.len() != self.tokens.len() {
            return Err(metadata.bad(
                SCORES,
                &format!("{} numbers for {} tokens; fetch another file", scores.len(), self.tokens.len()),
            ));
        }
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(metadata.bad(SCORES, &format!("that of token {id} is no number; fetch another file")));
        }
        let cleaned = metadata.flag("tokenizer.ggml.remove_extra_whitespaces")? == Some(true);
        for (key, stated) in [
            ("tokenizer.ggml.remove_extra_whitespaces", cleaned),
            ("tokenizer.ggml.precompiled_charsmap", metadata.value("tokenizer.ggml.precompiled_charsmap").is_some()),
        ] {
            if stated {
                return Err(metadata.bad(key, "texts that are changed first are not read; use the model's folder"));
            }
        }
        if let Some(id) = self.tokens.iter().position(|token| token.len() > LONGEST_PIECE) {
            return Err(metadata
                .bad(TOKENS, &format!("token {id} has more than {LONGEST_PIECE} bytes; use the model's folder")));
        }
        let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", "▁")];
        let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = match self.special("unknown")? {
            Some((_, token)) => Some(token),
            None => self.types.iter().position(|kind| *kind == UNKNOWN).map(|id| self.tokens[id]),
        };
        Ok(Map::from_iter([
            ("normalizer".to_string(), json!({"type": "Sequence", "normalizers": normalizers})),
            ("pre_tokenizer".to_string(), Value::Null),
            ("decoder".to_string(), json!({"type": "Sequence", "decoders": decoders})),
            (
                "model".to_string(),
                json!({
                    "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                    "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                    "vocab": self.vocab(), "merges": self.merges(&scores)?,
                }),
            ),
        ]))
    }

    /// Every way to put a token together from two others, in the order in which SentencePiece would: the best score
    /// first, and among equals the longer parts, as transformers sorts them.
    ///
    /// # Errors
    /// Where there are more than [`MERGES_A_TOKEN`].
    fn merges(&self, scores: &[f64]) -> Result<Value> {
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let halves = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let known = |(left, right)| Some((*self.ids.get(left)?, *self.ids.get(right)?, left, right));
            let mut of_token: Vec<_> = halves.filter_map(known).collect();
            of_token.sort_by_key(|(left, right, ..)| (*left, *right));
            if merges.len() + of_token.len() > MERGES_A_TOKEN * self.tokens.len() {
                let why = format!("its tokens can be put together in more than {MERGES_A_TOKEN} ways each");
                return Err(self.metadata.bad(TOKENS, &format!("{why}; use the model's folder")));
            }
            merges.extend(of_token.into_iter().map(|(_, _, left, right)| (scores[id], left, right)));
        }
        let length = |text: &str| std::cmp::Reverse(text.chars().count());
        merges.sort_by(|a, b| {
            b.0.total_cmp(&a.0).then_with(|| (length(a.1), length(a.2)).cmp(&(length(b.1), length(b.2))))
        });
        Ok(merges.into_iter().map(|(_, left, right)| json!([left, right])).collect())
    }
}
