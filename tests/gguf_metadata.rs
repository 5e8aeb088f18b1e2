//! GGUF metadata that lie, contradict each other or mean something that is not read: one clear error each, which names
//! the file, the key or tensor and what to do; and what keys mean that no fixture has.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dpo_lora::data::Tokenizer;
use dpo_lora::model::Config;
use dpo_lora::weights::ModelFolder;
use dpo_lora::weights::gguf::GgmlType;
use dpo_lora::weights::gguf::writer::{GgufWriter, Keys};
use dpo_lora::{Error, Result};

/// A value of a key.
#[derive(Debug, Clone)]
enum Told {
    Size(u32),
    Number(f32),
    Text(&'static str),
    Flag(bool),
    Sizes(&'static [i32]),
    Texts(&'static [&'static str]),
    Numbers(&'static [f32]),
}
use Told::{Flag, Number, Numbers, Size, Sizes, Text, Texts};

/// A file of an architecture that is in order: one layer, 4 heads of 8.
struct File {
    keys: BTreeMap<String, Told>,
    tensors: BTreeMap<String, Vec<usize>>,
}

impl File {
    fn of(architecture: &str) -> Self {
        let name = ALL.into_iter().find(|name| *name == architecture).unwrap();
        let mut keys = BTreeMap::from([("general.architecture".to_string(), Text(name))]);
        for (part, told) in [
            ("embedding_length", Size(32)),
            ("feed_forward_length", Size(16)),
            ("block_count", Size(1)),
            ("context_length", Size(64)),
            ("attention.head_count", Size(4)),
            ("attention.head_count_kv", Size(2)),
            ("attention.layer_norm_rms_epsilon", Number(1e-5)),
            ("rope.freq_base", Number(1000.0)),
        ] {
            keys.insert(format!("{architecture}.{part}"), told);
        }
        if architecture == "granite" {
            keys.insert("granite.logit_scale".into(), Number(2.0));
        }
        let mut tensors = BTreeMap::from([("token_embd.weight".to_string(), vec![6, 32])]);
        tensors.insert("output_norm.weight".into(), vec![32]);
        tensors.insert("blk.0.attn_output.weight".into(), vec![32, 32]);
        tensors.insert("blk.0.ffn_down.weight".into(), vec![32, 16]);
        Self { keys, tensors }
    }

    fn key(mut self, key: &str, told: Told) -> Self {
        self.keys.insert(key.into(), told);
        self
    }

    fn without(mut self, key: &str) -> Self {
        assert!(self.keys.remove(key).is_some(), "{key}");
        self
    }

    fn tensor(mut self, name: &str, shape: &[usize]) -> Self {
        self.tensors.insert(name.into(), shape.to_vec());
        self
    }

    /// What is said of it as a model's config and as its tensors.
    fn read(&self) -> Result<(Config, ModelFolder)> {
        let place = tempfile::tempdir().unwrap();
        let path = self.write(place.path());
        Ok((Config::read(&path)?, ModelFolder::open(&path)?))
    }

    /// What is said of its tokenizer.
    fn tokenizer(&self) -> Result<Tokenizer> {
        let place = tempfile::tempdir().unwrap();
        Tokenizer::open(&self.write(place.path()))
    }

    fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("small.gguf");
        let mut keys = Keys::default();
        for (key, told) in &self.keys {
            match told {
                Size(size) => keys.size(key, *size),
                Number(number) => keys.number(key, *number),
                Text(text) => keys.text(key, text),
                Flag(flag) => keys.flag(key, *flag),
                Sizes(sizes) => keys.integers(key, sizes),
                Texts(texts) => keys.texts(key, texts.iter().copied()),
                Numbers(numbers) => keys.numbers(key, numbers),
            }
        }
        let entries: Vec<_> =
            self.tensors.iter().map(|(name, shape)| (name.clone(), GgmlType::F32, shape.clone())).collect();
        let mut bytes = Vec::new();
        let mut writer = GgufWriter::begin(&mut bytes, &keys, &entries).unwrap();
        for shape in self.tensors.values() {
            writer.write(&1f32.to_le_bytes().repeat(shape.iter().product())).unwrap();
            writer.end_tensor().unwrap();
        }
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn refused(&self, says: &[&str]) {
        Self::said(self.read().err(), says);
    }

    fn tokenizer_refused(&self, says: &[&str]) {
        Self::said(self.tokenizer().err(), says);
    }

    fn said(error: Option<Error>, says: &[&str]) {
        let said = error.unwrap_or_else(|| panic!("read, where {says:?} is due"));
        assert_eq!(said.exit_code(), 3, "{said}");
        for part in says.iter().chain(&["small.gguf: "]) {
            assert!(said.to_string().contains(part), "said {said}, not {part:?}");
        }
    }
}

const ALL: [&str; 9] = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"];

#[test]
fn a_file_in_order_is_read() {
    for architecture in ALL {
        let (config, _) = File::of(architecture).read().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((config.num_attention_heads, config.head_dim, config.vocab_size), (4, 8, 6), "{architecture}");
        assert!(config.tie_word_embeddings);
    }
}

#[test]
fn keys_that_are_missing_or_impossible_are_named() {
    for architecture in ALL {
        let key = |part: &str| format!("{architecture}.{part}");
        for part in ["embedding_length", "feed_forward_length", "block_count", "context_length", "attention.head_count"]
        {
            File::of(architecture).without(&key(part)).refused(&[&key(part), "it is missing", "fetch another"]);
            File::of(architecture).key(&key(part), Size(0)).refused(&[&key(part), "it is 0", "fetch another"]);
            File::of(architecture).key(&key(part), Text("7")).refused(&[&key(part), "it is not a whole number"]);
            File::of(architecture).key(&key(part), Sizes(&[7])).refused(&[&key(part), "it is not a whole number"]);
        }
        let eps = key("attention.layer_norm_rms_epsilon");
        File::of(architecture).without(&eps).refused(&[&eps, "it is missing"]);
        for part in ["attention.layer_norm_rms_epsilon", "rope.freq_base"] {
            for number in [0.0, -1.0, f32::NAN, f32::INFINITY] {
                File::of(architecture).key(&key(part), Number(number)).refused(&[&key(part), "is not above 0"]);
            }
        }
        File::of(architecture).key(&key("rope.freq_base"), Number(0.5)).refused(&["rope.freq_base", "is not above 1"]);
        for (part, size, says) in [
            ("attention.head_count", 5, "does not divide"),
            ("attention.head_count_kv", 3, "does not divide"),
            ("attention.value_length", 4, "where keys have 8"),
            ("attention.key_length_swa", 4, "where keys have 8"),
            ("block_count", 5, "5 layers in 4 tensors"),
            ("expert_count", 2, "mixtures of experts"),
        ] {
            File::of(architecture).key(&key(part), Size(size)).refused(&[&key(part), says]);
        }
    }
    File::of("gemma3").without("gemma3.rope.freq_base").refused(&["gemma3.rope.freq_base: it is missing"]);
    File::of("granite").without("granite.logit_scale").refused(&["granite.logit_scale: it is missing"]);
    File::of("granite").key("granite.logit_scale", Number(f32::NAN)).refused(&["granite.logit_scale", "above 0"]);
    let cap = "gemma2.final_logit_softcapping";
    File::of("gemma2").key(cap, Number(-30.0)).refused(&[cap, "is not above 0"]);
}

#[test]
fn what_would_change_the_computation_and_is_not_read_is_refused() {
    for architecture in ALL {
        let key = |part: &str| format!("{architecture}.{part}");
        for part in
            ["attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale", "rope.scaling.alpha", "logit_scale"]
        {
            if architecture != "granite" || !["attention.scale", "logit_scale"].contains(&part) {
                File::of(architecture).key(&key(part), Number(2.0)).refused(&[&key(part), "use the model's folder"]);
                assert!(File::of(architecture).key(&key(part), Number(0.0)).read().is_ok(), "{architecture} {part}");
            }
        }
        File::of(architecture).key(&key("attention.causal"), Flag(false)).refused(&["attention.causal", "look ahead"]);
        if !["gemma2", "gemma3", "phi3"].contains(&architecture) {
            let window = key("attention.sliding_window");
            File::of(architecture).key(&window, Size(63)).refused(&[&window, "use the model's folder"]);
            assert!(File::of(architecture).key(&window, Size(64)).read().is_ok(), "a window of all tokens");
        }
        let kind = key("rope.scaling.type");
        File::of(architecture).key(&kind, Text("evil")).refused(&[
            &kind,
            "\"evil\" is not read",
            "Use the model's folder",
        ]);
        File::of(architecture).key(&kind, Text("linear")).refused(&["rope.scaling.factor: it is missing"]);
        let linear = File::of(architecture).key(&kind, Text("linear"));
        linear.key(&key("rope.scaling.factor"), Number(0.5)).refused(&["rope.scaling.factor", "below 1"]);
        let own = key("rope.scaling.attn_factor");
        File::of(architecture).key(&own, Number(1.5)).refused(&[&own, "use the model's folder"]);
    }
    File::of("llama").key("llama.rope.dimension_count", Size(4)).refused(&["rope.dimension_count", "in part"]);
    let turned = File::of("granite").key("granite.rope.scaling.finetuned", Flag(false));
    turned.refused(&["granite.rope.scaling.finetuned", "do not turn"]);
    let base = "gemma2.rope.freq_base_swa";
    File::of("gemma2").key(base, Number(7.0)).refused(&[base, "use the model's folder"]);
}

#[test]
fn windows_and_bases_of_gemma_are_as_the_file_says() {
    let windows = |file: File| -> Vec<Option<usize>> {
        let tensors = (1..7).fold(file, |file, i| file.tensor(&format!("blk.{i}.ffn_down.weight"), &[32, 16]));
        let (config, _) = tensors.read().unwrap();
        config.layers.iter().map(|layer| layer.window).collect()
    };
    let seven = |architecture: &str| File::of(architecture).key(&format!("{architecture}.block_count"), Size(7));
    let (window, pattern) = ("gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern");
    let five = Some(5);
    assert_eq!(windows(seven("gemma3")), [None; 7]);
    assert_eq!(windows(seven("gemma3").key(window, Size(5))), [five, five, five, five, five, None, five]);
    let three = seven("gemma3").key(window, Size(5)).key(pattern, Size(3));
    assert_eq!(windows(three), [five, five, None, five, five, None, five]);
    let each = seven("gemma3").key(window, Size(5)).key(pattern, Sizes(&[0, 1, 1, 0, 0, 0, 1]));
    assert_eq!(windows(each), [None, five, five, None, None, None, five]);
    let short = seven("gemma3").key(window, Size(5)).key(pattern, Sizes(&[0, 1]));
    (1..7)
        .fold(short, |file, i| file.tensor(&format!("blk.{i}.ffn_down.weight"), &[32, 16]))
        .refused(&[pattern, "it tells of 2 layers"]);
    let usual = Some(4096);
    assert_eq!(windows(seven("gemma2")), [usual, None, usual, None, usual, None, usual]);
    assert_eq!(windows(seven("gemma2").key("gemma2.attention.sliding_window", Size(0))), [None; 7]);

    let (config, _) = File::of("gemma3").key("gemma3.rope.freq_base_swa", Number(500.0)).read().unwrap();
    assert_eq!(config.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [1000.0, 500.0]);
    let (config, _) = File::of("gemma3").read().unwrap();
    assert_eq!(config.ropes.iter().map(|rope| rope.theta).collect::<Vec<_>>(), [1000.0, 10_000.0]);
}

/// llama.cpp goes by the number of layers: no key says it.
#[test]
fn scores_of_the_largest_gemmas_are_scaled_by_hidden_size_over_heads() {
    for (architecture, layers, width) in [("gemma2", 46, 8), ("gemma2", 45, 16), ("gemma3", 62, 8), ("gemma3", 46, 16)]
    {
        let key = |part: &str| format!("{architecture}.{part}");
        let file = File::of(architecture).key(&key("attention.key_length"), Size(16));
        let file = file.key(&key("attention.value_length"), Size(16)).key(&key("block_count"), Size(layers));
        let file = (1..layers).fold(file, |file, i| file.tensor(&format!("blk.{i}.ffn_down.weight"), &[32, 16]));
        let (config, _) = file.read().unwrap();
        assert_eq!(config.layers[0].scale, 1.0 / f64::from(width).sqrt(), "{architecture} of {layers} layers");
    }
}

#[test]
fn factors_of_longrope_are_whole_or_refused() {
    let original = "phi3.rope.scaling.original_context_length";
    let both = || {
        let file = File::of("phi3").key(original, Size(32)).key("phi3.rope.dimension_count", Size(6));
        file.tensor("rope_factors_long.weight", &[3]).tensor("rope_factors_short.weight", &[3])
    };
    let (config, _) = both().read().unwrap();
    assert_eq!((config.ropes[0].dim, config.longest_exact().unwrap().0), (6, 32));
    both().without(original).refused(&[original, "it is missing"]);
    both().tensor("rope_factors_short.weight", &[4]).refused(&["rope_factors_short.weight", "one f32 for each"]);
    both().key("phi3.rope.dimension_count", Size(10)).refused(&["phi3.rope.dimension_count", "10 of a head's 8"]);
    let mut one = both();
    one.tensors.remove("rope_factors_long.weight");
    one.refused(&["rope_factors_long.weight", "is missing"]);
    File::of("phi3").key("phi3.rope.scaling.type", Text("longrope")).refused(&["phi3.rope.scaling.type", "without"]);
    File::of("qwen2").tensor("rope_factors_long.weight", &[4]).refused(&["is no part of a model", "qwen2"]);
}

#[test]
fn tensors_that_belong_to_no_model_are_refused() {
    for architecture in ALL {
        File::of(architecture).tensor("blk.0.nextn.eh_proj.weight", &[32, 32]).refused(&["is no part of a model"]);
        File::of(architecture).tensor("blk.1.ffn_down.weight", &[32, 16]).refused(&["is of no layer", "block_count"]);
        let mut headless = File::of(architecture);
        headless.tensors.remove("token_embd.weight");
        headless.refused(&["token_embd.weight", "fetch another"]);
    }
    File::of("llama").tensor("blk.0.attn_output.bias", &[32]).refused(&["attn_output.bias", "stands without"]);
    File::of("gemma2").tensor("blk.0.attn_q.bias", &[32]).refused(&["attn_q.bias", "is no part of a model"]);
    File::of("llama").tensor("blk.0.attn_q.weight", &[30, 32]).refused(&["not made of heads of 8"]);
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const PRE: &str = "tokenizer.ggml.pre";
const MODEL: &str = "tokenizer.ggml.model";

fn byte_level() -> File {
    let file = File::of("qwen2").key(MODEL, Text("gpt2")).key(PRE, Text("qwen2"));
    let file = file.key(TOKENS, Texts(&["<end>", "a", "b", "ab", "\u{120}", "\u{120}a"]));
    let file = file.key(TYPES, Sizes(&[3, 1, 1, 1, 1, 1])).key(MERGES, Texts(&["a b", "\u{120} a"]));
    file.key("tokenizer.ggml.eos_token_id", Size(0))
}

fn sentence_piece() -> File {
    let file = File::of("gemma3").key(MODEL, Text("llama")).key(PRE, Text("default"));
    let file = file.key(TOKENS, Texts(&["<end>", "<unk>", "a", "\u{2581}", "\u{2581}a", "aa"]));
    let file = file.key(TYPES, Sizes(&[3, 2, 1, 1, 1, 1])).key(SCORES, Numbers(&[0.0, 0.0, -3.0, -4.0, -1.0, -2.0]));
    file.key("tokenizer.ggml.eos_token_id", Size(0)).key("tokenizer.ggml.add_bos_token", Flag(false))
}

#[test]
fn tokenizers_that_lie_or_are_not_known_are_refused() {
    assert_eq!(byte_level().tokenizer().unwrap().encode("ab a<end>", true).unwrap(), [3, 5, 0]);
    // the space before the first word, and the better of two ways to put three letters together
    assert_eq!(sentence_piece().tokenizer().unwrap().encode("aaa", true).unwrap(), [4, 5]);
    let bare = sentence_piece().key("tokenizer.ggml.add_space_prefix", Flag(false)).tokenizer().unwrap();
    assert_eq!(bare.encode("aa a", true).unwrap(), [5, 4]);

    for file in [byte_level, sentence_piece] {
        for key in [MODEL, TOKENS] {
            file().without(key).tokenizer_refused(&[key, "it is missing", "fetch another"]);
            file().key(key, Size(3)).tokenizer_refused(&[key, "it is not a"]);
        }
        for model in ["bert", "t5", "rwkv", "no_vocab", "gemma4"] {
            file().key(MODEL, Text(model)).tokenizer_refused(&[MODEL, "is not read; gpt2 and llama are", "folder"]);
        }
        file().key(TYPES, Sizes(&[1])).tokenizer_refused(&[TYPES, "1 types for 6 tokens"]);
        file().key(TOKENS, Texts(&["a", "a"])).key(TYPES, Sizes(&[1, 1])).tokenizer_refused(&[TOKENS, "stands twice"]);
        let end = "tokenizer.ggml.eos_token_id";
        file().key(end, Size(6)).tokenizer_refused(&[end, "6 is no token: there are 6"]);
        file().without(end).tokenizer_refused(&["end"]);
    }
    byte_level().without(PRE).tokenizer_refused(&[PRE, "it is missing"]);
    byte_level().key(PRE, Text("evil")).tokenizer_refused(&[
        PRE,
        "\"evil\" is not read; gpt-2, ",
        "Use the model's folder",
    ]);
    byte_level().without(MERGES).tokenizer_refused(&[MERGES, "it is missing"]);
    byte_level().key(MERGES, Texts(&["ab"])).tokenizer_refused(&[MERGES, "two parts"]);
    byte_level().key(MERGES, Texts(&["a x"])).tokenizer_refused(&["not a usable tokenizer"]);
    sentence_piece().without(SCORES).tokenizer_refused(&[SCORES, "it is missing"]);
    sentence_piece().key(SCORES, Numbers(&[1.0])).tokenizer_refused(&[SCORES, "1 numbers for 6 tokens"]);
    let nan = Numbers(&[0.0, 0.0, f32::NAN, -4.0, -1.0, -2.0]);
    sentence_piece().key(SCORES, nan).tokenizer_refused(&[SCORES, "no number"]);
    // runs of one letter: each is put together from any two that are as long as it
    let runs: Vec<&str> =
        (1..60).map(|n| &"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"[..n]).collect();
    let runs = sentence_piece().key(TOKENS, Texts([&["<end>"], &runs[..]].concat().leak()));
    let runs = runs.key(TYPES, Sizes([1; 60].to_vec().leak())).key(SCORES, Numbers([0.0; 60].to_vec().leak()));
    runs.tokenizer_refused(&[TOKENS, "in more than 16 ways each", "use the model's folder"]);
    for key in ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"] {
        let told = if key.ends_with("charsmap") { Sizes(&[1]) } else { Flag(true) };
        sentence_piece().key(key, told).tokenizer_refused(&[key, "use the model's folder"]);
    }
}
