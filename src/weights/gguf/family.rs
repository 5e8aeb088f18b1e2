//! What single architectures have in their metadata, and what llama.cpp takes for granted of them, as keys of
//! `config.json`.

use serde_json::{Map, Value, json};

use super::config::{Reader, Sizes};
use super::metadata::Value as Stored;
use crate::Result;

/// Where a Gemma 2 file does not say what a window is.
const GEMMA2_WINDOW: u64 = 4096;

pub(super) fn config(reader: &Reader, sizes: Sizes) -> Result<Map<String, Value>> {
    let mut keys = Map::new();
    let mut set = |name: &str, value: Value| {
        keys.insert(name.to_string(), value);
    };
    let biases = |part: &str| json!(reader.has(&format!("blk.0.{part}.bias")));
    match reader.row.name {
        "gemma2" | "gemma3" => {
            set("hidden_activation", json!("gelu_pytorch_tanh"));
            let width = reader.row.score_width(sizes.layers, sizes.hidden, sizes.heads, sizes.head_dim);
            set("query_pre_attn_scalar", json!(width));
            for cap in ["attn_logit_softcapping", "final_logit_softcapping"] {
                // what Gemma 2's files leave out is as its config has it
                match reader.positive(cap)? {
                    Some(stated) => set(cap, json!(stated)),
                    None if reader.row.name == "gemma3" => set(cap, Value::Null),
                    None => {}
                }
            }
            let window = reader.size("attention.sliding_window")?;
            let window = window.unwrap_or(if reader.row.name == "gemma2" { GEMMA2_WINDOW } else { 0 });
            let sliding = sliding_layers(reader, sizes.layers)?;
            set("sliding_window", if window > 0 { json!(window) } else { Value::Null });
            let kind = |sliding: &bool| if *sliding && window > 0 { "sliding_attention" } else { "full_attention" };
            set("layer_types", sliding.iter().map(kind).collect());
        }
        "phi3" => {
            set("hidden_act", json!("silu"));
            let window = reader.size("attention.sliding_window")?.filter(|window| *window > 0);
            set("sliding_window", json!(window));
        }
        other => {
            set("hidden_act", json!("silu"));
            set("attention_bias", biases("attn_q"));
            set("mlp_bias", biases("ffn_up"));
            if ["qwen2", "qwen3", "smollm3"].contains(&other) {
                set("use_sliding_window", json!(false));
            }
        }
    }
    if let Some(still) = reader.row.still {
        set("no_rope_layer_interval", json!(still));
        let turns = |number: u64| u8::from(!number.is_multiple_of(still));
        set("no_rope_layers", (1..=sizes.layers).map(turns).collect());
    }
    if reader.row.name == "granite" {
        let head = 1.0 / (sizes.head_dim as f64).sqrt();
        let logits = reader.positive("logit_scale")?;
        set("logits_scaling", json!(logits.ok_or_else(|| reader.metadata.missing(&reader.key("logit_scale")))?));
        set("attention_multiplier", json!(reader.positive("attention.scale")?.unwrap_or(head)));
        set("embedding_multiplier", json!(reader.positive("embedding_scale")?.unwrap_or(1.0)));
        set("residual_multiplier", json!(reader.positive("residual_scale")?.unwrap_or(1.0)));
    }
    Ok(keys)
}

/// Which layers see a window alone: as stated, by a period or for each layer; else as the architecture has it.
fn sliding_layers(reader: &Reader, layers: u64) -> Result<Vec<bool>> {
    const PART: &str = "attention.sliding_window_pattern";
    let key = reader.key(PART);
    let every = match reader.metadata.value(&key) {
        None => reader.row.windows_but.unwrap_or(1),
        Some(Stored::List { .. }) => {
            let flags = reader.metadata.numbers(&key)?.unwrap_or_default();
            if flags.len() as u64 != layers {
                return Err(reader.bad(PART, &format!("it tells of {} layers, there are {layers}", flags.len())));
            }
            return Ok(flags.into_iter().map(|flag| flag != 0.0).collect());
        }
        Some(_) => reader.needed(PART)?,
    };
    Ok((1..=layers).map(|number| !number.is_multiple_of(every)).collect())
}
