//! What each format costs: bytes held, time of the two products of a large matrix beside bf16, and of decoding alone.
//!
//!     cargo bench --bench formats
//!     cargo bench --bench formats -- bf16        with bf16 products
//!     cargo bench --bench formats -- decode      decoding alone
//!
//! One matrix of Llama-3.2-1B (2048 → 8192) and 512 tokens, f32 products unless said otherwise. Every format is timed
//! in each of many rounds, so that a busy machine slows all of them; of each the fastest round counts. The matrices'
//! bits are random, which the time does not depend on.

use std::{collections::BTreeMap, fs, hint::black_box, io::BufWriter, path::Path, sync::Arc, time::Instant};

use candle_core::{Device, Tensor};
use dpo_lora::{
    kernels::compute::Compute,
    random::Stream,
    weights::{
        ModelFolder, StoredMatrix, StoredTensor,
        gguf::{
            GgmlType,
            writer::{GgufWriter, Keys},
        },
        matrix::FrozenMatrix,
    },
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// As in the program: large blocks that are freed stay for the next ones.
#[global_allocator]
static ALLOCATOR: dpo_lora::heap::Heap = dpo_lora::heap::Heap;

const INPUTS: usize = 2048;
const OUTPUTS: usize = 8192;
const TOKENS: usize = 512;
const ROUNDS: usize = 25;
/// Rows and columns that decoding is timed by: about what the products ask for at once.
const TILE: [usize; 2] = [32, 512];
/// Parts of the matrix whose decoding is timed apart: so short that others' work leaves some rounds of each alone.
const PARTS: usize = 64;
const MODULE: &str = "model.layers.0.mlp.up_proj";

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A part of a quantised matrix: what follows the module's name, type, shape.
type Part = (&'static str, Dtype, Vec<usize>);

/// The products' type.
fn compute() -> Compute {
    match std::env::args().any(|argument| argument == "bf16") {
        true => Compute::bf16_or_f32(),
        false => Compute::F32,
    }
}

fn main() -> Outcome<()> {
    let place = tempfile::tempdir()?;
    let groups = INPUTS / 64;
    let (all, bnb) = (OUTPUTS * INPUTS, json!({"quant_method": "bitsandbytes"}));
    let gptq = |bits: usize, order: bool| json!({"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": order, "sym": false});
    let nf4 = |name: &'static str, kind: &'static str| -> (&'static str, Value, Vec<Part>) {
        let parts = vec![
            (".weight", Dtype::U8, vec![all / 2, 1]),
            (".weight.absmax", Dtype::F32, vec![all / 64]),
            (".weight.quant_map", Dtype::F32, vec![16]),
            (kind, Dtype::U8, vec![]),
        ];
        (name, bnb.clone(), parts)
    };
    let packed = |bits: usize| -> Vec<Part> {
        vec![
            (".qweight", Dtype::I32, vec![INPUTS * bits / 32, OUTPUTS]),
            (".qzeros", Dtype::I32, vec![groups, OUTPUTS * bits / 32]),
            (".scales", Dtype::F16, vec![groups, OUTPUTS]),
            (".g_idx", Dtype::I32, vec![INPUTS]),
        ]
    };
    let mlx = |bits: usize| -> Vec<Part> {
        vec![
            (".weight", Dtype::U32, vec![OUTPUTS, INPUTS * bits / 32]),
            (".scales", Dtype::BF16, vec![OUTPUTS, groups]),
            (".biases", Dtype::BF16, vec![OUTPUTS, groups]),
        ]
    };
    let folders: Vec<(&str, Value, Vec<Part>)> = vec![
        ("bf16", Value::Null, vec![(".weight", Dtype::BF16, vec![OUTPUTS, INPUTS])]),
        nf4("NF4", ".weight.quant_state.bitsandbytes__nf4"),
        nf4("FP4", ".weight.quant_state.bitsandbytes__fp4"),
        (
            "int8",
            bnb.clone(),
            vec![
                (".weight", Dtype::I8, vec![OUTPUTS, INPUTS]),
                (".SCB", Dtype::F32, vec![OUTPUTS]),
                (".weight_format", Dtype::U8, vec![1]),
            ],
        ),
        ("GPTQ 4 bit", gptq(4, false), packed(4)),
        ("GPTQ 4 bit, act-order", gptq(4, true), packed(4)),
        ("GPTQ 8 bit", gptq(8, false), packed(8)),
        (
            "AWQ",
            json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true}),
            vec![
                (".qweight", Dtype::I32, vec![INPUTS, OUTPUTS / 8]),
                (".qzeros", Dtype::I32, vec![groups, OUTPUTS / 8]),
                (".scales", Dtype::F16, vec![groups, OUTPUTS]),
            ],
        ),
        ("MLX 4 bit", json!({"bits": 4, "group_size": 64}), mlx(4)),
        ("MLX 8 bit", json!({"bits": 8, "group_size": 64}), mlx(8)),
        (
            "FP8",
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
            vec![(".weight", Dtype::F8_E4M3, vec![OUTPUTS, INPUTS]), (".weight_scale", Dtype::BF16, vec![OUTPUTS, 1])],
        ),
        (
            "packed 4 bit",
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            vec![
                (".weight_packed", Dtype::I32, vec![OUTPUTS, INPUTS / 8]),
                (".weight_scale", Dtype::BF16, vec![OUTPUTS, groups]),
                (".weight_shape", Dtype::I64, vec![2]),
            ],
        ),
    ];
    let mut matrices = Vec::new();
    for (name, section, parts) in &folders {
        let folder = place.path().join(name);
        fs::create_dir(&folder)?;
        write_folder(&folder, section, parts)?;
        matrices.push((name.to_string(), matrix(&folder)?));
    }
    for kind in [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
    ] {
        let file = place.path().join(format!("{kind}.gguf"));
        write_gguf(&file, kind)?;
        matrices.push((kind.to_string(), matrix(&file)?));
    }

    let random = |rows, columns| Tensor::rand(-1f32, 1.0, (rows, columns), &Device::Cpu);
    let (x, dy, dx) = (random(TOKENS, INPUTS)?, random(TOKENS, OUTPUTS)?, random(TOKENS, INPUTS)?);
    let products = !std::env::args().any(|argument| argument == "decode");
    let mut best = vec![([f64::INFINITY; 2], [f64::INFINITY; PARTS]); matrices.len()];
    for _ in 0..ROUNDS {
        for ((_, (matrix, stored)), (best, decoded)) in matrices.iter().zip(&mut best) {
            time_decoding(stored, decoded);
            if !products {
                continue;
            }
            let began = Instant::now();
            // within the pool, as training computes
            let y = rayon::scope(|_| black_box(matrix.apply(&x)))?;
            best[0] = best[0].min(began.elapsed().as_secs_f64());
            drop(y);
            let began = Instant::now();
            rayon::scope(|_| matrix.add_backward(&dx, &dy))?;
            best[1] = best[1].min(began.elapsed().as_secs_f64());
        }
    }
    let decode = |parts: &[f64; PARTS]| 1e9 * parts.iter().sum::<f64>() / all as f64;
    if !products {
        println!("| format | decode, ns a number (one core) |");
        println!("| --- | --- |");
        for ((name, _), (_, decoded)) in matrices.iter().zip(&best) {
            println!("| {name} | {:.3} |", decode(decoded));
        }
        return Ok(());
    }
    println!("| format | MiB | bits a weight | forward | backward | both | decode, ns a number (one core) |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let plain = best[0].0;
    for ((name, (_, stored)), ([forward, backward], decoded)) in matrices.iter().zip(&best) {
        let bytes = stored.stored_bytes();
        println!(
            "| {name} | {:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.3} |",
            bytes as f64 / f64::from(1 << 20),
            8.0 * bytes as f64 / all as f64,
            forward / plain[0],
            backward / plain[1],
            (forward + backward) / (plain[0] + plain[1]),
            decode(decoded)
        );
    }
    println!("bf16: {:.1} ms forward, {:.1} ms backward", 1e3 * plain[0], 1e3 * plain[1]);
    Ok(())
}

/// The matrix in a folder or file, to multiply with and as it is stored.
fn matrix(path: &Path) -> Outcome<(FrozenMatrix, StoredTensor)> {
    let stored = ModelFolder::open(path)?.tensor(&format!("{MODULE}.weight"))?;
    let matrix = FrozenMatrix::new(Arc::new(stored.clone()), OUTPUTS, INPUTS, &Device::Cpu, compute());
    Ok((matrix, stored))
}

/// Decodes the matrix, tile after tile, on this thread; where one of its parts took fewer seconds than ever before,
/// says so in `best`.
fn time_decoding(stored: &StoredTensor, best: &mut [f64; PARTS]) {
    let [rows, columns] = TILE;
    let mut tile = vec![0f32; rows * columns];
    let tiles: Vec<[usize; 2]> = (0..INPUTS / columns)
        .flat_map(|column| (0..OUTPUTS / rows).map(move |row| [row * rows, column * columns]))
        .collect();
    for (part, best) in tiles.chunks_exact(tiles.len() / PARTS).zip(best) {
        let began = Instant::now();
        for &[row, column] in part {
            stored.decode(row..row + rows, column..column + columns, &mut tile);
            black_box(&tile);
        }
        *best = best.min(began.elapsed().as_secs_f64());
    }
}

/// Random bits, of which every two are small numbers as f16 and as bf16 and every four as f32.
fn bits(n: usize) -> Vec<u8> {
    let stream = Stream::new(1, "formats");
    (0..n).map(|at| if at % 2 == 1 { 0x2c } else { (stream.uniform(at as u64) * 256.0) as u8 }).collect()
}

fn write_folder(folder: &Path, section: &Value, parts: &[Part]) -> Outcome<()> {
    let mut config = json!({"model_type": "llama"});
    if !section.is_null() {
        let key = if section.get("quant_method").is_some() { "quantization_config" } else { "quantization" };
        config[key] = section.clone();
    }
    fs::write(folder.join("config.json"), config.to_string())?;
    let mut tensors = BTreeMap::new();
    for (suffix, dtype, shape) in parts {
        let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let (bytes, shape) = match *suffix {
            ".weight_shape" => {
                ([OUTPUTS as i64, INPUTS as i64].iter().flat_map(|n| n.to_le_bytes()).collect(), shape.clone())
            }
            ".g_idx" => {
                // some order in which neighbours are in groups of their own
                let step = if section["desc_act"] == true { 401 } else { 1 };
                let group = |at: usize| (at * step % INPUTS / 64) as i32;
                ((0..INPUTS).flat_map(|at| group(at).to_le_bytes()).collect(), shape.clone())
            }
            ".weight_format" => (vec![0], vec![]),
            ".weight.quant_map" => {
                (dpo_lora::weights::quantised::NF4.iter().flat_map(|x| x.to_le_bytes()).collect(), shape.clone())
            }
            state if state.contains("quant_state") => {
                let kind = &state[state.len() - 3..];
                let text =
                    json!({"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [OUTPUTS, INPUTS]})
                        .to_string();
                let n = text.len();
                (text.into_bytes(), vec![n])
            }
            _ => (bits(size), shape.clone()),
        };
        tensors.insert(format!("{MODULE}{suffix}"), (*dtype, shape, bytes));
    }
    let views =
        tensors.iter().map(|(name, (dtype, shape, bytes))| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

fn write_gguf(file: &Path, kind: GgmlType) -> Outcome<()> {
    let mut keys = Keys::default();
    keys.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 128),
        ("embedding_length", INPUTS),
        ("feed_forward_length", OUTPUTS),
        ("attention.head_count", 32),
        ("vocab_size", 64),
    ] {
        keys.size(&format!("llama.{key}"), value as u32);
    }
    keys.number("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let (block, size) = kind.block();
    let mut out = BufWriter::new(fs::File::create(file)?);
    let entry = ("blk.0.ffn_up.weight".to_string(), kind, vec![OUTPUTS, INPUTS]);
    let mut writer = GgufWriter::begin(&mut out, &keys, &[entry])?;
    writer.write(&bits(OUTPUTS * INPUTS / block * size))?;
    writer.end_tensor()?;
    Ok(())
}
