//! llama.cpp reads what we write: the GGUF files of `quantize`, and adapters as GGUF on them, with our log-probs.
//!
//! llama.cpp rounds a product's inputs to 8 bits too, so the log-probs are near, not equal; an adapter moves them by
//! far more.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use candle_core::Device;
use dpo_lora::engine::pack::{Tree, pack};
use dpo_lora::engine::pass::forward;
use dpo_lora::export::AdapterFolder;
use dpo_lora::model::linear::Through;
use dpo_lora::train::{adapters, base::Base, device::Compute};
use serde_json::{Value, json};
use support::required_env;

fn run(arguments: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_dpo-lora")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An rsLoRA adapter with an alpha of its own for one kind of module, so that every scale differs from alpha / r.
fn adapter(folder: &Path, model: &Base) -> AdapterFolder {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": true, "alpha_pattern": {"down_proj": 6},
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], "base_model_name_or_path": "base",
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let config = dpo_lora::export::AdapterConfig::read(folder).unwrap();
    let wanted = |module: &str| ["q_proj", "k_proj", "o_proj", "down_proj"].iter().any(|name| module.ends_with(name));
    let mut state = 1u64;
    let mut draw = |n: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
        };
        (0..n).map(|_| next()).collect()
    };
    let matrices = model.linears().into_iter().filter(|(module, ..)| wanted(module));
    let matrices = matrices.map(|(module, input, output)| dpo_lora::export::AdapterMatrix {
        a: draw(4 * input, 2.0 / (input as f32).sqrt()),
        b: draw(4 * output, 0.3),
        r: 4,
        module,
        input,
        output,
    });
    let adapter = AdapterFolder { config, matrices: matrices.collect() };
    adapter.write(folder, None).unwrap();
    adapter
}

/// Mean difference of log-probs.
fn apart(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).sum::<f64>() / ours.len() as f64
}

#[test]
fn llama_cpp_gives_our_log_probs_with_and_without_an_adapter() {
    let (Some(smollm2), Some(python)) = (required_env("DPO_LORA_SMOLLM2"), required_env("DPO_LORA_PEERS_PYTHON"))
    else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_string();
    let source = smollm2.to_str().unwrap();
    for format in ["q8_0", "q4_k"] {
        let model = path(&format!("{format}.gguf"));
        run(&["quantize", source, "--to", format, &model]);
        let base = Base::open(&model, "main", &Device::Cpu, Compute::F32).unwrap();
        let (peft, gguf) = (path(&format!("peft-{format}")), path(&format!("adapter-{format}.gguf")));
        let ours = adapters::from_folder(&adapter(Path::new(&peft), &base), &base).unwrap();
        run(&["export", &peft, "--to", "gguf-adapter", &gguf, "--base", &model]);

        let prompt = base.tokenizer.encode("The three things that a river needs are", true).unwrap();
        let ids = prompt.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let theirs = |lora: &[&str]| -> (Vec<u32>, Vec<f64>) {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/check_gguf.py");
            let arguments = [&[script, &model, "--ids", &ids][..], lora].concat();
            let output = Command::new(&python).args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let told: Value = serde_json::from_slice(&output.stdout).unwrap();
            let list = |key: &str| told[key].as_array().unwrap().clone();
            let tokens = list("tokens").iter().map(|token| token.as_u64().unwrap() as u32).collect();
            (tokens, list("logprobs").iter().map(|logp| logp.as_f64().unwrap()).collect())
        };
        let logps = |answer: &[u32], through: Through| -> Vec<f64> {
            let tree = Tree { prompt: &prompt, answers: vec![answer] };
            let packed = pack(&[tree], &base.model.rotary, &Device::Cpu).unwrap();
            let scores = forward(&base.model, &packed, through).unwrap();
            scores.iter().map(|score| f64::from(score.logp)).collect()
        };
        let (bare, tuned) = (Through::of(None), Through::of(Some(&ours)));
        let (tokens, their_bare) = theirs(&[]);
        let (tuned_tokens, their_tuned) = theirs(&["--lora", &gguf]);
        assert_eq!(tuned_tokens.len(), 12);
        let without = apart(&logps(&tokens, bare), &their_bare);
        let with = apart(&logps(&tuned_tokens, tuned), &their_tuned);
        let moved = apart(&logps(&tuned_tokens, bare), &their_tuned);
        println!(
            "measured: {format}: {without:.1e} without the adapter, {with:.1e} with it, which moves them by {moved:.1e}"
        );
        assert!(without < 0.1 && with < 0.1, "{format}: {without} and {with}");
        assert!(moved > 0.4, "{format}: the adapter hardly does anything: {moved}");
    }
}
