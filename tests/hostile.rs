//! Files made to do harm, a table a format: every one is refused with the exit code of bad input and a message that
//! names the place and what is wrong, and no one makes us hold more memory than its size allows.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/openers.rs"]
mod openers;

#[path = "hostile/adapter.rs"]
mod adapter;
#[path = "hostile/config.rs"]
mod config;
#[path = "hostile/folder.rs"]
mod folder;
#[path = "hostile/recipe.rs"]
mod recipe;
#[path = "hostile/rows.rs"]
mod rows;
#[path = "hostile/safetensors.rs"]
mod safetensors;
#[path = "hostile/template.rs"]
mod template;
#[path = "hostile/tokenizer.rs"]
mod tokenizer;

use std::time::{Duration, Instant};

use counting::{Counting, alone, peak_of};
use openers::{Bench, Kind};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Enough for each of these, on a machine that has other work; a hang has no end.
const TIME: Duration = Duration::from_secs(60);

/// A bad file, what is bad about it, and what the message must say.
struct Case {
    what: &'static str,
    bytes: Vec<u8>,
    says: &'static [&'static str],
}

fn case(what: &'static str, bytes: impl Into<Vec<u8>>, says: &'static [&'static str]) -> Case {
    Case { what, bytes: bytes.into(), says }
}

#[test]
fn adapter_configs() {
    refused(Kind::AdapterConfig, adapter::configs);
}

#[test]
fn adapter_weights() {
    refused(Kind::AdapterWeights, adapter::weights);
}

#[test]
fn config_texts() {
    refused(Kind::Config, config::texts);
}

#[test]
fn config_values() {
    refused(Kind::Config, config::values);
}

#[test]
fn folder_indexes() {
    refused(Kind::Index, folder::indexes);
}

#[test]
fn rows_lines() {
    refused(Kind::Rows, rows::lines);
}

#[test]
fn rows_packed() {
    refused(Kind::PackedRows, rows::packed);
}

#[test]
fn safetensors_lengths() {
    refused(Kind::Safetensors, safetensors::lengths);
}

#[test]
fn safetensors_layouts() {
    refused(Kind::Safetensors, safetensors::layouts);
}

#[test]
fn safetensors_names() {
    refused(Kind::Safetensors, safetensors::names);
}

#[test]
fn template_what_is_not_there() {
    refused(Kind::Template, template::what_is_not_there);
}

#[test]
fn template_what_has_no_end() {
    refused(Kind::Template, template::what_has_no_end);
}

/// Opens each; at least 30 of them, for the promise of docs/security.md.
#[track_caller]
fn refused(kind: Kind, cases: fn() -> Vec<Case>) {
    // What another table holds would be counted here.
    let _alone = alone();
    let cases = cases();
    eprintln!("{kind:?}: {} cases", cases.len());
    assert!(cases.len() >= 30);
    let bench = Bench::new();
    let mut wrong = Vec::new();
    for Case { what, bytes, says } in &cases {
        let start = Instant::now();
        let (outcome, held) = peak_of(|| bench.open(kind, bytes));
        if let Some(why) = fault(&bench, kind, outcome, says) {
            wrong.push(format!("{what}: {why}"));
        }
        if held > kind.allowance(bytes.len()) {
            wrong.push(format!("{what}: {held} bytes held for {}", bytes.len()));
        }
        if start.elapsed() > TIME {
            wrong.push(format!("{what}: took {:?}", start.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{kind:?}:\n{}", wrong.join("\n"));
}

/// What is wrong with how a bad file was taken.
fn fault(bench: &Bench, kind: Kind, outcome: dpo_lora::Result<()>, says: &[&str]) -> Option<String> {
    let Err(error) = outcome else { return Some("was read".into()) };
    let said = error.to_string();
    let named = bench.path(kind.file()).parent().is_some_and(|folder| said.contains(folder.to_str().unwrap()));
    let clean = !said.contains(|c: char| c.is_control() && !"\n\t".contains(c)) && said.chars().count() < 5000;
    let fits = error.exit_code() == kind.exit_code() && named && clean && says.iter().all(|part| said.contains(part));
    (!fits).then(|| format!("exit {}, expected {says:?}, said {said:?}", error.exit_code()))
}

/// A JSON object as text with one key set to this JSON, or taken out where it is empty.
fn with(object: &[u8], key: &str, json: &str) -> Vec<u8> {
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(object).unwrap();
    match json {
        "" => drop(object.shift_remove(key)),
        _ => drop(object.insert(key.into(), serde_json::from_str(json).unwrap())),
    }
    serde_json::to_vec(&object).unwrap()
}

#[test]
fn tokenizer_files() {
    refused(Kind::Tokenizer, tokenizer::files);
}

#[test]
fn tokenizer_configs() {
    refused(Kind::TokenizerConfig, tokenizer::configs);
}

#[test]
fn recipes() {
    refused(Kind::Recipe, recipe::recipes);
}
