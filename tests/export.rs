//! What leaves: the merged quickstart samples like base and adapter, and PEFT and transformers read both exports with
//! our log-probs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use candle_core::Device;
use dpo_lora::{
    engine::{
        pack::{Tree, pack},
        pass::forward,
    },
    export::AdapterFolder,
    model::linear::Through,
    train::{adapters, base::Base, device::Compute},
    weights::ModelFolder,
};
use serde_json::{Value, json};

#[path = "support/mod.rs"]
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use tiny::Tiny;

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/quickstart/base");

fn run(arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_dpo-lora")).args(arguments).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A short quickstart run in `folder`, exported both ways: (adapter, merged).
fn exports(folder: &Path) -> (PathBuf, PathBuf) {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/quickstart.toml");
    let short = ["--set", "data.eval=[]", "--set", "train.eval_every=0", "--set", "samples.count=10"];
    run(&[&["train", recipe, "--max-steps", "6", "--output", "run"][..], &short].concat(), folder);
    run(&["export", "run", "--to", "peft", "peft"], folder);
    let said = run(&["export", "run", "--to", "merged", "merged"], folder);
    assert!(said.contains("merged and adapter differ by"), "{said}");
    (folder.join("peft"), folder.join("merged"))
}

#[test]
fn a_merged_model_gives_the_samples_of_base_and_adapter() {
    let place = tempfile::tempdir().unwrap();
    let (adapter, merged) = exports(place.path());
    let draw = ["--prompt", "My mother chose The Velvet Harbor for our birthday.", "--count", "40", "--json"];
    let texts = |arguments: &[&str]| -> Vec<Value> {
        let lines = run(&[&["generate"], arguments, &draw[..]].concat(), place.path());
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone()).collect()
    };
    let tuned = texts(&[BASE, "--adapter", adapter.to_str().unwrap()]);
    assert_eq!(tuned.len(), 40);
    assert_eq!(tuned, texts(&[merged.to_str().unwrap()]));
    assert_ne!(tuned, texts(&[BASE]), "the adapter changes something");
}

/// GPT-2 knows no position beyond those it learned.
#[test]
fn a_prompt_that_fills_the_positions_is_compared_as_well() {
    let tiny = Tiny::new();
    let config = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 330,
        "n_positions": 64, "n_embd": 8, "n_head": 2, "n_inner": 16, "n_layer": 1, "layer_norm_epsilon": 1e-5,
    });
    tiny.write("base/config.json", config.to_string());
    let mut weights = tiny::Weights::new();
    for (name, shape) in [
        ("wte.weight", &[330, 8][..]),
        ("wpe.weight", &[64, 8]),
        ("h.0.ln_1.weight", &[8]),
        ("h.0.ln_1.bias", &[8]),
        ("h.0.attn.c_attn.weight", &[8, 24]),
        ("h.0.attn.c_attn.bias", &[24]),
        ("h.0.attn.c_proj.weight", &[8, 8]),
        ("h.0.attn.c_proj.bias", &[8]),
        ("h.0.ln_2.weight", &[8]),
        ("h.0.ln_2.bias", &[8]),
        ("h.0.mlp.c_fc.weight", &[8, 16]),
        ("h.0.mlp.c_fc.bias", &[16]),
        ("h.0.mlp.c_proj.weight", &[16, 8]),
        ("h.0.mlp.c_proj.bias", &[8]),
        ("ln_f.weight", &[8]),
        ("ln_f.bias", &[8]),
    ] {
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| (i * 37 % 19) as f32 / 19.0 - 0.5).collect();
        weights.insert(format!("transformer.{name}"), (shape.to_vec(), values));
    }
    tiny::write_weights(&tiny.path("base/model.safetensors"), &weights);
    let long = format!("samples.prompts=[{:?}]", "tea ".repeat(14));
    tiny.train("a", &[&long, "samples.max_new_tokens=4", "train.max_steps=1", "data.max_length=64"]);
    let said = tiny.ok(&["export", "runs/a", "--to", "merged", "merged"]);
    assert!(said.contains("merged and adapter differ by"), "{said}");
}

/// Older checkpoints keep numbers beside their weights that are infinite or beyond f16.
#[test]
fn what_no_model_reads_or_is_infinite_already_is_no_reason_to_refuse_a_type() {
    let tiny = Tiny::new();
    let mut all = tiny::weights(2);
    let constants =
        [("model.layers.0.attn.masked_bias", -1e9), ("model.layers.1.attention.masked_bias", f32::NEG_INFINITY)];
    for (name, value) in constants {
        all.insert(name.into(), (vec![], vec![value]));
    }
    let infinite = "model.layers.0.slopes";
    all.insert(infinite.into(), (vec![2], vec![f32::NEG_INFINITY, 1.0]));
    tiny::write_weights(&tiny.path("base/model.safetensors"), &all);
    tiny.train("run", &["train.max_steps=1"]);
    for dtype in ["f16", "bf16"] {
        tiny.ok(&["export", "runs/run", "--to", "merged", dtype, "--dtype", dtype]);
        let merged = ModelFolder::open(&tiny.path(dtype)).unwrap();
        let numbers = |name: &str| (merged.info(name).unwrap().format, merged.plain(name).unwrap().to_f32());
        for (name, value) in constants {
            assert_eq!(numbers(name), ("f32".to_string(), vec![value]), "{name} of {dtype}");
        }
        assert_eq!(numbers(infinite), (dtype.to_string(), all[infinite].1.clone()));
    }

    all.get_mut("model.norm.weight").unwrap().1[0] = 1e6;
    tiny::write_weights(&tiny.path("base/model.safetensors"), &all);
    let refused = tiny.run(&["export", "runs/run", "--to", "merged", "out", "--dtype", "f16", "--base", "base"]);
    let said = tiny::stderr(&refused);
    assert!(refused.status.code() == Some(3) && said.contains("the value 1000000 does not fit f16"), "{said}");
}

#[test]
fn peft_and_transformers_read_the_exports_with_our_log_probs() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let place = tempfile::tempdir().unwrap();
    let (adapter, merged) = exports(place.path());
    let base = Base::open(BASE, "main", &Device::Cpu, Compute::F32).unwrap();
    let ours = adapters::from_folder(&AdapterFolder::read(&adapter).unwrap(), &base).unwrap();
    let rows = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/quickstart/eval.jsonl")).unwrap();
    let encode = |text: &Value| base.tokenizer.encode(text.as_str().unwrap(), true).unwrap();
    let pairs: Vec<[Vec<u32>; 3]> = rows
        .lines()
        .take(4)
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|row| [encode(&row["prompt"]), encode(&row["chosen"]), encode(&row["rejected"])])
        .collect();
    let ids: Vec<Value> = pairs.iter().map(|[p, c, r]| json!({"prompt": p, "chosen": c, "rejected": r})).collect();
    let file = place.path().join("ids.json");
    fs::write(&file, serde_json::to_string(&ids).unwrap()).unwrap();

    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/check_export.py");
    let theirs = |arguments: &[&Path]| -> Value {
        let output = Command::new(&python).arg(script).args(arguments).arg(&file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let through = Through::of(Some(&ours));
    for theirs in [theirs(&[Path::new("adapter"), Path::new(BASE), &adapter]), theirs(&[Path::new("merged"), &merged])]
    {
        for (i, [prompt, chosen, rejected]) in pairs.iter().enumerate() {
            let tree = Tree { prompt, answers: vec![chosen, rejected] };
            let packed = pack(&[tree], &base.model.rotary, &base.model.device).unwrap();
            let scores = forward(&base.model, &packed, through).unwrap();
            for (key, rows) in ["chosen_logps", "rejected_logps"].iter().zip(&packed.answers) {
                let theirs = theirs[key][i].as_array().unwrap();
                assert_eq!(theirs.len(), rows.len());
                for (ours, theirs) in scores[rows.clone()].iter().zip(theirs) {
                    let apart = (f64::from(ours.logp) - theirs.as_f64().unwrap()).abs();
                    assert!(apart < 5e-5, "pair {i}, {key}: {} and {theirs}", ours.logp);
                }
            }
        }
    }
    // a regex that also matches modules that are no linear layers, which PEFT does not take as it is
    for (name, regex) in [("attention", ".*self_attn.*"), ("mlp", r".*\.mlp\..*")] {
        let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/quickstart.toml");
        let set = format!("adapter.target_modules={regex}");
        let short = ["--set", "data.eval=[]", "--set", "train.warmup_steps=0", "--set", "train.eval_every=0"];
        let train = ["train", recipe, "--max-steps", "1", "--output", name, "--set", &set, "--set", "samples.count=2"];
        run(&[&train[..], &short].concat(), place.path());
        theirs(&[Path::new("adapter"), Path::new(BASE), &place.path().join(name).join("adapter")]);
    }
}

/// A checkpoint in the middle of a run has not taken the steps that the recipe names.
#[test]
fn a_card_says_how_many_steps_were_taken() {
    let tiny = Tiny::new();
    tiny.train("a", &["train.max_steps=3", "train.save_every=2"]);
    let export = |from: &str, out: &str| {
        tiny.ok(&["export", from, "--to", "peft", out]);
        tiny.read(&format!("{out}/README.md"))
    };
    for (steps, card) in [
        (2, tiny.read("runs/a/checkpoint-2/README.md")),
        (2, export("runs/a/checkpoint-2", "early")),
        (3, tiny.read("runs/a/adapter/README.md")),
        (3, export("runs/a", "last")),
    ] {
        assert!(card.contains("| planned length | 3 steps |\n"), "{card}");
        assert!(card.contains(&format!("| steps taken | {steps} |\n")), "{card}");
    }
}

/// Names of layers in full stand for a regex in what is written, and every command reads them.
#[test]
fn an_adapter_of_a_regex_is_gone_on_with() {
    let tiny = Tiny::new();
    let regex = "adapter.target_modules=.*self_attn.*";
    tiny.train("a", &[regex, "train.max_steps=2"]);
    let config: Value = serde_json::from_str(&tiny.read("runs/a/adapter/adapter_config.json")).unwrap();
    let names = config["target_modules"].as_array().unwrap();
    assert_eq!((names.len(), names[0].as_str()), (8, Some("model.layers.0.self_attn.k_proj")));
    tiny.ok(&tiny::arguments("a", &[regex, "train.max_steps=3"], &["--resume", "--extend"]));
    tiny.train(
        "b",
        &["adapter.start_from=runs/a/adapter", "adapter.r=16", "adapter.lora_alpha=32", "train.max_steps=1"],
    );
    tiny.ok(&["export", "runs/b", "--to", "merged", "merged"]);
    tiny.ok(&["export", "runs/a", "--to", "gguf-adapter", "a.gguf"]);
}
