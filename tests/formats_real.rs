//! The real SmolLM2: its GGUF file says what its folder says, and its products what those of an uploaded model do.

#[path = "support/numbers.rs"]
mod numbers;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::Device;
use dpo_lora::data::{ChatTemplate, Extras, Message, TokenizedPair, Tokenizer};
use dpo_lora::kernels::compute::Compute;
use dpo_lora::model::Config;
use numbers::devices::Place;
use numbers::{Most, adapter, by_name, dpo, gradient, json, open, policy, relative_l2, token_logps, worst};
use support::required_env;

/// SmolLM2's folder and the GGUF file beside it.
fn smollm2() -> Option<(PathBuf, PathBuf)> {
    let folder = required_env("DPO_LORA_SMOLLM2")?;
    let file = folder.parent()?.join("model.gguf");
    assert!(file.exists(), "{}", file.display());
    Some((folder, file))
}

/// 1,000 texts of HH rows.
fn texts(rows: &Path) -> Vec<String> {
    let rows = fs::read_to_string(rows).expect("rows");
    let texts = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).expect("a row");
        ["chosen", "rejected"].map(|side| row[side].as_str().expect("a text").to_string())
    };
    rows.lines().take(500).flat_map(texts).collect()
}

/// Texts that are hard to cut.
const HARD: [&str; 8] = [
    "",
    " ",
    "a  12  345 6 x7y 1,000.50",
    "\n\n\t x\r\n",
    "naïve Ünïcode, 日本語 и русский 🙂🙃 e\u{301}",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
    "don't we'LL it's 's",
    "\u{0}\u{7f}\u{200b}",
];

#[test]
fn the_tokenizer_in_the_file_is_the_folder_s() {
    let (Some((folder, file)), Some(rows)) = (smollm2(), required_env("DPO_LORA_HH")) else { return };
    let (theirs, ours) = (Tokenizer::open(&folder).unwrap(), Tokenizer::open(&file).unwrap());
    assert_eq!((ours.eos_id(), ours.stop_ids()), (theirs.eos_id(), theirs.stop_ids()));
    assert_eq!((ours.vocab_size(), ours.leading_bos()), (theirs.vocab_size(), theirs.leading_bos()));
    // The folder's tokenizer.json lacks the rule of the model's own, which the file names ("smollm"), that every digit
    // is a word: with the rule put back they agree on every text.
    let mended = tempfile::tempdir().unwrap();
    for name in ["tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja"] {
        fs::copy(folder.join(name), mended.path().join(name)).unwrap();
    }
    let text = fs::read_to_string(folder.join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let plain = json["pre_tokenizer"].take();
    let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
    json["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [digits, plain]});
    fs::write(mended.path().join("tokenizer.json"), json.to_string()).unwrap();
    let mended = Tokenizer::open(mended.path()).unwrap();

    let texts = texts(&rows);
    assert_eq!(texts.len(), 1000);
    let mut other = 0;
    for text in texts.iter().map(String::as_str).chain(HARD) {
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(ids, mended.encode(text, true).unwrap(), "{text:?}");
        assert_eq!(ours.decode(&ids, false).unwrap(), mended.decode(&ids, false).unwrap());
        other += usize::from(ids != theirs.encode(text, true).unwrap());
    }
    println!(
        "measured: {other} of {} texts are cut otherwise by the folder's own tokenizer.json",
        texts.len() + HARD.len()
    );

    let chat = |tokenizer: &Tokenizer| {
        let template = ChatTemplate::choose("auto", tokenizer).unwrap().expect("a template");
        let message = Message::from_iter([("role".into(), "user".into()), ("content".into(), "hi".into())]);
        template.render(&[message], &Extras::default(), true).unwrap()
    };
    assert_eq!(chat(&ours), chat(&theirs));
}

#[test]
fn the_config_in_the_file_is_the_folder_s() {
    let Some((folder, file)) = smollm2() else { return };
    assert_eq!(Config::read(&file).unwrap(), Config::read(&folder).unwrap());
}

/// Numbers of four bits, which tiles multiply as digits, with a real model's activations: beside an uploaded model,
/// which multiplies them in fused multiply-adds.
#[test]
fn products_from_the_file_are_those_of_an_uploaded_model() {
    #[derive(serde::Deserialize)]
    struct Row {
        prompt_ids: Vec<u32>,
        chosen_ids: Vec<u32>,
        rejected_ids: Vec<u32>,
    }
    let (Some((_, file)), Some(golden)) = (smollm2(), required_env("DPO_LORA_GOLDEN")) else { return };
    let rows: Vec<Row> = json(&golden.join("pairs.json"));
    let pair = |row: Row| TokenizedPair {
        prompt: row.prompt_ids,
        chosen: row.chosen_ids,
        rejected: row.rejected_ids,
        origin: (0, 1),
    };
    let pairs: Vec<_> = rows.into_iter().take(4).map(pair).collect();
    let place = Place { name: "the CPU, uploaded", device: Device::Cpu };
    let [ours, theirs] = [open(&file), place.open(&file, Compute::F32)].map(|model| {
        let adapter = adapter(&golden.join("init_adapter"), &model);
        let logps: Vec<f32> = token_logps(&model, &pairs, policy(&adapter)).concat().concat();
        gradient(&model, &adapter, &pairs.iter().collect::<Vec<_>>(), &dpo(0.1));
        (logps, by_name(&adapter, &adapter.grads))
    });
    let (mut logps, mut grads) =
        (Most::of("SmolLM2's Q4_1, log-prob of a token"), Most::of("SmolLM2's Q4_1, gradient, relative L2"));
    logps.see(worst(&ours.0, &theirs.0), "a token");
    for (name, gradient) in &theirs.1 {
        grads.see(relative_l2(&ours.1[name], gradient), name);
    }
    logps.at_most(1e-4);
    grads.at_most(3e-4);
}

/// The file of 92 MiB trains in 250 MiB.
#[test]
fn the_file_trains_within_its_budget() {
    let (Some((_, file)), Some(rows)) = (smollm2(), required_env("DPO_LORA_HH")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let recipe = "[adapter]\nr = 8\n[data]\ntrain = [\"rows.jsonl\"]\nformat = \"text\"\nmax_length = 512\ntruncation = \
                  \"prompt_start\"\n[train]\nbatch_size = 4\nmax_steps = 3\n[memory]\nbudget = \"250MiB\"\n[run]\noutput = \
                  \"run\"\ndevice = \"cpu\"\n";
    let recipe = format!("[model]\nbase = {:?}\n{recipe}", file.display().to_string());
    fs::write(folder.path().join("recipe.toml"), recipe).unwrap();
    let rows: String = fs::read_to_string(rows).unwrap().split_inclusive('\n').take(24).collect();
    fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let trained = Command::new(env!("CARGO_BIN_EXE_dpo-lora"))
        .args(["train", "recipe.toml", "--json"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    let summary: serde_json::Value = serde_json::from_slice(&trained.stdout).unwrap();
    let [peak, predicted] = ["peak_bytes", "predicted_bytes"].map(|key| summary[key].as_u64().unwrap() >> 20);
    println!("measured: {peak} MiB, {predicted} predicted");
    assert!(peak <= 250 && predicted <= 250, "{summary}");
    let metrics = fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
    let losses: Vec<f64> = metrics.lines().filter_map(loss).collect();
    assert!(losses.len() == 3 && losses[0] != losses[2], "{losses:?}");
}
