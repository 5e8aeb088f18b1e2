//! What a device computes, against the CPU: stored matrices decoded there, every family's and format's model, weights
//! that stream. The CPU itself goes the way of a device too, so that the way is tested where there is none.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::DType;
use dpo_lora::{
    data::TokenizedPair,
    engine::schedule::Schedule,
    kernels::{
        compute::Compute,
        dequantise::{Numbers, dequantise},
    },
    model::{decoder::Decoder, linear::Through},
    weights::{ModelFolder, StoredMatrix, upload::Uploader},
};

#[path = "support/numbers.rs"]
mod numbers;
mod support;

use numbers::devices::{Place, devices, fixtures};
use numbers::{
    DEVICE, Most, adapter, by_name, dpo, gradient_by, json, open, pair, policy, relative_l2, token_logps, worst,
};

/// Log-probs in bf16 on a device to the CPU's in f32, and gradients, relative: two roundings to 8 bits a product.
const BF16: [f64; 2] = [0.1, 0.2];
/// The most that bf16 moves a token of SmolLM2; the CPU's own bf16 products are held to the same in `tests/golden.rs`.
const GOLDEN_BF16: f64 = 0.25;
const VOCABULARY: usize = 48;

fn folders(within: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(within).expect("fixtures").map(|entry| entry.expect("an entry").path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// Where a fixture's base lies: the folder itself or the GGUF file in it.
fn base(folder: &Path) -> PathBuf {
    let files = ["model.gguf", "blocks.gguf"].map(|name| folder.join(name));
    files.into_iter().find(|file| file.exists()).unwrap_or(folder.into())
}

#[test]
fn matrices_decode_on_a_device_to_the_bits_of_the_cpu_s_decoder() {
    for Place { name: place, device } in devices() {
        let mut forms = std::collections::BTreeSet::new();
        for folder in folders(&fixtures().join("formats")) {
            let Ok(model) = ModelFolder::open(&base(&folder)) else { continue };
            for name in model.names() {
                let Ok(tensor) = model.tensor(name) else { continue };
                let (rows, columns) = (tensor.rows(), tensor.columns());
                // a buffer smaller than most matrices
                let uploader = Uploader::new(&device, Compute::F32).through(4096);
                let form = tensor.on_device(rows, columns, &uploader).unwrap();
                uploader.ready().unwrap();
                forms.insert(match &form.numbers {
                    Numbers::Plain(_) => "plain".to_string(),
                    Numbers::Blocks(blocks) => format!("{:?}, {}", blocks.kind, blocks.halves.is_some()),
                    Numbers::FourBit(four_bit) => format!("four bits to {:?}", four_bit.round),
                });
                let ours = dequantise(&form, DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (i, (ours, theirs)) in ours.iter().zip(tensor.to_f32()).enumerate() {
                    let same = ours.to_bits() == theirs.to_bits();
                    assert!(same, "{place}, {}, {name} at {i}: {ours} for {theirs}", folder.display());
                }
                assert_eq!(ours.len(), rows * columns);
            }
        }
        println!("{place}: {forms:?}");
        for form in ["Q4_0, false", "Q8_0, false", "Q4_K, false", "Q6_K, false", "four bits to BF16", "plain"] {
            assert!(forms.contains(form), "{form} was not met");
        }
    }
}

/// Models with their adapters: one of every family and format.
fn models() -> Vec<(PathBuf, PathBuf)> {
    #[derive(serde::Deserialize)]
    struct Expected {
        adapter: String,
    }
    let families =
        folders(&fixtures().join("models")).into_iter().map(|folder| (folder.clone(), folder.join("adapter")));
    let formats = ["gguf", "nf4", "int8", "gptq", "awq", "mlx", "fp8", "packed"].map(|name| {
        let folder = fixtures().join("formats").join(name);
        let expected: Expected = json(&folder.join("expected.json"));
        (base(&folder), fixtures().join("formats").join(expected.adapter))
    });
    families.chain(formats).collect()
}

/// Log-probs with and without adapter, and gradients.
struct Computed {
    logps: Vec<Vec<f32>>,
    grads: Vec<(String, Vec<f32>)>,
}

fn compute(model: &Decoder, adapter_at: &Path, pairs: &[TokenizedPair], schedule: &Schedule) -> Computed {
    let adapter = adapter(adapter_at, model);
    let logps = [Through::default(), policy(&adapter)].map(|through| token_logps(model, pairs, through));
    gradient_by(schedule, model, &adapter, &pairs.iter().collect::<Vec<_>>(), &dpo(0.1));
    let grads = by_name(&adapter, &adapter.grads.to_device(&candle_core::Device::Cpu).unwrap()).into_iter().collect();
    Computed { logps: logps.into_iter().flatten().flatten().collect(), grads }
}

fn pairs() -> Vec<TokenizedPair> {
    (0..3).map(|i| pair(i, [3 + i as usize, 5, 4], VOCABULARY)).collect()
}

#[test]
fn every_model_computes_on_a_device_what_it_does_on_the_cpu() {
    for place in devices() {
        let mut logps = Most::of("device, log-prob of a token in f32");
        let mut grads = Most::of("device, gradient in f32, relative L2");
        for (at, adapter_at) in models() {
            let schedule = Schedule::default();
            let cpu = compute(&open(&at), &adapter_at, &pairs(), &schedule);
            let ours = compute(&place.open(&at, Compute::F32), &adapter_at, &pairs(), &schedule);
            let name = format!("{} {}", place.name, at.display());
            for (ours, theirs) in ours.logps.iter().zip(&cpu.logps) {
                logps.see(worst(ours, theirs), name.as_str());
            }
            for ((tensor, ours), (_, theirs)) in ours.grads.iter().zip(&cpu.grads) {
                grads.see(relative_l2(ours, theirs), format!("{name} {tensor}"));
            }
        }
        logps.at_most(DEVICE);
        grads.at_most(DEVICE);
    }
}

#[test]
fn bf16_products_on_a_device_stay_within_their_bounds() {
    for place in devices() {
        let mut logps = Most::of("device, log-prob of a token in bf16");
        let mut grads = Most::of("device, gradient in bf16, relative L2");
        for name in ["llama", "mistral", "qwen2"] {
            let (at, schedule) = (fixtures().join("models").join(name), Schedule::default());
            let cpu = compute(&open(&at), &at.join("adapter"), &pairs(), &schedule);
            let ours = compute(&place.open(&at, Compute::Bf16), &at.join("adapter"), &pairs(), &schedule);
            for (ours, theirs) in ours.logps.iter().zip(&cpu.logps) {
                let difference = worst(ours, theirs);
                logps.see(difference, name);
            }
            for ((tensor, ours), (_, theirs)) in ours.grads.iter().zip(&cpu.grads) {
                grads.see(relative_l2(ours, theirs), format!("{name} {tensor}"));
            }
            assert!(ours.logps != cpu.logps, "{name}: nothing was rounded");
        }
        logps.at_most(BF16[0]);
        grads.at_most(BF16[1]);
    }
}

/// A real model's log-probs against TRL's, where `DPO_LORA_SMOLLM2` and `DPO_LORA_GOLDEN` say where they are.
#[test]
fn golden_log_probs_are_trl_s_on_every_device() {
    #[derive(serde::Deserialize)]
    struct Row {
        prompt_ids: Vec<u32>,
        chosen_ids: Vec<u32>,
        rejected_ids: Vec<u32>,
        policy_chosen_token_logps: Vec<f32>,
        policy_rejected_token_logps: Vec<f32>,
    }
    let (at, golden) = (support::required_env("DPO_LORA_SMOLLM2"), support::required_env("DPO_LORA_GOLDEN"));
    let Some((at, golden)) = at.zip(golden) else { return };
    let rows: Vec<Row> = json(&golden.join("pairs.json"));
    for place in devices() {
        for (compute, limit) in [(Compute::F32, DEVICE), (Compute::Bf16, GOLDEN_BF16)] {
            let mut logps = Most::of("device, golden log-prob of a token");
            let model = place.open(&at, compute);
            let adapter = adapter(&golden.join("init_adapter"), &model);
            for (i, row) in rows.iter().enumerate() {
                let (prompt, chosen, rejected) =
                    (row.prompt_ids.clone(), row.chosen_ids.clone(), row.rejected_ids.clone());
                let pair = TokenizedPair { prompt, chosen, rejected, origin: (0, 1) };
                let [chosen, rejected] = token_logps(&model, &[pair], policy(&adapter)).remove(0);
                logps.see(worst(&chosen, &row.policy_chosen_token_logps), format!("{compute:?} {i}, chosen"));
                logps.see(worst(&rejected, &row.policy_rejected_token_logps), format!("{compute:?} {i}, rejected"));
            }
            logps.at_most(limit);
        }
    }
}

/// Two runs are equal to the bit, whether weights stay on the device or stream to it.
#[test]
fn weights_that_stream_give_what_weights_that_stay_do() {
    for place in devices() {
        for (at, adapter_at) in models() {
            let stay = Schedule { sweep: 1 << 20, micro: 1, keep: 1, ..Schedule::default() };
            let stream = Schedule { stream: true, ..stay.clone() };
            let one_stays = Schedule { resident: 1, head_stays: true, ..stream.clone() };
            let model = place.open(&at, Compute::F32);
            let [first, second, again] =
                [&stay, &stream, &one_stays].map(|schedule| compute(&model, &adapter_at, &pairs(), schedule));
            assert!(first.grads.iter().any(|(_, grad)| grad.iter().any(|g| *g != 0.0)));
            for other in [second, again] {
                assert!(other.logps == first.logps && other.grads == first.grads, "{} {}", place.name, at.display());
            }
        }
    }
}
