//! Bad models through the binary: config.json, tokenizer, weights.

#[path = "support/refused.rs"]
mod refused;
#[path = "support/tiny.rs"]
mod tiny;

use std::fs;

use refused::{NAN, TRAIN, refused};
use serde_json::{Value, json};
use tiny::{Tiny, weights, write_weights};

const WEIGHTS: &str = "base/model.safetensors";

#[test]
fn bad_config() {
    fn set(t: &Tiny, key: &str, value: Value) {
        t.set_json("base/config.json", key, value);
    }
    refused(
        &TRAIN,
        &[
            (
                "none",
                |t| fs::remove_file(t.path("base/config.json")).unwrap(),
                &["base/config.json: cannot be read: there is no such file", "fetch"],
            ),
            (
                "cut short",
                |t| t.write("base/config.json", "{\"model_type\": "),
                &["base/config.json: not a JSON object", "fetch the file again"],
            ),
            ("a list", |t| t.write("base/config.json", "[]"), &["base/config.json: not a JSON object"]),
            ("a web page", |t| t.write("base/config.json", "<html>"), &["base/config.json: not a JSON object"]),
            (
                "a text for a number",
                |t| set(t, "hidden_size", json!("32")),
                &["base/config.json: hidden_size: \"32\" is not a whole number"],
            ),
            (
                "a negative size",
                |t| set(t, "intermediate_size", json!(-48)),
                &["base/config.json: intermediate_size: -48 is not a whole number"],
            ),
            (
                "a size of 0",
                |t| set(t, "num_attention_heads", json!(0)),
                &["base/config.json: num_attention_heads: 0 is not"],
            ),
            ("an absurd size", |t| set(t, "vocab_size", json!(1e300)), &["base/config.json: vocab_size: "]),
            (
                "a size beyond 64 bits",
                |t| {
                    t.write(
                        "base/config.json",
                        t.read("base/config.json")
                            .replace("\"hidden_size\":32", "\"hidden_size\":99999999999999999999"),
                    )
                },
                &["base/config.json: hidden_size: "],
            ),
            (
                "millions of layers",
                |t| set(t, "num_hidden_layers", json!(16_000_000)),
                &["base/config.json: num_hidden_layers: 16000000 are more than the 10000 that are read"],
            ),
            (
                "a size missing",
                |t| set(t, "hidden_size", Value::Null),
                &["base/config.json: hidden_size: it is missing"],
            ),
            ("no model type", |t| set(t, "model_type", Value::Null), &["base/config.json: model_type: it is missing"]),
            (
                "an unknown model type",
                |t| set(t, "model_type", json!("mamba")),
                &["base/config.json: model_type: \"mamba\" is not read; llama, mistral, qwen2"],
            ),
            (
                "heads that do not divide",
                |t| set(t, "num_attention_heads", json!(3)),
                &["base/config.json: num_key_value_heads: 2 does not divide num_attention_heads, 3"],
            ),
            ("an odd head", |t| set(t, "head_dim", json!(7)), &["base/config.json: head_dim: 7 is odd"]),
            (
                "another activation",
                |t| set(t, "hidden_act", json!("mish")),
                &["base/config.json: hidden_act: \"mish\" is not read"],
            ),
            (
                "an unknown rope",
                |t| set(t, "rope_scaling", json!({"rope_type": "longrope", "factor": 2.0})),
                &["base/config.json: rope_scaling.rope_type: \"longrope\" is not read"],
            ),
            (
                "a rope without its factor",
                |t| set(t, "rope_scaling", json!({"rope_type": "linear"})),
                &["base/config.json: rope_scaling.factor: it is missing"],
            ),
            (
                "an end token that is none",
                |t| set(t, "eos_token_id", json!("end")),
                &["base/config.json: ", "eos_token_id"],
            ),
            (
                "a quantised checkpoint",
                |t| set(t, "quantization_config", json!({"quant_method": "gptq", "bits": 4})),
                &["base: config.json says that the weights are quantised (gptq)", "use the unquantised"],
            ),
        ],
    );
}

#[test]
fn bad_tokenizers() {
    refused(
        &TRAIN,
        &[
            (
                "none",
                |t| fs::remove_file(t.path("base/tokenizer.json")).unwrap(),
                &["base/tokenizer.json: no such file", "save_pretrained"],
            ),
            (
                "cut short",
                |t| t.write("base/tokenizer.json", &t.bytes("base/tokenizer.json")[..900]),
                &["base/tokenizer.json: not a usable tokenizer", "fetch the file again"],
            ),
            (
                "another JSON",
                |t| t.write("base/tokenizer.json", "{}"),
                &["base/tokenizer.json: not a usable tokenizer"],
            ),
            (
                "no JSON",
                |t| t.write("base/tokenizer.json", [0x80; 50]),
                &["base/tokenizer.json: not a usable tokenizer"],
            ),
            (
                "more tokens than the model",
                |t| {
                    t.set_json("base/config.json", "vocab_size", json!(300));
                    let mut weights = weights(2);
                    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
                        let (shape, values) = weights.get_mut(name).unwrap();
                        shape[0] = 300;
                        values.truncate(300 * 32);
                    }
                    write_weights(&t.path(WEIGHTS), &weights);
                },
                &[
                    "tokenizer.json: its token 3",
                    "none of the 300 rows of the model's embedding",
                    "belongs to the model",
                ],
            ),
            (
                "no end token",
                |t| t.write("base/tokenizer_config.json", "{}"),
                &["base/tokenizer.json: no end token is known", "name it as `eos_token`"],
            ),
            (
                "an end token that is unknown",
                |t| t.write("base/tokenizer_config.json", r#"{"eos_token": "<end>"}"#),
                &["base/tokenizer.json: the end token \"<end>\"", "not in the vocabulary"],
            ),
            (
                "a bad config",
                |t| t.write("base/tokenizer_config.json", "{"),
                &["base/tokenizer_config.json: expected a JSON object"],
            ),
            (
                "a bad special token",
                |t| t.write("base/tokenizer_config.json", r#"{"eos_token": 3}"#),
                &["base/tokenizer_config.json: `eos_token` must be text"],
            ),
            (
                "a post-processor that lies",
                |t| {
                    let lying = json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                        "single": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
                    t.set_json("base/tokenizer.json", "post_processor", lying);
                },
                &["base/tokenizer.json: not a usable tokenizer: its parts contradict each other"],
            ),
        ],
    );
}

/// Replaces the header of the weights by what `change` makes of it, the data kept.
fn reheader(tiny: &Tiny, change: impl Fn(String) -> String) {
    let bytes = tiny.bytes(WEIGHTS);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let length = (header.len() as u64).to_le_bytes();
    tiny.write(
        WEIGHTS,
        [&length[..], header.as_bytes(), &bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..]]
            .concat(),
    );
}

/// The weights in two shards with an index, changed as `change` says.
fn shard(tiny: &Tiny, change: impl Fn(&mut Value)) {
    let (mut one, mut two) = (weights(2), weights(2));
    one.retain(|name, _| name < &"model.layers.1".to_string());
    two.retain(|name, _| name >= &"model.layers.1".to_string());
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": {}});
    for (file, weights) in [("one.safetensors", &one), ("two.safetensors", &two)] {
        write_weights(&tiny.path("base").join(file), weights);
        weights.keys().for_each(|name| index["weight_map"][name] = file.into());
    }
    change(&mut index);
    fs::remove_file(tiny.path(WEIGHTS)).unwrap();
    tiny.write("base/model.safetensors.index.json", index.to_string());
}

#[test]
fn shards_that_fit_are_read() {
    let tiny = Tiny::new();
    tiny.train("single", &["train.max_steps=1"]);
    shard(&tiny, |_| ());
    tiny.train("sharded", &["train.max_steps=1"]);
    assert_eq!(tiny.adapter("single"), tiny.adapter("sharded"));
}

#[test]
fn bad_weights() {
    fn without(t: &Tiny, name: &str, text: &str) {
        fs::remove_file(t.path(WEIGHTS)).unwrap();
        t.write(name, text);
    }
    refused(
        &TRAIN,
        &[
            (
                "none",
                |t| without(t, "base/notes.txt", ""),
                &["base: there are no weights here, neither model.safetensors nor"],
            ),
            (
                "a pickle",
                |t| without(t, "base/pytorch_model.bin", ""),
                &["base: pytorch_model.bin is a pickle", "save_pretrained"],
            ),
            (
                "GGUF",
                |t| without(t, "base/model.gguf", "GGUF"),
                &["base: a GGUF file is named itself: ", "base/model.gguf"],
            ),
            (
                "an adapter's folder",
                |t| without(t, "base/adapter_config.json", "{}"),
                &["base: this folder holds an adapter, not a model"],
            ),
            ("empty", |t| t.write(WEIGHTS, ""), &["base/model.safetensors: it holds 0 bytes", "download it again"]),
            (
                "a pointer of git-lfs",
                |t| t.write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
                &["base/model.safetensors: it is a pointer of git-lfs", "git lfs pull"],
            ),
            (
                "cut within the data",
                |t| t.write(WEIGHTS, &t.bytes(WEIGHTS)[..50_000]),
                &["base/model.safetensors: tensor \"", "do not lie within", "fetch the file again"],
            ),
            (
                "cut within the header",
                |t| t.write(WEIGHTS, &t.bytes(WEIGHTS)[..500]),
                &["base/model.safetensors: its header claims ", "cut short"],
            ),
            (
                "a header without end",
                |t| {
                    let mut bytes = t.bytes(WEIGHTS);
                    bytes[..8].fill(0xff);
                    t.write(WEIGHTS, bytes)
                },
                &["base/model.safetensors: its header claims 18446744073709551615 bytes"],
            ),
            (
                "a header too short",
                |t| {
                    let mut bytes = t.bytes(WEIGHTS);
                    bytes[0] -= 8;
                    t.write(WEIGHTS, bytes)
                },
                &["base/model.safetensors: its header is not as it should be"],
            ),
            (
                "bytes that belong to none",
                |t| t.write(WEIGHTS, [t.bytes(WEIGHTS), vec![0; 8]].concat()),
                &["base/model.safetensors: 8 bytes after the last tensor"],
            ),
            (
                "a name that stands twice",
                |t| reheader(t, |h| h.replace("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")),
                &["base/model.safetensors: ", "\"model.layers.0.mlp.up_proj.weight\" stands twice"],
            ),
            (
                "offsets beyond the file",
                |t| reheader(t, |h| h.replacen("\"data_offsets\":[0,", "\"data_offsets\":[0,9", 1)),
                &["base/model.safetensors: tensor \"", "do not lie within"],
            ),
            (
                "a shape beyond memory",
                |t| reheader(t, |h| h.replacen("\"shape\":[330,32]", "\"shape\":[4294967296,4294967296]", 1)),
                &["base/model.safetensors: tensor \"", "does not fill"],
            ),
            (
                "another shape",
                |t| reheader(t, |h| h.replacen("\"shape\":[330,32]", "\"shape\":[32,330]", 1)),
                &[
                    "base: tensor \"lm_head.weight\" has the shape [32, 330], the config says [330, 32]",
                    "do not belong together",
                ],
            ),
            (
                "a vector for a matrix",
                |t| reheader(t, |h| h.replacen("\"shape\":[330,32]", "\"shape\":[10560]", 1)),
                &["base: tensor \"lm_head.weight\" has the shape [10560]"],
            ),
            (
                "another dtype",
                |t| reheader(t, |h| h.replacen("\"dtype\":\"F32\"", "\"dtype\":\"I32\"", 1)),
                &[
                    "base/model.safetensors: tensor \"lm_head.weight\" is stored as I32, which is not read; F32, F16, BF16",
                ],
            ),
            (
                "an unknown dtype",
                |t| reheader(t, |h| h.replacen("\"dtype\":\"F32\"", "\"dtype\":\"Q4_K\"", 1)),
                &["base/model.safetensors: tensor \"lm_head.weight\": the dtype \"Q4_K\" is not known"],
            ),
            (
                "a tensor missing",
                |t| {
                    let mut weights = weights(2);
                    weights.remove("model.layers.1.mlp.up_proj.weight");
                    write_weights(&t.path(WEIGHTS), &weights)
                },
                &["base: there is no tensor \"model.layers.1.mlp.up_proj.weight\""],
            ),
            (
                "a shard missing",
                |t| {
                    shard(t, |_| ());
                    fs::remove_file(t.path("base/two.safetensors")).unwrap()
                },
                &["base/model.safetensors.index.json: the file \"two.safetensors\" that it names is missing"],
            ),
            (
                "a shard that the index leaves out",
                |t| shard(t, |i| i["weight_map"].as_object_mut().unwrap().retain(|_, file| *file == "one.safetensors")),
                &["base: there is no tensor "],
            ),
            (
                "a tensor that the index leaves out",
                |t| {
                    shard(t, |i| {
                        i["weight_map"].as_object_mut().unwrap().shift_remove("lm_head.weight");
                    })
                },
                &[
                    "base/model.safetensors.index.json: tensor \"lm_head.weight\" of \"one.safetensors\" is not in the index",
                ],
            ),
            (
                "a shard of another folder",
                |t| shard(t, |i| i["weight_map"]["lm_head.weight"] = "../one.safetensors".into()),
                &["base/model.safetensors.index.json: \"../one.safetensors\" is not the name of a file in this folder"],
            ),
            (
                "an index that is none",
                |t| {
                    shard(t, |_| ());
                    t.write("base/model.safetensors.index.json", "{}")
                },
                &["base/model.safetensors.index.json: "],
            ),
            (
                "a number that is none",
                |t| {
                    let mut bytes = t.bytes(WEIGHTS);
                    let at = bytes.len() - 4;
                    bytes[at..].copy_from_slice(&NAN);
                    t.write(WEIGHTS, bytes)
                },
                &["3 steps in a row were left out", "rows.jsonl:", "log-probs are not finite: the weights of the base"],
            ),
        ],
    );
}
