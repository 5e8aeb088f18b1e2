//! A folder in bitsandbytes' own serialised form: transformers loads it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Loss, Written, each_block};
use crate::export::merge::{COPIED, begin, bytes_of, companion_bytes, copy_companions, write_json};
use crate::model::{Config, config::LinearShape};
use crate::weights::quantised::{NF4, NF4_BLOCK};
use crate::weights::safetensors::Stored;
use crate::weights::{DType, ModelFolder, SafetensorsWriter, StoredTensor};
use crate::{Error, Result};

const STATE: &str = "quant_state.bitsandbytes__nf4";
const SHARD: &str = "model.safetensors";

pub fn write(
    model: &ModelFolder,
    config: &Config,
    out: &Path,
    told: &mut dyn FnMut(&Written) -> Result<()>,
    poll: &dyn Fn() -> Result<()>,
) -> Result<()> {
    // transformers quantises a `Conv1D` as the linear layer that it is
    let tensor = |name: &str| -> Result<StoredTensor> {
        let tensor = model.tensor(name)?;
        Ok(if config.family.transposed { tensor.transposed() } else { tensor })
    };
    let linears = (0..config.num_hidden_layers).flat_map(|layer| config.linears(layer));
    let mut matrices: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    let mut skipped: Vec<String> =
        ["lm_head"].into_iter().chain(config.family.stored_head).map(str::to_string).collect();
    for LinearShape { module, inputs, outputs, .. } in linears {
        let name = config.family.stored_name(&format!("{module}.weight"), |name| model.has(name));
        if inputs.is_multiple_of(NF4_BLOCK) {
            matrices.insert(name, [outputs, inputs]);
        } else {
            skipped.push(module);
        }
    }
    if matrices.is_empty() {
        return Err(Error::input(format!(
            "{}: no linear layer has rows in whole blocks of {NF4_BLOCK}, which NF4 needs here; choose --to q8_0",
            model.path().display()
        )));
    }
    // What bitsandbytes rounds the numbers to again: the model's own type.
    let dtype = matrices.keys().find_map(|name| model.plain(name)).map_or(DType::BF16, |plain| plain.dtype);

    let states: BTreeMap<&str, Vec<u8>> = matrices.iter().map(|(name, shape)| (&**name, state(shape, dtype))).collect();
    let entries = entries(model, &matrices, &states)?;
    let bytes: u64 = entries.iter().map(|(_, stored, shape)| bytes_of(*stored, shape)).sum();
    let folder = begin(out, bytes + companion_bytes(model.path()))?;
    let mut writer = SafetensorsWriter::create(&folder.path().join(SHARD), &entries, &[("format", "pt")])?;
    let mut losses = BTreeMap::new();
    for (name, ..) in &entries {
        poll()?;
        if let Some(raw) = model.raw(name).filter(|_| !matrices.contains_key(name)) {
            for bytes in raw.bytes.chunks(COPIED) {
                poll()?;
                writer.write(name, bytes)?;
            }
            let format = raw.stored.name_and_size().0.to_lowercase();
            told(&Written { name: name.clone(), format, bytes: raw.bytes.len() as u64, error: Loss::default() })?;
        } else if model.has(name) && !matrices.contains_key(name) {
            let bytes: Vec<u8> = tensor(name)?.to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.write(name, &bytes)?;
            let (format, bytes) = (DType::F32.to_string(), bytes.len() as u64);
            told(&Written { name: name.clone(), format, bytes, error: Loss::default() })?;
        } else if let Some(matrix) = name.strip_suffix(".absmax") {
            let row = |row: &[f32], bytes: &mut Vec<u8>, _: &mut [f32]| {
                bytes.extend(row.chunks(NF4_BLOCK).flat_map(|block| absmax(block).to_le_bytes()));
            };
            each_block(&tensor(matrix)?, poll, |row| row, row, |bytes| writer.write(name, bytes))?;
        } else if let Some(matrix) = name.strip_suffix(".quant_map") {
            debug_assert!(matrices.contains_key(matrix));
            writer.write(name, &NF4.iter().flat_map(|code| code.to_le_bytes()).collect::<Vec<_>>())?;
        } else if let Some(state) = name.strip_suffix(STATE).and_then(|stem| states.get(stem.trim_end_matches('.'))) {
            writer.write(name, state)?;
        } else {
            let row = |row: &[f32], bytes: &mut Vec<u8>, back: &mut [f32]| encode(row, dtype, bytes, back);
            let loss = each_block(&tensor(name)?, poll, |row| row, row, |bytes| writer.write(name, bytes))?;
            losses.insert(name.clone(), loss);
            let elements: usize = matrices[name].iter().product();
            let bytes = (elements / 2 + elements / NF4_BLOCK * 4) as u64;
            told(&Written { name: name.clone(), format: "nf4".into(), bytes, error: loss })?;
        }
    }
    writer.finish()?;
    copy_companions(model.path(), folder.path(), None)?;
    write_config(folder.path(), &skipped)?;
    folder.finish()
}

/// What bitsandbytes keeps of a matrix as JSON.
fn state(shape: &[usize; 2], dtype: DType) -> Vec<u8> {
    let state = json!({"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": dtype.torch_name(), "shape": shape});
    state.to_string().into_bytes()
}

/// All tensors of the file, the widest numbers first, so that all are aligned.
fn entries(
    model: &ModelFolder,
    matrices: &BTreeMap<String, [usize; 2]>,
    states: &BTreeMap<&str, Vec<u8>>,
) -> Result<Vec<(String, Stored, Vec<usize>)>> {
    let mut entries = Vec::new();
    for name in model.names() {
        let Some([rows, columns]) = matrices.get(name) else {
            // no matrix is quantised already: what is decoded is a norm of a GGUF file, from which one is taken
            let (stored, shape) = match model.raw(name) {
                Some(raw) => (raw.stored, raw.shape.to_vec()),
                None => (DType::F32.into(), model.tensor(name)?.shape),
            };
            entries.push((name.to_string(), stored, shape));
            continue;
        };
        let elements = rows * columns;
        let float = Stored::Float(DType::F32);
        entries.push((format!("{name}.absmax"), float, vec![elements / NF4_BLOCK]));
        entries.push((format!("{name}.quant_map"), float, vec![16]));
        entries.push((name.to_string(), Stored::Other("U8"), vec![elements / 2, 1]));
        entries.push((format!("{name}.{STATE}"), Stored::Other("U8"), vec![states[name].len()]));
    }
    entries.sort_by_key(|(_, stored, _)| std::cmp::Reverse(stored.name_and_size().1));
    Ok(entries)
}

fn absmax(block: &[f32]) -> f32 {
    block.iter().fold(0f32, |most, x| most.max(x.abs()))
}

/// Two codes a byte, the first in the high half, and the numbers that bitsandbytes reads back.
fn encode(row: &[f32], dtype: DType, bytes: &mut Vec<u8>, back: &mut [f32]) {
    for (block, back) in row.chunks(NF4_BLOCK).zip(back.chunks_mut(NF4_BLOCK)) {
        let absmax = absmax(block);
        let scale = if absmax == 0.0 { 0.0 } else { 1.0 / absmax };
        let codes: Vec<u8> = block.iter().map(|x| nearest(x * scale)).collect();
        bytes.extend(codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]));
        for (back, code) in back.iter_mut().zip(codes) {
            *back = dtype.round(NF4[usize::from(code)] * absmax);
        }
    }
}

/// The code whose value is nearest, the borders half-way between two.
fn nearest(x: f32) -> u8 {
    let border = |pair: &[f32]| x > (pair[0] + pair[1]) / 2.0;
    NF4.windows(2).take_while(|pair| border(pair)).count() as u8
}

/// `skipped` are the modules left as they are, which a loader must not take for quantised ones.
fn write_config(folder: &Path, skipped: &[String]) -> Result<()> {
    let path = folder.join("config.json");
    let mut config: Map<String, Value> = crate::keys::object_file(&path)?;
    config.insert(
        "quantization_config".into(),
        json!({
            "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "_load_in_4bit": true,
            "_load_in_8bit": false, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
            "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": false, "llm_int8_enable_fp32_cpu_offload": false,
        }),
    );
    write_json(&path, &Value::Object(config))
}
