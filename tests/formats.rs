//! Quantised bases: single matrices equal to what the formats' own programs read (bit for bit where those compute in
//! f32), and whole tiny models whose log-probs and gradients are those of transformers and PEFT on the same numbers.
//! Fixtures: `tools/fixtures/formats.py`.

#[path = "support/numbers.rs"]
mod numbers;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use dpo_lora::{
    data::TokenizedPair,
    model::linear::Through,
    optim::global_norm,
    weights::{ModelFolder, StoredMatrix},
};
use numbers::{
    Ids, Most, adapter, allowed, by_name, dpo, everywhere, gradient, json as read, open, policy, relative_l2, tensors,
    token_logps, worst,
};
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Expected {
    beta: f64,
    pairs: Vec<Ids>,
    loss: f64,
    grad_norm: f64,
    adapter: String,
}

fn fixtures() -> PathBuf {
    numbers::devices::fixtures().join("formats")
}

/// Where a fixture's base lies: the folder itself or the GGUF file in it.
fn base(folder: &Path) -> PathBuf {
    ["model.gguf", "blocks.gguf"]
        .map(|name| folder.join(name))
        .into_iter()
        .find(|file| file.exists())
        .unwrap_or(folder.into())
}

/// Matrices of every format, whole and in tiles, against the numbers in `expected.safetensors`.
fn matrices(name: &str) {
    let folder = fixtures().join(name);
    let (model, expected) = (ModelFolder::open(&base(&folder)).unwrap(), tensors(&folder.join("expected.safetensors")));
    assert_eq!(model.names().filter(|name| expected.contains_key(*name)).count(), expected.len());
    for (name, theirs) in &expected {
        let tensor = model.tensor(name).unwrap();
        let (rows, columns) = (tensor.rows(), tensor.columns());
        let ours = tensor.to_f32();
        assert_eq!(ours.len(), theirs.len(), "{name}");
        for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{name} ({}) at {i}: {ours} for {theirs}", tensor.format);
        }
        for (from, to) in [(32, columns), (0, 32), (64, 192.min(columns)), (columns / 64 * 32, columns)] {
            if from >= to {
                continue;
            }
            let mut tile = vec![0.0; to - from];
            tensor.decode(rows - 1..rows, from..to, &mut tile);
            assert_eq!(tile, &ours[(rows - 1) * columns + from..][..to - from], "{name} columns {from}..{to}");
        }
    }
}

/// A whole model against transformers and PEFT.
fn model(folder: &Path, logps: &mut Most, grads: &mut Most) {
    let name = folder.file_name().expect("a name").to_string_lossy();
    let expected: Expected = read(&folder.join("expected.json"));
    let theirs = tensors(&folder.join("expected.safetensors"));
    let pairs: Vec<TokenizedPair> = expected.pairs.into_iter().map(TokenizedPair::from).collect();
    let model = open(&base(folder));
    let adapter = adapter(&folder.parent().expect("fixtures").join(&expected.adapter), &model);
    for (who, through) in [("base", Through::default()), ("policy", policy(&adapter))] {
        for (i, ours) in token_logps(&model, &pairs, through).iter().enumerate() {
            for (side, ours) in ["chosen", "rejected"].iter().zip(ours) {
                let tensor = format!("{who}.{side}.{i}");
                logps.see(worst(ours, &theirs[&tensor]), format!("{name} {tensor}"));
            }
        }
    }
    let means = gradient(&model, &adapter, &pairs.iter().collect::<Vec<_>>(), &dpo(expected.beta));
    assert!(
        (means.loss / expected.loss - 1.0).abs() < allowed(1e-5),
        "{name}: loss {} for {}",
        means.loss,
        expected.loss
    );
    let norm = global_norm(&adapter.grads).expect("a norm");
    assert!((norm / expected.grad_norm - 1.0).abs() < allowed(1e-5), "{name}: norm {norm} for {}", expected.grad_norm);
    let ours = by_name(&adapter, &adapter.grads);
    assert_eq!(theirs.keys().filter(|tensor| tensor.starts_with("grad.")).count(), ours.len());
    for (tensor, ours) in &ours {
        grads.see(relative_l2(ours, &theirs[&format!("grad.{tensor}")]), format!("{name} {tensor}"));
    }
}

/// A fixture whose file and config have been changed: header, data and config are handed to `change`.
fn changed(name: &str, change: impl Fn(&mut Map<String, Value>, &mut Vec<u8>, &mut Value)) -> TempDir {
    let (from, folder) = (fixtures().join(name), tempfile::tempdir().unwrap());
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let (mut header, mut data) = (serde_json::from_slice(header).unwrap(), data.to_vec());
    let mut config: Value = read(&from.join("config.json"));
    change(&mut header, &mut data, &mut config);
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// The same numbers as the fixture's own file holds.
fn same_numbers(folder: &TempDir, name: &str) {
    let model = ModelFolder::open(folder.path()).unwrap();
    for (tensor, theirs) in &tensors(&fixtures().join(name).join("expected.safetensors")) {
        assert!(model.tensor(tensor).unwrap().to_f32() == *theirs, "{name}: {tensor}");
    }
}

fn refusal(folder: &TempDir) -> String {
    let error = ModelFolder::open(folder.path()).expect_err("refused");
    assert_eq!(error.exit_code(), 3, "{error}");
    error.to_string()
}

/// Scales under compressed-tensors' and AutoFP8's name.
fn plainly_named(header: &mut Map<String, Value>) {
    let names = std::mem::take(header).into_iter();
    header.extend(names.map(|(name, entry)| (name.replace("weight_scale_inv", "weight_scale"), entry)));
}

/// The numbers of `fp8-blocks` as compressed-tensors names them; the last blocks are cut off, so their size must be
/// stated.
#[test]
fn fp8_blocks_of_compressed_tensors_are_of_the_size_that_it_states() {
    let stated = |block: Value| {
        changed("fp8-blocks", |header, _, config| {
            plainly_named(header);
            let group = json!({"weights": {"num_bits": 8, "strategy": "block", "block_structure": block}});
            config["quantization_config"] =
                json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}});
        })
    };
    same_numbers(&stated(json!([128, 128])), "fp8-blocks");
    same_numbers(&stated(json!("128x128")), "fp8-blocks");
    let said = refusal(&stated(Value::Null));
    assert!(said.contains("weight_scale"), "{said}");
}

#[test]
fn fp8_of_autofp8_is_named_otherwise() {
    let folder = changed("fp8-matrices", |_, _, config| {
        config["quantization_config"] = json!({"quant_method": "fp8", "activation_scheme": "dynamic"});
    });
    same_numbers(&folder, "fp8-matrices");
}

/// AutoGPTQ's older folders say in a file of its own what `config.json` says now.
#[test]
fn gptq_may_be_described_beside_the_config() {
    let folder = changed("gptq-4-v1", |_, _, config| {
        config.as_object_mut().expect("an object").remove("quantization_config");
    });
    let said = refusal(&folder);
    assert!(said.contains("states no quantization_config") && said.contains("quantize_config.json"), "{said}");
    let beside = json!({"bits": 4, "group_size": 32, "desc_act": false, "sym": false, "true_sequential": true});
    fs::write(folder.path().join("quantize_config.json"), beside.to_string()).unwrap();
    same_numbers(&folder, "gptq-4-v1");
    // what is cached of a model depends on it
    let model = ModelFolder::open(folder.path()).unwrap();
    assert!(model.files().any(|file| file.ends_with("quantize_config.json")));
}

/// compressed-tensors stored zero points as they are, a byte each, before it packed them.
#[test]
fn zero_points_of_packed_numbers_may_be_bytes() {
    let (from, folder) = (fixtures().join("packed-matrices"), tempfile::tempdir().unwrap());
    fs::copy(from.join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let unpacked = |(name, view): (String, TensorView)| {
        if !name.ends_with("weight_zero_point") {
            return (name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
        }
        let (rows, groups) = (view.shape()[0] * 8, view.shape()[1]);
        let words = view.data().as_chunks::<4>().0;
        let code = |row: usize, group: usize| u32::from_le_bytes(words[row / 8 * groups + group]) >> (row % 8 * 4) & 15;
        let zeros = (0..rows * groups).map(|i| (code(i / groups, i % groups) as u8).wrapping_sub(8)).collect();
        (name, Dtype::I8, vec![rows, groups], zeros)
    };
    let tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> =
        SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(unpacked).collect();
    assert_eq!(tensors.iter().filter(|tensor| tensor.1 == Dtype::I8).count(), 2);
    let view = |dtype: Dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| (name.as_str(), view(*dtype, shape, bytes)));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    same_numbers(&folder, "packed-matrices");
}

/// `bnb_4bit_quant_storage` of another type than uint8: the same bytes.
#[test]
fn four_bits_may_be_stored_as_numbers_of_another_type() {
    let folder = changed("bitsandbytes-matrices", |header, _, _| {
        for entry in header.values_mut().filter(|entry| entry["dtype"] == "U8") {
            if let Some([bytes, 1]) = serde_json::from_value::<Vec<usize>>(entry["shape"].clone()).ok().as_deref() {
                (entry["shape"], entry["dtype"]) = (json!([bytes / 2, 1]), json!("BF16"));
            }
        }
    });
    same_numbers(&folder, "bitsandbytes-matrices");
}

#[test]
fn numbers_that_mean_something_else_are_refused() {
    let tiled = changed("int8", |header, data, _| {
        let format = &header["model.layers.0.mlp.up_proj.weight_format"]["data_offsets"][0];
        data[format.as_u64().expect("a place") as usize] = 1;
    });
    assert!(refusal(&tiled).contains("rows do not follow each other"));
    let scaled = changed("awq", |header, data, _| {
        let at = data.len();
        data.extend([0; 4]);
        let scales = json!({"dtype": "F16", "shape": [2], "data_offsets": [at, at + 4]});
        header.insert("model.layers.0.mlp.act.scales".into(), scales);
    });
    assert!(refusal(&scaled).contains("divides what an activation gives"));
    let rotated = changed("packed", |_, _, config| {
        config["quantization_config"]["transform_config"] = json!({"config_groups": {"R3": {"type": "hadamard"}}});
    });
    assert!(refusal(&rotated).contains("transform_config"));
    for name in ["gptq-4-v1", "awq"] {
        // four groups of 40 are 120 inputs and the 8 that are left, not four groups of 32
        let uneven = changed(name, |_, _, config| config["quantization_config"]["group_size"] = json!(40));
        assert!(refusal(&uneven).contains("makes groups of different sizes"), "{name}");
        let none = changed(name, |_, _, config| config["quantization_config"]["group_size"] = json!(0.5));
        ModelFolder::open(none.path()).unwrap();
    }
}

#[test]
fn ggml_blocks_are_those_of_gguf_py() {
    matrices("ggml");
}

#[test]
fn bitsandbytes_matrices_are_its_own() {
    matrices("bitsandbytes-matrices");
}

#[test]
fn gptq_and_awq_matrices_are_those_of_gptqmodel() {
    for name in ["gptq-4-v1", "gptq-8-v2", "gptq-8-v1-order", "awq-matrices"] {
        matrices(name);
    }
}

#[test]
fn mlx_matrices_are_its_own() {
    matrices("mlx-matrices");
}

#[test]
fn fp8_and_packed_matrices_are_those_of_compressed_tensors() {
    for name in ["fp8-matrices", "fp8-blocks", "packed-matrices"] {
        matrices(name);
    }
}

#[test]
fn a_quantised_model_computes_what_transformers_does_on_its_numbers() {
    everywhere(|| {
        let (mut logps, mut grads) = (Most::of("quantised, log-prob of a token"), Most::of("quantised, LoRA gradient"));
        for name in ["gguf", "nf4", "int8", "gptq", "awq", "mlx", "fp8", "packed"] {
            model(&fixtures().join(name), &mut logps, &mut grads);
        }
        logps.at_most(2e-5);
        grads.at_most(1e-4);
    });
}

#[test]
fn what_is_said_to_be_exact_in_bf16_is() {
    let mut said = BTreeSet::new();
    for folder in fs::read_dir(fixtures()).expect("fixtures").map(|entry| entry.expect("an entry").path()) {
        if folder.join("adapter_model.safetensors").exists() {
            continue;
        }
        let model = ModelFolder::open(&base(&folder)).unwrap();
        for name in model.names() {
            let tensor = model.tensor(name).unwrap();
            if tensor.exact_in_bf16() {
                for (i, x) in tensor.to_f32().into_iter().enumerate() {
                    assert!(x.is_nan() || x.to_bits() << 16 == 0, "{name} of {} at {i}: {x:e}", folder.display());
                }
                said.insert(tensor.format);
            }
        }
    }
    assert_eq!(
        said.into_iter().collect::<Vec<_>>(),
        [
            "bf16",
            "fp4",
            "fp8 e4m3",
            "mlx 2 bit",
            "mlx 3 bit",
            "mlx 4 bit",
            "mlx 6 bit",
            "mlx 8 bit",
            "nf4",
            "packed 4 bit"
        ]
    );
}

/// `tools/fixtures/families.py`
#[test]
fn every_family_in_nf4_computes_what_transformers_does_on_its_numbers() {
    everywhere(|| {
        let (mut logps, mut grads) =
            (Most::of("families in NF4, log-prob of a token"), Most::of("families in NF4, LoRA gradient"));
        let folders = fs::read_dir(fixtures().join("../families")).expect("fixtures");
        let folders: BTreeSet<PathBuf> = folders.map(|entry| entry.expect("an entry").path()).collect();
        assert_eq!(folders.len(), 12);
        for folder in &folders {
            assert_eq!(ModelFolder::open(folder).unwrap().quantised(), ["nf4"], "{}", folder.display());
            model(folder, &mut logps, &mut grads);
        }
        logps.at_most(2e-5);
        grads.at_most(1e-4);
    });
}
