//! A decoder's shapes and traits as GGUF metadata: the way back of [`crate::weights::gguf::config`].
//!
//! What a file has no key for is as llama.cpp takes it to be, so a model that has it otherwise is not written.

use std::path::Path;

use serde_json::Value;

use super::To;
use crate::Error;
use crate::model::config::{Activation, Config};
use crate::model::rope::{Rope, RopeScaling};
use crate::weights::config_object;
use crate::weights::gguf::names::{Architecture, ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use crate::weights::gguf::writer::Keys;

/// Adds what there is to say, or says what cannot be said.
pub fn describe(keys: &mut Keys, row: &Architecture, config: &Config, to: To) -> Result<(), String> {
    check(row, config)?;
    let key = |part: &str| format!("{}.{part}", row.name);
    keys.text("general.architecture", row.name);
    keys.text("general.type", "model");
    keys.size("general.quantization_version", 2);
    // llama.cpp's numbers of mostly-Q8_0 and mostly-Q4_K (small) files
    keys.size("general.file_type", if to == To::Q8_0 { 7 } else { 14 });
    let rope = &config.ropes[0];
    for (part, value) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", rope.dim),
        ("vocab_size", config.vocab_size),
    ] {
        keys.size(&key(part), value as u32);
    }
    keys.number(&key("attention.layer_norm_rms_epsilon"), config.norm_eps as f32);
    keys.number(&key("rope.freq_base"), rope.theta as f32);
    if let RopeScaling::Linear { factor } = rope.scaling {
        keys.text(&key("rope.scaling.type"), "linear");
        keys.number(&key("rope.scaling.factor"), factor as f32);
    }
    if let [_, local] = config.ropes.as_slice() {
        keys.number(&key("rope.freq_base_swa"), local.theta as f32);
    }
    if row.keys.contains(&"attention.sliding_window") {
        keys.size(&key("attention.sliding_window"), config.sliding_window().unwrap_or(0) as u32);
    }
    for (part, cap) in [("attn_logit_softcapping", config.score_cap), ("final_logit_softcapping", config.logit_cap)] {
        if let Some(cap) = cap {
            keys.number(&key(part), cap as f32);
        }
    }
    match row.name {
        "granite" => {
            keys.number(&key("attention.scale"), config.layers[0].scale as f32);
            keys.number(&key("embedding_scale"), config.embedding_scale as f32);
            keys.number(&key("residual_scale"), config.residual_scale as f32);
            keys.number(&key("logit_scale"), config.logits_divisor as f32);
        }
        "phi3" => {
            let original = match rope.scaling {
                RopeScaling::Long { attention_factor, original_max, .. } => {
                    keys.number(&key("rope.scaling.attn_factor"), attention_factor as f32);
                    original_max
                }
                _ => config.max_position_embeddings,
            };
            keys.size(&key("rope.scaling.original_context_length"), original as u32);
        }
        _ => {}
    }
    Ok(())
}

/// The tensors that are no weights but what frequencies are divided by.
///
/// # Errors
/// [`Error::Input`] where the folder's config does not state LongRoPE's factors beyond the pretrained length.
pub fn factors(config: &Config, model: &Path) -> Result<Vec<(&'static str, Vec<f32>)>, Error> {
    let rope = &config.ropes[0];
    match &rope.scaling {
        RopeScaling::Llama3 { .. } => {
            let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
            let ((plain, _), (scaled, _)) = (plain.inverse_frequencies(0), rope.inverse_frequencies(0));
            Ok(vec![(ROPE_FREQS, plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())])
        }
        RopeScaling::Long { factors: short, .. } => {
            let (path, object) = config_object(model)?;
            let stated =
                ["rope_scaling", "rope_parameters"].iter().find_map(|key| object.get(*key)?.get("long_factor"));
            let number = |value: &Value| value.as_f64().map(|number| number as f32).filter(|number| *number > 0.0);
            let long = stated.and_then(Value::as_array).and_then(|list| list.iter().map(number).collect());
            let long: Vec<f32> =
                Option::filter(long, |long: &Vec<f32>| long.len() == short.len()).ok_or_else(|| {
                    let reason = format!("long_factor is no list of {} positive numbers", short.len());
                    Error::input(format!("{}: {reason}, which a GGUF file needs; choose --to nf4", path.display()))
                })?;
            Ok(vec![(ROPE_LONG, long), (ROPE_SHORT, short.iter().map(|factor| *factor as f32).collect())])
        }
        _ => Ok(Vec::new()),
    }
}

/// Says what llama.cpp would take to be otherwise.
fn check(row: &Architecture, config: &Config) -> Result<(), String> {
    let always = row.name == "qwen2";
    if config.qkv_bias != always || config.output_bias || config.mlp_bias {
        return Err(format!("a {} with such biases", row.name));
    }
    let activation = if row.one_added { Activation::GeluTanh } else { Activation::Silu };
    if config.activation != activation {
        return Err(format!("a {} with another activation than its own", row.name));
    }
    if row.name == "gemma2" && (config.score_cap.is_none() || config.logit_cap.is_none()) {
        return Err("a Gemma 2 without its soft caps".into());
    }
    for (i, rope) in config.ropes.iter().enumerate() {
        let written = match rope.scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { .. } => i == 0,
            RopeScaling::Llama3 { .. } => row.factors.contains(&ROPE_FREQS),
            RopeScaling::Long { .. } => row.factors.contains(&ROPE_LONG),
            RopeScaling::Dynamic { .. } | RopeScaling::Yarn { .. } => false,
        };
        if !written {
            return Err("its rope scaling".into());
        }
    }
    let [layers, hidden, heads, head_dim] =
        [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim].map(|n| n as u64);
    let scale = 1.0 / (row.score_width(layers, hidden, heads, head_dim) as f64).sqrt();
    let window = config.sliding_window();
    for (layer, number) in config.layers.iter().zip(1u64..) {
        let slides = match row.windows_but {
            Some(every) => !number.is_multiple_of(every),
            None => row.name == "phi3",
        };
        if layer.window != window.filter(|_| slides) {
            return Err(format!("a {} with windows in these layers", row.name));
        }
        if layer.rope.is_none() != row.still.is_some_and(|every| number.is_multiple_of(every)) {
            return Err(format!("a {} with heads that turn in these layers", row.name));
        }
        if row.name != "granite" && layer.scale != scale {
            return Err(format!("a {} with scores scaled in its own way", row.name));
        }
    }
    Ok(())
}
