//! Tiny checkpoints of every kind that is read, against transformers' log-probs and PEFT's gradients on them
//! (`tools/fixtures/models.py` and `adapters.py` wrote both).

use std::{fs, path::PathBuf};

use dpo_lora::{
    data::TokenizedPair, export::AdapterFolder, model::linear::Through, optim::global_norm, train::adapters,
};

#[path = "support/numbers.rs"]
mod numbers;

use numbers::{
    Ids, Most, adapter, by_name, dpo, fixture, gradient, json, open, policy, relative_l2, tensors, token_logps, worst,
};

const SIDES: [&str; 2] = ["chosen", "rejected"];

#[derive(serde::Deserialize)]
struct Expected {
    beta: f64,
    pairs: Vec<Ids>,
    loss: f64,
    grad_norm: f64,
}

#[derive(serde::Deserialize)]
struct ExpectedOfAdapter {
    chosen_logps: Vec<Vec<f32>>,
    rejected_logps: Vec<Vec<f32>>,
}

/// The folders that lie in a folder, sorted.
fn folders(within: PathBuf) -> Vec<PathBuf> {
    let entries = fs::read_dir(within).expect("fixtures").map(|entry| entry.expect("an entry").path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn name(folder: &std::path::Path) -> String {
    folder.file_name().expect("a name").to_string_lossy().into_owned()
}

#[test]
fn log_probs_and_gradients_are_those_of_transformers_and_peft() {
    let mut logps = Most::of("fixtures, log-prob of a token");
    let mut grads = Most::of("fixtures, gradient of a LoRA tensor, relative L2");
    let mut scalars = Most::of("fixtures, loss and gradient norm, relative");
    let models = folders(fixture(""));
    assert_eq!(models.len(), 21);
    for folder in &models {
        let (expected, theirs): (Expected, _) =
            (json(&folder.join("expected.json")), tensors(&folder.join("expected.safetensors")));
        let pairs: Vec<TokenizedPair> = expected.pairs.into_iter().map(TokenizedPair::from).collect();
        let model = open(folder);
        let adapter = adapter(&folder.join("adapter"), &model);
        for (who, through) in [("base", Through::default()), ("policy", policy(&adapter))] {
            for (i, ours) in token_logps(&model, &pairs, through).iter().enumerate() {
                for (side, ours) in SIDES.iter().zip(ours) {
                    let tensor = format!("{who}.{side}.{i}");
                    logps.see(worst(ours, &theirs[&tensor]), format!("{} {tensor}", name(folder)));
                }
            }
        }

        let means = gradient(&model, &adapter, &pairs.iter().collect::<Vec<_>>(), &dpo(expected.beta));
        scalars.see((means.loss / expected.loss - 1.0).abs(), format!("loss of {}", name(folder)));
        let norm = global_norm(&adapter.grads).expect("a norm");
        scalars.see((norm / expected.grad_norm - 1.0).abs(), format!("gradient norm of {}", name(folder)));
        let ours = by_name(&adapter, &adapter.grads);
        assert_eq!(theirs.keys().filter(|tensor| tensor.starts_with("grad.")).count(), ours.len());
        for (tensor, ours) in &ours {
            grads.see(relative_l2(ours, &theirs[&format!("grad.{tensor}")]), format!("{} {tensor}", name(folder)));
        }
    }
    logps.at_most(2e-5);
    grads.at_most(1e-4);
    scalars.at_most(1e-5);
}

#[test]
fn every_way_to_set_an_adapter_up_is_peft_s_or_is_refused() {
    let folder = fixture("llama");
    let model = open(&folder);
    let pairs: Vec<Ids> = json::<Expected>(&folder.join("expected.json")).pairs;
    let pairs: Vec<TokenizedPair> = pairs.into_iter().map(TokenizedPair::from).collect();
    let (mut logps, mut read, mut refused) = (Most::of("adapters, log-prob of a token"), vec![], vec![]);
    for folder in folders(folder.join("adapters")) {
        let expected: ExpectedOfAdapter = json(&folder.join("expected.json"));
        let adapter = AdapterFolder::read(&folder).and_then(|folder| adapters::on_model(&folder, &model));
        let Ok(adapter) = adapter else {
            refused.push(name(&folder));
            continue;
        };
        read.push(name(&folder));
        for (i, [chosen, rejected]) in token_logps(&model, &pairs, policy(&adapter)).iter().enumerate() {
            logps.see(worst(chosen, &expected.chosen_logps[i]), format!("{} chosen {i}", name(&folder)));
            logps.see(worst(rejected, &expected.rejected_logps[i]), format!("{} rejected {i}", name(&folder)));
        }
    }
    assert_eq!(
        (read.join(" "), refused.join(" ")),
        ("list patterns regex rslora".into(), "dora head layers whole-norms".into())
    );
    logps.at_most(2e-5);
}
