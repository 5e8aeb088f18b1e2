//! `config.json`: the shapes and switches of a decoder, as transformers 4 and 5 write them.

use std::path::Path;

use serde_json::Value;

use super::family::Family;
use super::rope::{Rope, RopeScaling, yarn_attention_factor};
use crate::Result;
use crate::keys::Keys;
use crate::weights::config_object;

/// The pretrained length of a model that was stretched; beside `rope_parameters` or within.
const ORIGINAL_MAX: &str = "original_max_position_embeddings";

/// What a decoder looks like. One that exists is consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which kind of decoder it is.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width within the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads a layer.
    pub num_attention_heads: usize,
    /// Key and value heads a layer; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Added to the mean square in a norm.
    pub rms_norm_eps: f64,
    /// How positions become angles.
    pub rope: Rope,
    /// The longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// A token attends to itself and to so many less one before it; `None`: to all before it.
    pub sliding_window: Option<usize>,
    /// Begins a text.
    pub bos_token_id: Option<u32>,
    /// Any of these ends a text.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// Reads `config.json` in a model's folder, or what stands for it in a GGUF file.
    ///
    /// # Errors
    /// [`crate::Error::Input`] naming the file and the key.
    pub fn read(folder: &Path) -> Result<Self> {
        let (path, object) = config_object(folder)?;
        Self::from_keys(&Keys::of(&path, &object))
    }

    fn from_keys(keys: &Keys) -> Result<Self> {
        let model_type = keys.text("model_type")?.ok_or_else(|| keys.missing("model_type"))?;
        let family = Family::find(model_type)
            .ok_or_else(|| keys.bad("model_type", &format!("{model_type:?} is not read; {} are", Family::known())))?;
        let activation = keys.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(keys.bad("hidden_act", &format!("{activation:?} is not read; silu is")));
        }

        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let num_key_value_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let heads = format!("{num_key_value_heads} does not divide num_attention_heads, {num_attention_heads}");
            return Err(keys.bad("num_key_value_heads", &heads));
        }
        let head_dim = match keys.optional_size("head_dim")? {
            Some(stated) => stated,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(keys.bad("hidden_size", "it is no multiple of num_attention_heads, nor is head_dim stated"));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(keys.bad("head_dim", &format!("{head_dim} is odd: its halves are rotated in pairs")));
        }
        let max_position_embeddings = keys.size("max_position_embeddings")?;

        Ok(Self {
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            rms_norm_eps: keys.positive("rms_norm_eps")?.ok_or_else(|| keys.missing("rms_norm_eps"))?,
            rope: rope(keys, max_position_embeddings, head_dim)?,
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: family.biases && keys.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: family.biases && keys.flag("mlp_bias")?.unwrap_or(false),
            sliding_window: if family.sliding_window { sliding_window(keys)? } else { None },
            bos_token_id: token_ids(keys, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(keys, "eos_token_id")?,
            family,
        })
    }
}

/// Mistral's: 4096 where the key is absent, none where it is null. transformers' Mistral looks at no other switch.
fn sliding_window(keys: &Keys) -> Result<Option<usize>> {
    match keys.raw("sliding_window") {
        None => Ok(Some(4096)),
        Some(_) => keys.optional_size("sliding_window"),
    }
}

fn token_ids(keys: &Keys, key: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = |value: &Value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    };
    Ok(keys.typed(key, "a token id or a list of them", ids)?.unwrap_or_default())
}

/// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
fn rope(top: &Keys, max_position_embeddings: usize, head_dim: usize) -> Result<Rope> {
    // transformers lets a rope_scaling win over rope_parameters, and a theta inside over one outside.
    let keys = match top.object("rope_scaling")? {
        Some(keys) => keys,
        None => top.object("rope_parameters")?.unwrap_or_else(|| top.clone()),
    };
    let theta = match keys.positive("rope_theta")? {
        Some(theta) => theta,
        None => top.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    if theta <= 1.0 {
        return Err(top.bad("rope_theta", &format!("{theta} is not above 1")));
    }
    for keys in [top, &keys] {
        if keys.positive("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            return Err(keys.bad("partial_rotary_factor", "heads that rotate in part are not read"));
        }
    }
    let kind = match keys.text("rope_type")? {
        Some(kind) => kind,
        None => keys.text("type")?.unwrap_or("default"),
    };
    let factor = || match keys.positive("factor")? {
        Some(factor) if factor >= 1.0 => Ok(factor),
        Some(factor) => Err(keys.bad("factor", &format!("{factor} is below 1"))),
        None => Err(keys.missing("factor")),
    };
    let original_max = || -> Result<usize> {
        let (outside, inside) = (top.optional_size(ORIGINAL_MAX)?, keys.optional_size(ORIGINAL_MAX)?);
        Ok(outside.or(inside).unwrap_or(max_position_embeddings))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" if head_dim < 4 => return Err(top.bad("head_dim", "dynamic rope scaling needs heads of at least 4")),
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, original_max: max_position_embeddings },
        "yarn" => {
            let original_max = original_max()?;
            // A stated null means the ratio of the two lengths.
            let factor = match keys.raw("factor") {
                Some(Value::Null) => max_position_embeddings as f64 / original_max as f64,
                _ => factor()?,
            };
            let attention_factor = match keys.positive("attention_factor")? {
                Some(stated) => stated,
                None => yarn_attention_factor(factor, keys.number("mscale")?, keys.number("mscale_all_dim")?),
            };
            RopeScaling::Yarn {
                factor,
                original_max,
                beta_fast: keys.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("beta_slow")?.unwrap_or(1.0),
                attention_factor,
                truncate: keys.flag("truncate")?.unwrap_or(true),
            }
        }
        "llama3" => {
            let low_freq_factor = keys.positive("low_freq_factor")?.ok_or_else(|| keys.missing("low_freq_factor"))?;
            let high_freq_factor =
                keys.positive("high_freq_factor")?.ok_or_else(|| keys.missing("high_freq_factor"))?;
            if high_freq_factor <= low_freq_factor {
                return Err(
                    keys.bad("high_freq_factor", &format!("it is not above low_freq_factor, {low_freq_factor}"))
                );
            }
            RopeScaling::Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_max: original_max()? }
        }
        other => {
            let read = format!("{other:?} is not read; default, linear, dynamic, yarn and llama3 are");
            return Err(keys.bad("rope_type", &read));
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &Value) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        Config::read(folder.path())
    }

    fn llama() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 512
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = llama();
        config[key] = value;
        config
    }

    #[test]
    fn what_is_not_stated_has_transformers_defaults() {
        let config = read(&llama()).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
        assert_eq!((config.sliding_window, config.bos_token_id, config.eos_token_ids), (None, None, vec![]));
    }

    #[test]
    fn what_is_stated_is_kept() {
        let mut config = llama();
        config["num_key_value_heads"] = json!(2);
        config["head_dim"] = json!(32);
        config["tie_word_embeddings"] = json!(true);
        config["bos_token_id"] = json!(1);
        config["eos_token_id"] = json!([2, 7]);
        let config = read(&config).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.tie_word_embeddings), (2, 32, true));
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 7]));
    }

    #[test]
    fn the_window_is_mistrals_alone() {
        assert_eq!(read(&with("sliding_window", json!(7))).unwrap().sliding_window, None);
        let mut mistral = with("model_type", json!("mistral"));
        assert_eq!(read(&mistral).unwrap().sliding_window, Some(4096));
        mistral["sliding_window"] = json!(7);
        assert_eq!(read(&mistral).unwrap().sliding_window, Some(7));
        mistral["sliding_window"] = Value::Null;
        assert_eq!(read(&mistral).unwrap().sliding_window, None);
    }

    #[test]
    fn bad_configs_name_the_key() {
        let rope = |value: Value| with("rope_scaling", value);
        let cases = [
            (with("model_type", json!("gemma3")), "model_type: \"gemma3\" is not read; llama, mistral are"),
            (with("model_type", Value::Null), "model_type: it is missing"),
            (with("hidden_act", json!("gelu")), "hidden_act: \"gelu\" is not read"),
            (with("hidden_size", json!("64")), "hidden_size: \"64\" is not a whole number"),
            (with("hidden_size", json!(0)), "hidden_size: 0 is not a whole number from 1"),
            (with("hidden_size", json!(-4)), "hidden_size: -4 is not"),
            (with("hidden_size", json!(1u64 << 40)), "hidden_size: 1099511627776 is not"),
            (with("hidden_size", json!(66)), "hidden_size: it is no multiple"),
            (with("hidden_size", json!(12)), "head_dim: 3 is odd"),
            (with("num_hidden_layers", json!(2.5)), "num_hidden_layers: 2.5 is not"),
            (with("vocab_size", Value::Null), "vocab_size: it is missing"),
            (with("num_key_value_heads", json!(3)), "num_key_value_heads: 3 does not divide"),
            (with("rms_norm_eps", json!(0)), "rms_norm_eps: 0 is not a positive number"),
            (with("rms_norm_eps", json!(1e300)), "rms_norm_eps: 1e+300 is not a positive number"),
            (with("tie_word_embeddings", json!("yes")), "tie_word_embeddings: \"yes\" is not true or false"),
            (with("eos_token_id", json!([2, -1])), "eos_token_id: [2,-1] is not a token id"),
            (with("rope_theta", json!(0.5)), "rope_theta: 0.5 is not above 1"),
            (with("partial_rotary_factor", json!(0.5)), "partial_rotary_factor: heads that rotate in part"),
            (with("rope_scaling", json!([1])), "rope_scaling: [1] is not an object"),
            (rope(json!({"type": "longrope", "factor": 2})), "rope_scaling.rope_type: \"longrope\" is not read"),
            (rope(json!({"type": "linear"})), "rope_scaling.factor: it is missing"),
            (rope(json!({"type": "dynamic", "factor": 0.5})), "rope_scaling.factor: 0.5 is below 1"),
            (rope(json!({"rope_type": "llama3", "factor": 8})), "rope_scaling.low_freq_factor: it is missing"),
            (
                rope(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
                "rope_scaling.high_freq_factor: it is not above",
            ),
            (
                with("rope_parameters", json!({"rope_type": "yarn", "factor": "4"})),
                "rope_parameters.factor: \"4\" is not",
            ),
        ];
        for (config, reason) in cases {
            let error = read(&config).expect_err(reason);
            let said = error.to_string();
            assert!(said.contains(&format!("config.json: {reason}")), "said {said:?}, not {reason:?}");
            assert_eq!(error.exit_code(), 3);
        }
    }

    #[test]
    fn frequencies_are_those_of_transformers() {
        let cases: Vec<Value> = serde_json::from_str(include_str!("../../tests/fixtures/rope.json")).unwrap();
        for case in &cases {
            let config = read(&case["config"]).unwrap();
            let seq_len = case["seq_len"].as_u64().unwrap() as usize;
            let (ours, factor) = config.rope.inverse_frequencies(config.head_dim, seq_len);
            let theirs = case["inverse_frequencies"].as_array().unwrap();
            assert_eq!(ours.len(), theirs.len());
            let pairs = ours.into_iter().chain([factor]).zip(theirs.iter().chain([&case["attention_factor"]]));
            for (i, (ours, theirs)) in pairs.enumerate() {
                let (ours, theirs) = (f64::from(ours), theirs.as_f64().unwrap());
                let error = ((ours - theirs) / theirs).abs();
                assert!(error <= 1e-6, "{} at {seq_len}, number {i}: {ours} for {theirs}", case["name"]);
            }
        }
        assert!(cases.len() >= 15);
    }
}
