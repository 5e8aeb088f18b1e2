//! A GGUF file's metadata as the `config.json` of the folder that it was converted from.

use serde_json::{Map, Value, json};

use super::blocks::GgmlType;
use super::file::GgufFile;
use super::names::Architecture;
use crate::weights::dtype::DType;
use crate::{Error, Result};

/// The frequencies' divisors that Llama 3.1 files carry in place of its rope scaling.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// The architecture of a file.
///
/// # Errors
/// [`Error::Input`] where the file is no model, or of an architecture that is not read.
pub fn architecture(file: &GgufFile) -> Result<Architecture> {
    let metadata = file.metadata();
    let shown = metadata.path().display();
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(Error::input(format!("{shown}: it holds a {kind:?}, not a model; name the model's file")));
    }
    if metadata.size("split.count")?.is_some_and(|count| count > 1) {
        return Err(Error::input(format!(
            "{shown}: it is one part of several; join them with llama.cpp's `llama-gguf-split --merge FIRST OUT`"
        )));
    }
    let name = metadata.text("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture"))?;
    Architecture::find(name).ok_or_else(|| {
        let reason = format!("{name:?} is not read from GGUF; {} are. Use the model's folder", Architecture::known());
        metadata.bad("general.architecture", &reason)
    })
}

/// What the folder's `config.json` says.
///
/// # Errors
/// [`Error::Input`] naming the key that is missing or means something that is not read.
pub fn config(file: &GgufFile) -> Result<Map<String, Value>> {
    let architecture = architecture(file)?;
    let metadata = file.metadata();
    let key = |name: &str| format!("{}.{name}", architecture.name);
    let size = |name: &str| metadata.size(&key(name));
    let needed = |name: &str| size(name)?.ok_or_else(|| metadata.missing(&key(name)));

    if size("expert_count")?.is_some_and(|count| count > 0) {
        return Err(metadata.bad(&key("expert_count"), "mixtures of experts are not read from GGUF"));
    }
    let (hidden, heads) = (needed("embedding_length")?, needed("attention.head_count")?);
    let head_dim = match size("attention.key_length")? {
        Some(stated) => stated,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(metadata.bad(&key("attention.head_count"), "it does not divide embedding_length")),
    };
    if let Some(other) = size("attention.value_length")?.filter(|other| *other != head_dim) {
        return Err(metadata.bad(&key("attention.value_length"), &format!("{other}, where keys have {head_dim}")));
    }
    if let Some(other) = size("rope.dimension_count")?.filter(|other| *other != head_dim) {
        let reason = format!("{other} of a head's {head_dim}: heads that rotate in part are not read from GGUF");
        return Err(metadata.bad(&key("rope.dimension_count"), &reason));
    }
    let rms = metadata.number(&key("attention.layer_norm_rms_epsilon"))?;
    let has = |tensor: &str| file.tensors().contains_key(tensor);
    let vocabulary = file.tensors().get("token_embd.weight").map(|tensor| tensor.shape[0]);
    let context = needed("context_length")?;

    let mut config = Map::new();
    let mut set = |name: &str, value: Value| {
        config.insert(name.to_string(), value);
    };
    set("architectures", json!([class_of(architecture.model_type)]));
    set("model_type", json!(architecture.model_type));
    set("hidden_size", json!(hidden));
    set("intermediate_size", json!(needed("feed_forward_length")?));
    set("num_hidden_layers", json!(needed("block_count")?));
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(size("attention.head_count_kv")?.unwrap_or(heads)));
    set("head_dim", json!(head_dim));
    set("vocab_size", json!(vocabulary));
    set("max_position_embeddings", json!(context));
    set("rms_norm_eps", json!(rms));
    set("tie_word_embeddings", json!(!has("output.weight")));
    set("attention_bias", json!(has("blk.0.attn_q.bias")));
    set("mlp_bias", json!(has("blk.0.ffn_up.bias")));
    set("hidden_act", json!("silu"));
    for (name, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
        set(name, json!(metadata.size(&format!("tokenizer.ggml.{id}_token_id"))?));
    }
    let rope = rope(file, architecture.name, context, head_dim as usize)?;
    set("rope_parameters", rope);
    Ok(config)
}

fn class_of(model_type: &str) -> &'static str {
    match model_type {
        "llama" => "LlamaForCausalLM",
        _ => "AutoModelForCausalLM",
    }
}

/// `rope_parameters`: base and scaling.
fn rope(file: &GgufFile, architecture: &str, context: u64, head_dim: usize) -> Result<Value> {
    let metadata = file.metadata();
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let theta = metadata.number(&key("freq_base"))?.unwrap_or(10_000.0);
    let mut rope = Map::from_iter([("rope_theta".to_string(), json!(theta))]);
    let mut set = |name: &str, value: Value| {
        rope.insert(name.to_string(), value);
    };
    let kind = match metadata.text(&key("scaling.type"))? {
        // older files state the factor alone
        None if metadata.number(&key("scale_linear"))?.is_some_and(|factor| factor != 1.0) => "linear",
        None | Some("none") => "default",
        Some(kind @ ("linear" | "yarn")) => kind,
        Some(other) => {
            return Err(metadata.bad(&key("scaling.type"), &format!("{other:?} is not read; linear and yarn are")));
        }
    };
    set("rope_type", json!(kind));
    if kind != "default" {
        let factor = match metadata.number(&key("scaling.factor"))? {
            Some(factor) => Some(factor),
            None => metadata.number(&key("scale_linear"))?,
        };
        set("factor", json!(factor));
        if let Some(original) = metadata.size(&key("scaling.original_context_length"))? {
            set("original_max_position_embeddings", json!(original));
        }
        for (name, stated) in [("attention_factor", "scaling.attn_factor"), ("beta_fast", "scaling.yarn_beta_fast")] {
            if let Some(number) = metadata.number(&key(stated))? {
                set(name, json!(number));
            }
        }
    }
    if file.tensors().contains_key(ROPE_FREQS) {
        if kind != "default" {
            return Err(metadata.bad(&key("scaling.type"), "it stands beside rope_freqs.weight, which scales too"));
        }
        let llama3 = llama3(file, theta, context, head_dim)?;
        rope.extend(llama3);
    }
    Ok(Value::Object(rope))
}

/// Llama 3.1's scaling, known again by its divisors: the file has these and not what they were computed from.
fn llama3(file: &GgufFile, theta: f64, context: u64, head_dim: usize) -> Result<Map<String, Value>> {
    // what every Llama 3.1, 3.2 and 3.3 has; the factor is the largest divisor
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    let metadata = file.metadata();
    let tensor = &file.tensors()[ROPE_FREQS];
    let refuse = |reason: &str| {
        Err(Error::input(format!(
            "{}: tensor {ROPE_FREQS:?} {reason}; use the model's folder",
            metadata.path().display()
        )))
    };
    if tensor.kind != GgmlType::F32 || tensor.shape != [head_dim / 2] {
        return refuse("is not one f32 for each frequency");
    }
    let mut divisors = vec![0f32; head_dim / 2];
    DType::F32.decode(&file.map()[tensor.range.clone()], &mut divisors);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    for (i, divisor) in divisors.iter().enumerate() {
        let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        let expected = if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        if (f64::from(*divisor) / expected - 1.0).abs() > 1e-4 {
            return refuse("holds another scaling than Llama 3's, which is not known from it");
        }
    }
    if factor == 1.0 || context as f64 <= ORIGINAL {
        return refuse("scales nothing, or beyond a context that is not longer than 8192");
    }
    let fields = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u64,
    });
    Ok(fields.as_object().cloned().unwrap_or_default())
}
