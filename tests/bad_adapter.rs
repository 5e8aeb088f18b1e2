//! Bad adapters through every command that reads one.

#[path = "support/refused.rs"]
mod refused;
#[path = "support/tiny.rs"]
mod tiny;

use std::fs;

use refused::{Case, NAN, refused};
use serde_json::{Value, json};
use tiny::{Tiny, fixture};

/// A folder `adapter` that fits the base, its config or weights changed.
fn adapter(tiny: &Tiny) {
    tiny.train("made", &["train.max_steps=1"]);
    fs::rename(tiny.path("runs/made/adapter"), tiny.path("adapter")).unwrap();
    fs::remove_dir_all(tiny.path("runs")).unwrap();
}

const ADAPTERS: [Case; 13] = [
    ("none", |_| (), &["adapter/adapter_config.json: cannot be read: there is no such file", "check the path"]),
    ("an empty folder", |t| fs::create_dir(t.path("adapter")).unwrap(), &["adapter/adapter_config.json: "]),
    (
        "a config that is no JSON",
        |t| {
            adapter(t);
            t.write("adapter/adapter_config.json", "r = 4")
        },
        &["adapter/adapter_config.json: "],
    ),
    (
        "no weights",
        |t| {
            adapter(t);
            fs::remove_file(t.path("adapter/adapter_model.safetensors")).unwrap()
        },
        &["adapter/adapter_model.safetensors: "],
    ),
    (
        "a pickle",
        |t| {
            adapter(t);
            fs::rename(t.path("adapter/adapter_model.safetensors"), t.path("adapter/adapter_model.bin")).unwrap()
        },
        &["adapter: adapter_model.bin is a pickle", "save_pretrained"],
    ),
    (
        "another method",
        |t| {
            adapter(t);
            t.set_json("adapter/adapter_config.json", "peft_type", json!("IA3"))
        },
        &["adapter/adapter_config.json: peft_type: "],
    ),
    (
        "another rank",
        |t| {
            adapter(t);
            t.set_json("adapter/adapter_config.json", "r", json!(8))
        },
        &["adapter/adapter_model.safetensors: \"model.layers.0.", "but the config says rank 8"],
    ),
    (
        "no rank",
        |t| {
            adapter(t);
            t.set_json("adapter/adapter_config.json", "r", Value::Null)
        },
        &["adapter/adapter_config.json: r: "],
    ),
    (
        "DoRA",
        |t| {
            adapter(t);
            t.set_json("adapter/adapter_config.json", "use_dora", json!(true))
        },
        &["adapter/adapter_config.json: use_dora: "],
    ),
    (
        "modules that are saved whole",
        |t| {
            adapter(t);
            t.set_json("adapter/adapter_config.json", "modules_to_save", json!(["lm_head"]))
        },
        &["adapter/adapter_config.json: modules_to_save: "],
    ),
    (
        "a value that is none",
        |t| {
            adapter(t);
            let mut bytes = t.bytes("adapter/adapter_model.safetensors");
            let at = bytes.len() - 4;
            bytes[at..].copy_from_slice(&NAN);
            t.write("adapter/adapter_model.safetensors", bytes);
        },
        &["adapter/adapter_model.safetensors: tensor \"base_model.model.model.layers.1.", "not finite"],
    ),
    (
        "cut short",
        |t| {
            adapter(t);
            t.write("adapter/adapter_model.safetensors", &t.bytes("adapter/adapter_model.safetensors")[..9000])
        },
        &["adapter/adapter_model.safetensors: "],
    ),
    (
        "an adapter of another base",
        |t| {
            fs::create_dir(t.path("adapter")).unwrap();
            for name in ["adapter_config.json", "adapter_model.safetensors"] {
                fs::copy(fixture("models/llama/adapter").join(name), t.path("adapter").join(name)).unwrap();
            }
        },
        &[
            "the adapter was made for another base",
            "is 48 → 32 here, the adapter has 72 → 40",
            "use it with its own base",
        ],
    ),
];

#[test]
fn bad_adapters() {
    refused(&["generate", "base", "--prompt", "a", "--adapter", "adapter"], &ADAPTERS);
    refused(&["eval", "recipe.toml", "--data", "rows.jsonl", "--adapter", "adapter"], &ADAPTERS[8..]);
    // That there is no such folder is the recipe's fault and told with its line.
    refused(
        &[
            "train",
            "recipe.toml",
            "--set",
            "adapter.start_from=adapter",
            "--set",
            "adapter.r=16",
            "--set",
            "adapter.lora_alpha=32",
        ],
        &ADAPTERS[1..],
    );
    refused(&["export", "adapter", "--base", "base", "--to", "merged", "merged"], &ADAPTERS[2..]);
    refused(&["inspect", "adapter"], &ADAPTERS[2..12]);
}
