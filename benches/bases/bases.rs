//! Writes a base of random weights with the shapes of a real one, for measurements of memory and time.
//!
//! ```text
//! cargo run --release --example bases -- llama-3.2-1b OUT --tokenizer FOLDER
//! ```
//!
//! The tokenizer's files are copied from FOLDER (any whose vocabulary is no larger will do: SmolLM2's for all of them).
//! The weights are bf16 numbers of a keyed generator: the same name gives the same bytes on every machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use dpo_lora::{
    Error, Result,
    random::Stream,
    weights::{DType, SafetensorsWriter},
};
use serde_json::{Value, json};

/// The shape of a decoder, with transformers' names.
struct Shape {
    name: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    tied: bool,
    rope_theta: f64,
    max_position_embeddings: usize,
    /// Llama 3's stretched positions: the factor.
    llama3_factor: Option<f64>,
}

#[rustfmt::skip]
const SHAPES: [Shape; 5] = [
    Shape { name: "small-20m", hidden_size: 256, intermediate_size: 704, num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 4,
            head_dim: 32, vocab_size: 49_152, tied: true, rope_theta: 1e4, max_position_embeddings: 8192, llama3_factor: None },
    Shape { name: "smollm2-135m", hidden_size: 576, intermediate_size: 1536, num_hidden_layers: 30, num_attention_heads: 9, num_key_value_heads: 3,
            head_dim: 64, vocab_size: 49_152, tied: true, rope_theta: 1e5, max_position_embeddings: 8192, llama3_factor: None },
    Shape { name: "smollm2-360m", hidden_size: 960, intermediate_size: 2560, num_hidden_layers: 32, num_attention_heads: 15, num_key_value_heads: 5,
            head_dim: 64, vocab_size: 49_152, tied: true, rope_theta: 1e5, max_position_embeddings: 8192, llama3_factor: None },
    Shape { name: "llama-3.2-1b", hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16, num_attention_heads: 32, num_key_value_heads: 8,
            head_dim: 64, vocab_size: 128_256, tied: true, rope_theta: 5e5, max_position_embeddings: 131_072, llama3_factor: Some(32.0) },
    Shape { name: "llama-3.1-8b", hidden_size: 4096, intermediate_size: 14_336, num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8,
            head_dim: 128, vocab_size: 128_256, tied: false, rope_theta: 5e5, max_position_embeddings: 131_072, llama3_factor: Some(8.0) },
];

/// Most bytes of a file of weights.
const SHARD: usize = 4 << 30;
/// Numbers made and written at once.
const AT_ONCE: usize = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [name, out, "--tokenizer", tokenizer] => write(name, Path::new(out), Path::new(tokenizer)),
        _ => Err(Error::recipe("expected: NAME OUT --tokenizer FOLDER")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn write(name: &str, out: &Path, tokenizer: &Path) -> Result<()> {
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        let names = SHAPES.map(|shape| shape.name).join(", ");
        return Err(Error::recipe(format!("{name:?} is no known shape; these are: {names}")));
    };
    fs::create_dir_all(out).map_err(|error| Error::writing(out, error))?;
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        let from = tokenizer.join(file);
        if from.exists() {
            let bytes = fs::read(&from).map_err(|error| Error::reading(&from, error))?;
            put(&out.join(file), &bytes)?;
        }
    }
    put(&out.join("config.json"), config(shape).to_string().as_bytes())?;

    let shards = shards(tensors(shape));
    let mut places = serde_json::Map::new();
    for (number, entries) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", number + 1),
        };
        weights(&out.join(&file), entries)?;
        places.extend(entries.iter().map(|(tensor, ..)| (tensor.clone(), Value::from(file.clone()))));
    }
    match shards.len() {
        1 => Ok(()),
        _ => put(&out.join("model.safetensors.index.json"), json!({ "weight_map": places }).to_string().as_bytes()),
    }
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| Error::writing(&PathBuf::from(path), error))
}

fn config(shape: &Shape) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers, "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied, "rope_theta": shape.rope_theta, "rms_norm_eps": 1e-5,
        "max_position_embeddings": shape.max_position_embeddings, "bos_token_id": 1, "eos_token_id": 2
    });
    if let Some(factor) = shape.llama3_factor {
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
    }
    config
}

type Entry = (String, DType, Vec<usize>);

fn tensors(shape: &Shape) -> Vec<Entry> {
    let &Shape { hidden_size: hidden, intermediate_size: mlp, head_dim, vocab_size, .. } = shape;
    let (queries, keys) = (shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim);
    let mut tensors: Vec<Entry> = Vec::new();
    let mut add = |name: String, shape: &[usize]| tensors.push((name, DType::BF16, shape.to_vec()));
    add("model.embed_tokens.weight".into(), &[vocab_size, hidden]);
    for layer in 0..shape.num_hidden_layers {
        let mut part = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}.weight"), shape);
        part("input_layernorm", &[hidden]);
        part("self_attn.q_proj", &[queries, hidden]);
        part("self_attn.k_proj", &[keys, hidden]);
        part("self_attn.v_proj", &[keys, hidden]);
        part("self_attn.o_proj", &[hidden, queries]);
        part("post_attention_layernorm", &[hidden]);
        part("mlp.gate_proj", &[mlp, hidden]);
        part("mlp.up_proj", &[mlp, hidden]);
        part("mlp.down_proj", &[hidden, mlp]);
    }
    add("model.norm.weight".into(), &[hidden]);
    if !shape.tied {
        add("lm_head.weight".into(), &[vocab_size, hidden]);
    }
    tensors
}

/// Tensors in files of at most [`SHARD`] bytes, in their order.
fn shards(tensors: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut shards = vec![Vec::new()];
    let mut held = 0;
    for entry in tensors {
        let bytes = 2 * entry.2.iter().product::<usize>();
        if held + bytes > SHARD {
            shards.push(Vec::new());
            held = 0;
        }
        held += bytes;
        shards.last_mut().expect("there is always a shard").push(entry);
    }
    shards
}

/// Norms are 1, matrices uniform with the standard deviation 0.02 that models start from.
fn weights(path: &Path, entries: &[Entry]) -> Result<()> {
    const BOUND: f32 = 0.02 * 1.732;
    let mut writer = SafetensorsWriter::create(path, entries, &[("format", "pt")])?;
    let mut bytes = Vec::with_capacity(2 * AT_ONCE);
    for (name, _, shape) in entries {
        let count = shape.iter().product::<usize>();
        // a stream's first number seeds a fast generator: one hash a number would take minutes for the large bases
        let mut state = (Stream::new(1, name).uniform(0) * (1u64 << 53) as f64) as u64;
        for first in (0..count).step_by(AT_ONCE) {
            bytes.clear();
            for _ in first..count.min(first + AT_ONCE) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                let number = if shape.len() == 1 { 1.0 } else { BOUND * uniform };
                bytes.extend_from_slice(&((number.to_bits() >> 16) as u16).to_le_bytes());
            }
            writer.write(name, &bytes)?;
        }
    }
    writer.finish()
}
