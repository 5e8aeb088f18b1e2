//! Tiny checkpoints of every kind that is read, against transformers' log-probs and PEFT's gradients on them
//! (`tools/fixtures/models.py` and `adapters.py` wrote both).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use dpo_lora::{
    data::TokenizedPair,
    export::{AdapterFolder, merge},
    model::linear::Through,
    optim::global_norm,
    recipe::TargetModules,
    train::adapters,
    weights::{DType, ModelFolder},
};
use serde_json::{Value, json};

#[path = "support/numbers.rs"]
mod numbers;
#[path = "support/mod.rs"]
mod support;

use numbers::{
    Ids, Most, adapter, by_name, dpo, everywhere, fixture, gradient, json as read_json, open, policy, relative_l2,
    tensors, token_logps, worst,
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

fn name(folder: &Path) -> String {
    folder.file_name().expect("a name").to_string_lossy().into_owned()
}

#[test]
fn log_probs_and_gradients_are_those_of_transformers_and_peft() {
    everywhere(|| {
        let mut logps = Most::of("fixtures, log-prob of a token");
        let mut grads = Most::of("fixtures, gradient of a LoRA tensor, relative L2");
        let mut scalars = Most::of("fixtures, loss and gradient norm, relative");
        let models = folders(fixture(""));
        assert_eq!(models.len(), 21);
        for folder in &models {
            let (expected, theirs): (Expected, _) =
                (read_json(&folder.join("expected.json")), tensors(&folder.join("expected.safetensors")));
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
    });
}

/// The policies of all fixtures on their pairs, with what leaves: a merged folder and an adapter that names its targets
/// as a run does. `see` gets the model's folder, the folders of merged model and adapter, the pairs and our log-probs.
fn exports(mut see: impl FnMut(&Path, [&Path; 2], &[TokenizedPair], Vec<[Vec<f32>; 2]>)) {
    for folder in folders(fixture("")) {
        let place = tempfile::tempdir().expect("a folder");
        let [merged, written] = ["merged", "adapter"].map(|name| place.path().join(name));
        let model = open(&folder);
        let mut adapter = AdapterFolder::read(&folder.join("adapter")).expect("an adapter");
        let ours = adapters::on_model(&adapter, &model).expect("an adapter that fits");
        let pairs: Vec<Ids> = read_json::<Expected>(&folder.join("expected.json")).pairs;
        let pairs: Vec<TokenizedPair> = pairs.into_iter().map(TokenizedPair::from).collect();

        let base = ModelFolder::open(&folder).expect("weights");
        merge(&base, &adapter, &merged, Some(DType::F32), &|| Ok(())).expect("a merged folder");
        adapter.config.target_modules = TargetModules::Pattern("all-linear".into());
        fs::create_dir(&written).expect("a folder");
        adapter.write(&written, None).expect("an adapter's folder");
        see(&folder, [&merged, &written], &pairs, token_logps(&model, &pairs, policy(&ours)));
    }
}

#[test]
fn merged_models_and_written_adapters_say_what_base_and_adapter_say() {
    everywhere(|| {
        let mut logps = Most::of("fixtures, log-prob of a token after an export");
        exports(|folder, [merged, written], pairs, ours| {
            let model = open(folder);
            let again = adapter(written, &model);
            let merged = open(merged);
            let others = [token_logps(&merged, pairs, Through::default()), token_logps(&model, pairs, policy(&again))];
            for (ours, other) in others.iter().flat_map(|other| ours.iter().zip(other)) {
                logps.see(worst(ours.iter().flatten(), other.iter().flatten()), name(folder));
            }
        });
        logps.at_most(2e-5);
    });
}

#[test]
fn peft_and_transformers_read_the_exports_of_every_family() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let place = tempfile::tempdir().expect("a folder");
    let (mut jobs, mut expected) = (Vec::new(), Vec::new());
    exports(|folder, exported, pairs, ours| {
        let kept = exported.map(|from| {
            let to = place.path().join(format!("{}-{}", name(folder), name(from)));
            fs::rename(from, &to).expect("a folder that moves");
            to
        });
        let ids =
            |pair: &TokenizedPair| json!({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected});
        let ids: Vec<Value> = pairs.iter().map(ids).collect();
        jobs.push(json!({"base": kept[0], "adapter": null, "pairs": ids}));
        jobs.push(json!({"base": folder, "adapter": kept[1], "pairs": ids}));
        expected.push((name(folder), ours));
    });
    let file = place.path().join("jobs.json");
    fs::write(&file, serde_json::to_string(&jobs).expect("JSON")).expect("a file");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/check_export.py");
    let output = Command::new(python).args([script, "all"]).arg(&file).output().expect("Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs: Vec<ExpectedOfAdapter> = serde_json::from_slice(&output.stdout).expect("log-probs");
    assert_eq!(theirs.len(), 2 * expected.len());

    let mut logps = Most::of("fixtures, log-prob of a token by transformers and PEFT from our exports");
    for ((folder, ours), theirs) in expected.iter().zip(theirs.chunks_exact(2)) {
        for (what, theirs) in ["merged", "adapter"].iter().zip(theirs) {
            for (i, [chosen, rejected]) in ours.iter().enumerate() {
                logps.see(worst(chosen, &theirs.chosen_logps[i]), format!("{folder} {what} chosen {i}"));
                logps.see(worst(rejected, &theirs.rejected_logps[i]), format!("{folder} {what} rejected {i}"));
            }
        }
    }
    logps.at_most(2e-5);
}

#[test]
fn every_way_to_set_an_adapter_up_is_peft_s_or_is_refused() {
    everywhere(|| {
        let folder = fixture("llama");
        let model = open(&folder);
        let pairs: Vec<Ids> = read_json::<Expected>(&folder.join("expected.json")).pairs;
        let pairs: Vec<TokenizedPair> = pairs.into_iter().map(TokenizedPair::from).collect();
        let (mut logps, mut read, mut refused) = (Most::of("adapters, log-prob of a token"), vec![], vec![]);
        for folder in folders(folder.join("adapters")) {
            let expected: ExpectedOfAdapter = read_json(&folder.join("expected.json"));
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
    });
}
