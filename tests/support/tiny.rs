//! A tiny base with a tokenizer, a few rows and a recipe in a folder of their own, and the binary run on them.
//!
//! The weights are random numbers of ours: what a model of transformers says is compared elsewhere; here a run is
//! compared with another run.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dpo_lora::random::Stream;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const VOCABULARY: usize = 330;
const HIDDEN: usize = 32;
const MLP: usize = 48;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;

/// What a run needs: `base`, `rows.jsonl`, `recipe.toml`.
pub struct Tiny {
    folder: TempDir,
}

/// A tensor that will be written: its shape and its numbers.
pub type Weights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The recipe that [`Tiny::new`] writes; a run of it takes 6 steps.
pub const RECIPE: &str = r#"[model]
base = "./base"

[adapter]
r = 4
lora_alpha = 8

[data]
train = ["rows.jsonl"]

[train]
batch_size = 4
learning_rate = 1e-2

[run]
device = "cpu"
"#;

impl Tiny {
    /// A base, 24 rows of text with answers of several lengths, and [`RECIPE`].
    pub fn new() -> Self {
        let tiny = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(tiny.path("base")).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            fs::copy(fixture("tokenizer/plain").join(name), tiny.path("base").join(name)).unwrap();
        }
        tiny.write("base/config.json", config().to_string());
        write_weights(&tiny.path("base/model.safetensors"), &weights(LAYERS));
        tiny.write("rows.jsonl", rows(24));
        tiny.write("recipe.toml", RECIPE);
        tiny
    }

    /// A path within the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file within the folder.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// A file within the folder, as text.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A file within the folder.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Sets or removes (with `null`) a key of a JSON file within the folder.
    pub fn set_json(&self, name: &str, key: &str, value: Value) {
        let mut object: serde_json::Map<String, Value> = serde_json::from_str(&self.read(name)).unwrap();
        match value {
            Value::Null => object.remove(key),
            value => object.insert(key.into(), value),
        };
        self.write(name, Value::Object(object).to_string());
    }

    /// The binary with these arguments, to be run in the folder, with no hub to ask.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dpo-lora"));
        command.args(arguments).current_dir(self.folder.path()).env("HF_HUB_OFFLINE", "1");
        command
    }

    /// Runs the binary.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the binary, which must succeed; its stdout.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `train recipe.toml` into `runs/NAME` with each of `set` as a `--set`, which must succeed; its stderr.
    #[track_caller]
    pub fn train(&self, name: &str, set: &[&str]) -> String {
        let output = self.run(&arguments(name, set, &[]));
        assert!(output.status.success(), "{set:?}: {}", stderr(&output));
        stderr(&output)
    }

    /// A file's SHA-256, which a failed comparison can print.
    pub fn digest(&self, name: &str) -> String {
        Sha256::digest(self.bytes(name)).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digest of the final adapter's weights of `runs/NAME`.
    pub fn adapter(&self, name: &str) -> String {
        self.digest(&format!("runs/{name}/adapter/adapter_model.safetensors"))
    }

    /// The rows of `metrics.jsonl` of `runs/NAME`.
    pub fn metrics(&self, name: &str) -> Vec<Value> {
        let text = self.read(&format!("runs/{name}/metrics.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The metrics that are the same in every run of a recipe: all but what the clock and the memory say.
    pub fn timeless_metrics(&self, name: &str) -> Vec<Value> {
        let timed = ["seconds", "eval_runtime", "peak_bytes"];
        let without = |row: Value| match row {
            Value::Object(row) => row.into_iter().filter(|(key, _)| !timed.contains(&key.as_str())).collect(),
            other => other,
        };
        self.metrics(name).into_iter().map(without).collect()
    }

    /// The rows of an evaluation in `runs/NAME`, or those of the steps.
    pub fn rows_of(&self, name: &str, evaluations: bool) -> Vec<Value> {
        self.metrics(name).into_iter().filter(|row| row.get("eval_loss").is_some() == evaluations).collect()
    }

    /// The names in a folder, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// `train recipe.toml --output runs/NAME`, each of `set` as a `--set`, and `more`.
pub fn arguments(name: &str, set: &[&str], more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["train".to_string(), "recipe.toml".into(), "--output".into(), format!("runs/{name}")];
    arguments.extend(set.iter().flat_map(|set| ["--set".to_string(), set.to_string()]));
    arguments.extend(more.iter().map(ToString::to_string));
    arguments
}

/// A command's stderr as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A committed fixture.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// `n` rows of text as JSONL.
pub fn rows(n: usize) -> String {
    let things = ["the sky", "a river", "tea", "this house", "a long road"];
    let (praise, blame) = (["clear", "kind and bright", "fine"], ["dull", "grey, old and cold", "so-so"]);
    let row = |i: usize| {
        json!({
            "prompt": format!("{i}: what is {} like?\n", things[i % 5]),
            "chosen": format!("It is {}, I think.", praise[i % 3]),
            "rejected": format!("It is {}.", blame[i / 3 % 3]),
        })
    };
    (0..n).map(|i| format!("{}\n", row(i))).collect()
}

/// The base's `config.json`.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "torch_dtype": "float32"
    })
}

/// The base's weights.
pub fn weights(layers: usize) -> Weights {
    let mut weights = Weights::new();
    let mut add = |name: String, shape: &[usize], scale: f64| {
        let stream = Stream::new(7, &name);
        let value = |i: u64| if scale == 0.0 { 1.0 } else { (scale * (2.0 * stream.uniform(i) - 1.0)) as f32 };
        let count = shape.iter().product::<usize>() as u64;
        weights.insert(name, (shape.to_vec(), (0..count).map(value).collect()));
    };
    add("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN], 1.0);
    add("lm_head.weight".into(), &[VOCABULARY, HIDDEN], 0.4);
    add("model.norm.weight".into(), &[HIDDEN], 0.0);
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    for layer in 0..layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{norm}.weight"), &[HIDDEN], 0.0);
        }
        for (linear, outputs, inputs) in [
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", MLP, HIDDEN),
            ("mlp.up_proj", MLP, HIDDEN),
            ("mlp.down_proj", HIDDEN, MLP),
        ] {
            add(format!("model.layers.{layer}.{linear}.weight"), &[outputs, inputs], 0.3);
        }
    }
    weights
}

/// Writes tensors as f32.
pub fn write_weights(path: &Path, weights: &Weights) {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = weights
        .iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let view = |bytes, shape: &Vec<usize>| TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
    let views = bytes.iter().map(|(name, shape, bytes)| (name.as_str(), view(bytes, shape)));
    safetensors::serialize_to_file(views, None, path).unwrap();
}
