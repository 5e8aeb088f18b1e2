//! Bad files from outside through the binary: exit code 3, one sentence that names the place and the remedy, and
//! nothing left behind.

#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use tiny::{RECIPE, Tiny, fixture, rows, stderr, weights, write_weights};

const WEIGHTS: &str = "base/model.safetensors";
const NAN_AT_THE_END: [u8; 4] = [0, 0, 0xc0, 0x7f];

/// What is bad, how it came to be, and what the message must say.
type Case = (&'static str, fn(&Tiny), &'static [&'static str]);

/// Runs a command on each spoilt folder; every message must be as the case says.
#[track_caller]
fn refused(arguments: &[&str], cases: &[Case]) {
    let mut wrong = Vec::new();
    for (what, spoil, parts) in cases {
        let tiny = Tiny::new();
        spoil(&tiny);
        let output = tiny.run(arguments);
        let said = stderr(&output);
        let message = said.lines().last().unwrap_or_default();
        let fits = output.status.code() == Some(3)
            && message.starts_with("error: ")
            && said.matches("error: ").count() == 1
            && parts.iter().all(|part| message.contains(part))
            && !said.contains("panicked")
            && output.stdout.is_empty()
            && (!tiny.path("runs").exists() || said.contains("not finite"));
        if !fits {
            wrong.push(format!("{what}: {:?}, expected {parts:?}:\n{said}", output.status.code()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

const TRAIN: [&str; 2] = ["train", "recipe.toml"];

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// 24 good rows, and this one as line 25.
fn with_row(tiny: &Tiny, row: &str) {
    tiny.write("rows.jsonl", format!("{}{row}\n", rows(24)));
}

fn set_recipe(tiny: &Tiny, section: &str, line: &str) {
    tiny.write("recipe.toml", RECIPE.replace(section, &format!("{section}\n{line}")));
}

#[test]
fn bad_rows() {
    refused(
        &TRAIN,
        &[
            (
                "a row cut short",
                |t| with_row(t, r#"{"prompt": "a", "chosen": "b", "#),
                &["rows.jsonl:25: not a JSON object", "mend or remove"],
            ),
            ("a row that is no object", |t| with_row(t, "3"), &["rows.jsonl:25: not a JSON object"]),
            (
                "half a surrogate pair",
                |t| with_row(t, r#"{"prompt": "\ud800", "chosen": "b", "rejected": "c"}"#),
                &["rows.jsonl:25: "],
            ),
            (
                "nesting without end",
                |t| with_row(t, &format!(r#"{{"prompt": {}"#, "[".repeat(100_000))),
                &["rows.jsonl:25: not a JSON object", "recursion limit"],
            ),
            (
                "one JSON list",
                |t| t.write("rows.jsonl", "[\n]\n"),
                &["rows.jsonl:1: a JSON list", "each on its own line"],
            ),
            (
                "a number for a text",
                |t| with_row(t, r#"{"prompt": "a", "chosen": 7, "rejected": "c"}"#),
                &["rows.jsonl:25: `chosen` must be text, not a number"],
            ),
            (
                "a field missing",
                |t| with_row(t, r#"{"prompt": "a", "chosen": "b"}"#),
                &["rows.jsonl:25: `rejected` is missing"],
            ),
            (
                "other fields",
                |t| t.write("rows.jsonl", r#"{"question": "a", "answer": "b"}"#),
                &["rows.jsonl:1: expected `chosen` and `rejected`"],
            ),
            (
                "no usable row",
                |t| t.write("rows.jsonl", r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#),
                &["rows.jsonl: no usable row", "1 refused (both answers are the same: ", "data check"],
            ),
            ("an empty file", |t| t.write("rows.jsonl", ""), &["rows.jsonl: no usable row (0 rows read", "data check"]),
            (
                "a picture",
                |t| t.write("rows.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe"),
                &["rows.jsonl:1: not UTF-8"],
            ),
            ("numbers", |t| t.write("rows.jsonl", [0; 64]), &["rows.jsonl:1: not a JSON object"]),
            (
                "gzip cut short",
                |t| t.write("rows.jsonl", &gzip(&rows(200))[..300]),
                &["rows.jsonl:", "cannot be read on", "fetch or pack the file again"],
            ),
            (
                "gzip with a changed byte",
                |t| {
                    let mut bytes = gzip(&rows(200));
                    let at = bytes.len() - 6;
                    bytes[at] ^= 1;
                    t.write("rows.jsonl", bytes);
                },
                &["rows.jsonl:", "cannot be read on"],
            ),
            (
                "HH without an answer",
                |t| {
                    set_recipe(t, "[data]", "format = \"hh\"");
                    t.write("rows.jsonl", r#"{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}"#);
                },
                &["rows.jsonl: no usable row"],
            ),
            (
                "HH that is no text",
                |t| {
                    set_recipe(t, "[data]", "format = \"hh\"");
                    t.write("rows.jsonl", r#"{"chosen": ["a"], "rejected": ["b"]}"#);
                },
                &["rows.jsonl:1: `chosen` must be text, not a list"],
            ),
            (
                "messages without a template",
                |t| {
                    fs::remove_file(t.path("base/chat_template.jinja")).unwrap();
                    t.write("rows.jsonl", MESSAGES);
                },
                &["rows.jsonl:1: messages need a chat template", "data.chat_template"],
            ),
            (
                "a message without a role",
                |t| t.write("rows.jsonl", MESSAGES.replace("\"role\": \"user\", ", "")),
                &["rows.jsonl:1: `prompt[0]` must be an object with a text `role`"],
            ),
            (
                "a message that is a number",
                |t| t.write("rows.jsonl", MESSAGES.replace("\"blue\"", "3")),
                &["rows.jsonl:1: `chosen[0].content` must be text, not a number"],
            ),
            (
                "held-out rows that are bad",
                |t| {
                    set_recipe(t, "[data]", "eval = [\"held-out.jsonl\"]");
                    t.write("held-out.jsonl", "{");
                },
                &["held-out.jsonl:1: not a JSON object"],
            ),
        ],
    );
}

const MESSAGES: &str = r#"{"prompt": [{"role": "user", "content": "sky?"}], "chosen": [{"role": "assistant", "content": "blue"}], "rejected": [{"role": "assistant", "content": "green"}]}"#;

#[test]
fn bad_templates() {
    fn with(t: &Tiny, template: &str) {
        t.write("rows.jsonl", MESSAGES);
        t.write("base/chat_template.jinja", template);
    }
    refused(
        &TRAIN,
        &[
            (
                "one that refuses",
                |t| with(t, "{{ raise_exception('no system, please') }}"),
                &[
                    "rows.jsonl:1: ",
                    "chat_template.jinja:1: chat template: the template refuses these messages: no system, please",
                ],
            ),
            (
                "one that loops",
                |t| with(t, "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}"),
                &["chat_template.jinja:1: chat template: it takes too many steps", "name another"],
            ),
            (
                "one cut short",
                |t| with(t, "{% for m in messages %}"),
                &["chat_template.jinja:1: chat template: ", "mend"],
            ),
            (
                "an unknown function",
                |t| with(t, "\n{{ fetch('http://x') }}"),
                &["chat_template.jinja:2: chat template: "],
            ),
            (
                "calls without end",
                |t| with(t, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
                &["chat_template.jinja:1: "],
            ),
            (
                "one that is no text",
                |t| {
                    with(t, "");
                    t.write("base/chat_template.jinja", [0xff, 0xfe])
                },
                &["chat_template.jinja: not UTF-8"],
            ),
            (
                "a bad one of the recipe's",
                |t| {
                    with(t, "");
                    set_recipe(t, "[data]", "chat_template = \"mine.jinja\"");
                    t.write("mine.jinja", "{{ messages[0].name.first }}");
                },
                &["mine.jinja:1: chat template: "],
            ),
        ],
    );
}

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
                &[
                    "base: ",
                    "no tensor \"model.layers.2.input_layernorm.weight\", which config.json calls for",
                    "fetch",
                ],
            ),
            (
                "a size missing",
                |t| set(t, "hidden_size", Value::Null),
                &["base/config.json: hidden_size: it is missing"],
            ),
            ("no model type", |t| set(t, "model_type", Value::Null), &["base/config.json: model_type: it is missing"]),
            (
                "an unknown model type",
                |t| set(t, "model_type", json!("gpt2")),
                &["base/config.json: model_type: \"gpt2\" is not read; llama, mistral are"],
            ),
            (
                "heads that do not divide",
                |t| set(t, "num_attention_heads", json!(3)),
                &["base/config.json: num_key_value_heads: 2 does not divide num_attention_heads, 3"],
            ),
            ("an odd head", |t| set(t, "head_dim", json!(7)), &["base/config.json: head_dim: 7 is odd"]),
            (
                "another activation",
                |t| set(t, "hidden_act", json!("gelu")),
                &["base/config.json: hidden_act: \"gelu\" is not read; silu is"],
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
                &["base/config.json: the weights are quantised (method \"gptq\")", "use the unquantised"],
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
                &["base: tokenizer.json knows 330 tokens, the model 300", "do not belong together"],
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
            ("GGUF", |t| without(t, "base/model.gguf", "GGUF"), &["base: model.gguf is GGUF, which is not read yet"]),
            (
                "an adapter's folder",
                |t| without(t, "base/adapter_config.json", "{}"),
                &["base: this folder holds an adapter, not a model"],
            ),
            ("empty", |t| t.write(WEIGHTS, ""), &["base/model.safetensors: it holds 0 bytes", "download it again"]),
            (
                "a pointer of git-lfs",
                |t| t.write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
                &["base/model.safetensors: its header claims "],
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
                    "base: tensor \"lm_head.weight\" has the shape [32, 330], config.json says [330, 32]",
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
                &["base/model.safetensors: tensor \"lm_head.weight\" is stored as I32; F32, F16 and BF16 are read"],
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
                    bytes[at..].copy_from_slice(&NAN_AT_THE_END);
                    t.write(WEIGHTS, bytes)
                },
                &["log-probs of row ", "are not finite: the weights of the base"],
            ),
        ],
    );
}

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
            bytes[at..].copy_from_slice(&NAN_AT_THE_END);
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

#[test]
fn bad_paths() {
    refused(&["generate", "./nowhere", "--prompt", "a"], &[("a model", |_| (), &["nowhere"])]);
    refused(&["generate", "rows.jsonl", "--prompt", "a"], &[("a file for a model", |_| (), &["rows.jsonl"])]);
    refused(
        &["generate", "base", "--prompts", "prompts.txt"],
        &[
            ("prompts", |_| (), &["prompts.txt: cannot be read"]),
            ("no prompts", |t| t.write("prompts.txt", "\n\n"), &["prompts.txt: holds no prompt; write one a line"]),
            ("prompts that are no text", |t| t.write("prompts.txt", [0xff]), &["prompts.txt: "]),
        ],
    );
    refused(
        &["eval", "recipe.toml", "--data", "nowhere.jsonl"],
        &[("held-out rows", |_| (), &["nowhere.jsonl: cannot be read"])],
    );
    refused(&["inspect", "nowhere"], &[("a folder", |_| (), &["nowhere"])]);
    refused(&["inspect", "base"], &[("a broken model", |t| t.write(WEIGHTS, "{}"), &["base/model.safetensors: "])]);
    refused(&["export", "nowhere", "--to", "merged", "out"], &[("a run", |_| (), &["nowhere"])]);
    refused(
        &["train", "recipe.toml", "--set", "samples.labels=labels.json", "--set", "samples.prompts=[\"a\"]"],
        &[(
            "labels",
            |t| t.write("labels.json", "{\"positive\": 3}"),
            &["labels.json: ", "expected {\"positive\": [words], \"negative\": [words]}"],
        )],
    );
}

/// What a run's own folder may have become.
#[test]
fn a_spoilt_run() {
    let spoilt = |arguments: &[&str], code: i32, spoil: fn(&Tiny), parts: &[&str]| {
        let tiny = Tiny::new();
        tiny.ok(&[
            "train",
            "recipe.toml",
            "--max-steps",
            "2",
            "--set",
            "data.eval_fraction=0.2",
            "--set",
            "train.save_every=1",
        ]);
        spoil(&tiny);
        let output = tiny.run(arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        let message = said.lines().last().unwrap();
        assert!(
            message.starts_with("error: ") && parts.iter().all(|part| message.contains(part)),
            "{said}\nlacks one of {parts:?}"
        );
        assert!(!said.contains("panicked"), "{said}");
    };
    let resume = [
        "train",
        "recipe.toml",
        "--max-steps",
        "2",
        "--set",
        "data.eval_fraction=0.2",
        "--set",
        "train.save_every=1",
        "--resume",
        "runs/recipe/checkpoint-1",
    ];
    let metrics = "runs/recipe/metrics.jsonl";
    spoilt(&resume, 3, |t| fs::remove_file(t.path("runs/recipe/metrics.jsonl")).unwrap(), &[metrics, "cannot be read"]);
    spoilt(
        &resume,
        3,
        |t| t.write("runs/recipe/metrics.jsonl", "{}\n"),
        &[metrics, "rows are missing", "start the run anew"],
    );
    spoilt(
        &resume,
        3,
        |t| t.write("runs/recipe/checkpoint-1/state.json", "{}\n"),
        &["checkpoint-1/state.json: it is not what manifest.json says"],
    );
    spoilt(
        &resume,
        3,
        |t| fs::remove_file(t.path("runs/recipe/checkpoint-1/optimizer.safetensors")).unwrap(),
        &["checkpoint-1/optimizer.safetensors: "],
    );
    spoilt(&resume, 3, |t| fs::remove_dir_all(t.path("runs/recipe/checkpoint-1")).unwrap(), &["checkpoint-1"]);
    spoilt(
        &["eval", "runs/recipe"],
        2,
        |t| fs::remove_file(t.path("runs/recipe/recipe.toml")).unwrap(),
        &["runs/recipe/recipe.toml"],
    );
    spoilt(
        &["eval", "runs/recipe"],
        3,
        |t| fs::remove_dir_all(t.path("runs/recipe/adapter")).unwrap(),
        &["runs/recipe/adapter"],
    );
    spoilt(
        &["eval", "runs/recipe"],
        3,
        |t| fs::remove_file(t.path("rows.jsonl")).unwrap(),
        &["rows.jsonl: cannot be read"],
    );
    spoilt(&["eval", "runs/recipe"], 3, |t| fs::remove_dir_all(t.path("base")).unwrap(), &["base"]);
}
