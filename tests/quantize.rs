//! `quantize`, and a quantised base through every command: what is written is read again, trains, and is merged only on
//! request.

#[path = "support/numbers.rs"]
mod numbers;
#[path = "support/mod.rs"]
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::{fs, process::Command};

use dpo_lora::{
    data::{ChatTemplate, Extras, TokenizedPair, Tokenizer},
    export::quantize,
    model::linear::Through,
    weights::ModelFolder,
};
use numbers::{Ids, Most, open, token_logps, worst};
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use serde_json::{Value, json};
use tiny::{Tiny, stderr, weights, write_weights};

const WEIGHTS: &str = "base/model.safetensors";

#[test]
fn a_gguf_file_of_ours_is_a_base_like_any_other() {
    let tiny = Tiny::new();
    let said = tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    assert!(said.contains("model.layers.0.self_attn.q_proj.weight") && said.contains("error in all 0.00"), "{said}");
    let facts = tiny.ok(&["inspect", "small.gguf"]);
    assert!(facts.contains("Q8_0") && facts.contains("llama"), "{facts}");

    tiny.train("small", &["model.base=small.gguf", "train.max_steps=2"]);
    tiny.train("base", &["train.max_steps=2"]);
    let loss = |run: &str| tiny.metrics(run)[1]["loss"].as_f64().unwrap();
    assert!((loss("small") - loss("base")).abs() < 0.02, "{} for {}", loss("small"), loss("base"));

    // the same tokens, so the same numbers of them
    let tokens = |run: &str| tiny.metrics(run)[1]["num_tokens"].clone();
    assert_eq!(tokens("small"), tokens("base"));

    let refused = tiny.run(&["export", "runs/small", "--to", "merged", "merged"]);
    let said = stderr(&refused);
    assert!(
        refused.status.code() == Some(2) && said.contains("--base MODEL") && said.contains("--dtype bf16"),
        "{said}"
    );
    let said = tiny.ok(&["export", "runs/small", "--to", "merged", "merged", "--dtype", "bf16"]);
    assert!(said.contains("merged and adapter differ by"), "{said}");
    tiny.ok(&["generate", "merged", "--prompt", "a", "--max-new-tokens", "3"]);
    tiny.ok(&["export", "runs/small", "--to", "merged", "original", "--base", "base"]);

    let refused = tiny.run(&["quantize", "small.gguf", "--to", "q8_0", "again.gguf"]);
    assert!(refused.status.code() == Some(3) && stderr(&refused).contains("quantised already"), "{}", stderr(&refused));
    assert!(!tiny.path("again.gguf").exists());
}

#[test]
fn rows_that_do_not_fit_a_format_take_the_next_one_or_are_refused() {
    let tiny = Tiny::new();
    let said = tiny.ok(&["quantize", "base", "--to", "q4_k", "small.gguf"]);
    assert!(said.contains("Q5_0") && !said.contains("Q4_K "), "{said}");
    tiny.train("small", &["model.base=small.gguf", "train.max_steps=1"]);
    let refused = tiny.run(&["quantize", "base", "--to", "nf4", "small"]);
    assert!(refused.status.code() == Some(3) && stderr(&refused).contains("choose --to q8_0"), "{}", stderr(&refused));
    assert!(!tiny.path("small").exists());
}

/// Older checkpoints hold the causal mask of every layer beside the weights, as bytes or as floats.
#[test]
fn masks_of_older_checkpoints_are_copied_as_they_lie() {
    let tiny = Tiny::new();
    // NF4 wants rows in blocks of 64
    tiny.set_json("base/config.json", "intermediate_size", json!(64));
    let mut all = weights(2);
    for (name, (shape, values)) in all.iter_mut().filter(|(name, _)| name.contains(".mlp.")) {
        *shape = if name.contains("down_proj") { vec![32, 64] } else { vec![64, 32] };
        *values = values.iter().copied().cycle().take(32 * 64).collect();
    }
    let float = "model.layers.1.attn.bias";
    all.insert(float.into(), (vec![1, 1, 4, 4], (0..16).map(|i| (i % 2) as f32).collect()));
    write_weights(&tiny.path(WEIGHTS), &all);
    let (bytes, mask) = (tiny.bytes(WEIGHTS), [1, 0, 0, 1, 1, 0, 1, 1, 1]);
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let masks = [("model.layers.0.attn.bias", Dtype::U8), ("model.layers.1.attn.mask", Dtype::BOOL)];
    for (name, dtype) in masks {
        tensors.push((name.into(), TensorView::new(dtype, vec![1, 1, 3, 3], &mask).unwrap()));
    }
    safetensors::serialize_to_file(tensors, None, &tiny.path(WEIGHTS)).unwrap();

    tiny.train("run", &["train.max_steps=1"]);
    tiny.ok(&["export", "runs/run", "--to", "merged", "merged"]);
    tiny.ok(&["export", "runs/run", "--to", "merged", "narrow", "--dtype", "bf16"]);
    tiny.ok(&["quantize", "base", "--to", "nf4", "small"]);
    tiny.ok(&["generate", "small", "--prompt", "a", "--max-new-tokens", "3"]);
    let base = ModelFolder::open(&tiny.path("base")).unwrap();
    for folder in ["merged", "narrow", "small"] {
        let written = ModelFolder::open(&tiny.path(folder)).unwrap();
        for (name, _) in masks {
            let (before, after) = (base.raw(name).unwrap(), written.raw(name).unwrap());
            assert_eq!((before.stored, before.shape), (after.stored, after.shape), "{name} of {folder}");
            assert_eq!(before.bytes, after.bytes, "{name} of {folder}");
        }
        assert_eq!(written.plain(float).unwrap().to_f32(), all[float].1, "{folder}");
    }

    // a weight of such a type is none that could be copied
    let header = String::from_utf8_lossy(&tiny.bytes(WEIGHTS)).find("lm_head.weight").unwrap();
    let mut bytes = tiny.bytes(WEIGHTS);
    let at = header + bytes[header..].windows(3).position(|three| three == b"F32").unwrap();
    bytes[at..at + 3].copy_from_slice(b"I32");
    tiny.write(WEIGHTS, bytes);
    for command in [&["export", "runs/run", "--to", "merged", "out"][..], &["quantize", "base", "--to", "nf4", "out"]] {
        let refused = tiny.run(command);
        let said = stderr(&refused);
        assert!(refused.status.code() == Some(3) && said.contains("is stored as I32, which is not read"), "{said}");
        assert!(!tiny.path("out").exists());
    }
}

#[test]
fn weights_that_are_not_those_of_the_config_are_not_quantised() {
    type Case = (fn(&Tiny), &'static [&'static str], &'static str);
    fn set(tiny: &Tiny, key: &str, value: u64) {
        tiny.set_json("base/config.json", key, json!(value));
    }
    fn with(tiny: &Tiny, name: &str, length: usize) {
        let mut weights = weights(2);
        weights.insert(name.into(), (vec![length], vec![0.0; length]));
        write_weights(&tiny.path(WEIGHTS), &weights);
    }
    let shape = "the two files do not belong together";
    let more = "is no part of what is written as GGUF";
    let (all, gguf) = (&["q8_0", "q4_k", "nf4"][..], &["q8_0", "q4_k"][..]);
    let cases: [Case; 8] = [
        // it divides the rows of every matrix
        (|t| set(t, "head_dim", 16), all, shape),
        (|t| set(t, "head_dim", 128), all, shape),
        (|t| set(t, "vocab_size", 331), all, shape),
        (|t| set(t, "num_hidden_layers", 3), all, "there is no tensor \"model.layers.2."),
        (|t| with(t, "model.norm.weight", 33), all, shape),
        (|t| with(t, "model.layers.0.mlp.up_proj.weight", 48 * 32), all, shape),
        (|t| set(t, "num_hidden_layers", 1), gguf, more),
        (|t| with(t, "model.layers.0.self_attn.q_proj.bias", 32), gguf, more),
    ];
    for (i, (spoil, formats, says)) in cases.into_iter().enumerate() {
        let tiny = Tiny::new();
        spoil(&tiny);
        let before = tiny.names("");
        for to in formats {
            let refused = tiny.run(&["quantize", "base", "--to", to, "out.gguf"]);
            let said = stderr(&refused);
            assert!(refused.status.code() == Some(3) && said.contains(says), "case {i}, {to}: {said}");
            assert_eq!(tiny.names(""), before, "case {i}, {to}");
        }
    }
}

#[test]
fn a_gguf_file_is_not_written_from_another() {
    let tiny = Tiny::new();
    let model = tiny::fixture("gguf/llama/model.gguf");
    for to in ["q8_0", "q4_k"] {
        let refused = tiny.run(&["quantize", model.to_str().unwrap(), "--to", to, "out"]);
        let said = stderr(&refused);
        assert!(
            refused.status.code() == Some(3) && said.contains("model.gguf: GGUF is written from a folder"),
            "{said}"
        );
        assert!(!tiny.path("out").exists());
    }
}

/// What a folder says of where a generation ends and how a chat is written, a GGUF file made of it says too; a token
/// without a row in the model is left away.
#[test]
fn a_gguf_file_ends_where_its_folder_does() {
    let tiny = Tiny::new();
    tiny.write("base/generation_config.json", json!({"eos_token_id": [3, 7]}).to_string());
    fs::remove_file(tiny.path("base/chat_template.jinja")).unwrap();
    tiny.set_json("base/tokenizer_config.json", "chat_template", json!([{"name": "default", "template": "{{ 1 }}"}]));
    let mut tokenizer: Value = serde_json::from_str(&tiny.read("base/tokenizer.json")).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut beyond = added[0].clone();
    (beyond["id"], beyond["content"]) = (json!(1 << 20), json!("<image>"));
    added.push(beyond);
    tiny.write("base/tokenizer.json", tokenizer.to_string());
    tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    let [folder, file] = ["base", "small.gguf"].map(|name| Tokenizer::open(&tiny.path(name)).unwrap());
    assert_eq!((file.eos_id(), file.stop_ids()), (folder.eos_id(), folder.stop_ids()));
    assert_eq!(file.stop_ids(), [3, 7]);
    tiny.write("base/generation_config.json", json!({"eos_token_id": 1}).to_string());
    tiny.set_json("base/tokenizer_config.json", "eos_token", json!("</s>"));
    tiny.ok(&["quantize", "base", "--to", "q8_0", "other.gguf"]);
    assert_eq!(Tokenizer::open(&tiny.path("other.gguf")).unwrap().stop_ids(), [1]);
    // converters leave the end of a turn to be known by its text
    let mut bytes = tiny.bytes("other.gguf");
    let at = bytes.windows(12).position(|key| key == b"eot_token_id").expect("the key");
    bytes[at..at + 3].copy_from_slice(b"xyz");
    tiny.write("other.gguf", bytes);
    assert_eq!(Tokenizer::open(&tiny.path("other.gguf")).unwrap().stop_ids(), [1, 3]);
    assert!(ChatTemplate::choose("auto", &file).unwrap().is_some());
}

/// Where a folder's tokenizer puts its end token after a text, that of a GGUF file made of it does, too.
#[test]
fn a_gguf_file_puts_the_end_after_a_text_where_its_folder_does() {
    let tiny = Tiny::new();
    let put_after = |token: &str, id: u32| {
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        let processor = json!({
            "type": "TemplateProcessing", "single": [text("A"), {"SpecialToken": {"id": token, "type_id": 0}}],
            "pair": [text("A"), text("B")], "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
        });
        tiny.set_json("base/tokenizer.json", "post_processor", processor);
    };
    put_after("<|im_end|>", 3);
    tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    let [folder, file] = ["base", "small.gguf"].map(|name| Tokenizer::open(&tiny.path(name)).unwrap());
    let ids = file.encode("a text", true).unwrap();
    assert_eq!(ids, folder.encode("a text", true).unwrap());
    assert_eq!(ids.last(), Some(&3));

    put_after("</s>", 1);
    let refused = tiny.run(&["quantize", "base", "--to", "q8_0", "other.gguf"]);
    let said = stderr(&refused);
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("other tokens than its end token after a text"), "{said}");
}

#[test]
fn a_template_for_tools_goes_into_a_gguf_file_and_out_of_it() {
    let tiny = Tiny::new();
    fs::remove_file(tiny.path("base/chat_template.jinja")).unwrap();
    let templates = json!([{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]);
    tiny.set_json("base/tokenizer_config.json", "chat_template", templates);
    tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    let tokenizer = Tokenizer::open(&tiny.path("small.gguf")).unwrap();
    let template = ChatTemplate::choose("auto", &tokenizer).unwrap().unwrap();
    let with_tools = Extras { tools: Some(vec![json!({"type": "function"})]), ..Extras::default() };
    assert_eq!(template.render(&[], &Extras::default(), false).unwrap(), "1");
    let said = template.render(&[], &with_tools, false).unwrap_err().to_string();
    assert!(said.contains("named tool_use"), "{said}");

    tiny.train("small", &["model.base=small.gguf", "train.max_steps=1"]);
    tiny.ok(&["export", "runs/small", "--to", "merged", "merged", "--dtype", "bf16"]);
    assert_eq!(tiny.read("merged/chat_template.jinja"), "{{ 1 }}");
    assert_eq!(tiny.read("merged/additional_chat_templates/tool_use.jinja"), "{{ 2 }}");
}

/// They follow from the config.
#[test]
fn frequencies_beside_the_weights_are_left_away() {
    let tiny = Tiny::new();
    let mut all = weights(2);
    all.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![4], vec![1.0, 0.1, 0.01, 0.001]));
    write_weights(&tiny.path(WEIGHTS), &all);
    tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    tiny.ok(&["generate", "small.gguf", "--prompt", "a", "--max-new-tokens", "3"]);
}

/// A Conv1D is quantised as the linear layer that it is.
#[test]
fn transformers_and_bitsandbytes_read_our_nf4_with_our_log_probs() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let tools = |name: &str| format!("{}/tools/{name}", env!("CARGO_MANIFEST_DIR"));
    let place = tempfile::tempdir().unwrap();
    let pairs = json!([
        {"prompt": [5, 9, 11, 3, 40], "chosen": [7, 8, 30, 2], "rejected": [12, 6, 2]},
        {"prompt": [4], "chosen": [17, 21, 2], "rejected": [9, 9, 33, 45, 2]},
    ]);
    let file = place.path().join("ids.json");
    fs::write(&file, pairs.to_string()).unwrap();
    let pairs: Vec<Ids> = serde_json::from_value(pairs).unwrap();
    let pairs: Vec<TokenizedPair> = pairs.into_iter().map(TokenizedPair::from).collect();
    let mut logps = Most::of("our NF4 read by transformers, log-prob of a token");
    for family in ["gpt2", "qwen3"] {
        let [plain, small] = ["plain", "nf4"].map(|name| place.path().join(format!("{family}-{name}")));
        let python = |arguments: &[&str]| {
            let output = Command::new(&python).args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        };
        python(&[&tools("tiny_model.py"), family, plain.to_str().unwrap()]);
        let mut written = 0;
        let mut count = |tensor: &quantize::Written| {
            written += usize::from(tensor.format == "nf4");
            Ok(())
        };
        quantize::quantize(&plain, quantize::To::Nf4, &small, &mut count, &|| Ok(())).unwrap();
        assert_eq!(written, if family == "gpt2" { 8 } else { 14 }, "matrices in NF4");
        let told =
            python(&[&tools("check_nf4.py"), small.to_str().unwrap(), plain.to_str().unwrap(), file.to_str().unwrap()]);
        let told: Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(told["layers"], written);
        for (i, ours) in token_logps(&open(&small), &pairs, Through::default()).iter().enumerate() {
            for (side, ours) in ["chosen_logps", "rejected_logps"].iter().zip(ours) {
                let theirs: Vec<f32> = serde_json::from_value(told[side][i].clone()).unwrap();
                logps.see(worst(ours, &theirs), format!("{family} {side} {i}"));
            }
        }
    }
    logps.at_most(2e-5);
}
