//! Token ids against TRL's on a real tokenizer: ten rows of HH, SmolLM2.
//!
//! `DPO_LORA_GOLDEN` is the folder with pairs.json, `DPO_LORA_SMOLLM2` the Hugging Face folder of SmolLM2 and
//! `DPO_LORA_HH` the rows as JSONL; the test is skipped where one is not set.

use std::path::PathBuf;

use dpo_lora::data::{ChatTemplate, Dataset, Options, Tokenizer};
use dpo_lora::recipe::{Format, Truncation};
use serde_json::Value;

fn input(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable);
    if path.is_none() {
        eprintln!("skipped: {variable} not set");
    }
    path.map(PathBuf::from)
}

#[test]
fn ids_are_trls() {
    let (Some(golden), Some(model), Some(rows)) =
        (input("DPO_LORA_GOLDEN"), input("DPO_LORA_SMOLLM2"), input("DPO_LORA_HH"))
    else {
        return;
    };
    let expected = std::fs::read(golden.join("pairs.json")).expect("pairs.json");
    let expected: Vec<Value> = serde_json::from_slice(&expected).expect("pairs.json is a list");
    assert!(expected.len() >= 10);
    let tokenizer = Tokenizer::open(&model).expect("SmolLM2's tokenizer");
    let template = ChatTemplate::choose("auto", &tokenizer).expect("SmolLM2's template");
    assert!(template.is_some());
    let options =
        Options { format: Format::Auto, max_length: 512, truncation: Truncation::Refuse, limit: expected.len() };
    let dataset = Dataset::load(&[rows], &tokenizer, template.as_ref(), &options).expect("the rows");
    assert_eq!(dataset.pairs.len(), expected.len());
    for (pair, expected) in dataset.pairs.iter().zip(&expected) {
        let ids = |name: &str| -> Vec<u32> { serde_json::from_value(expected[name].clone()).expect(name) };
        assert_eq!(pair.prompt, ids("prompt_ids"), "row {}", expected["index"]);
        assert_eq!(pair.chosen, ids("chosen_ids"), "row {}", expected["index"]);
        assert_eq!(pair.rejected, ids("rejected_ids"), "row {}", expected["index"]);
    }
}
