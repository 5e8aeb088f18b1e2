//! A model folder with the adapter folded in: `W + scale·B·A`, computed in f32 and rounded once.
//!
//! Tensors stream from the base's map to the new files a block of rows at a time, so memory stays at a few blocks
//! whatever the model's size.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Value, json};

use super::peft::{AdapterFolder, AdapterMatrix};
use crate::keys::object_file;
use crate::model::Config;
use crate::outside;
use crate::store::{Folder, disk, space, write_atomic, write_text};
use crate::weights::gguf::{self, GgufFile};
use crate::weights::safetensors::Stored;
use crate::weights::{
    DType, ModelFolder, SafetensorsWriter, StoredMatrix, StoredTensor, TOOL_USE_TEMPLATE, config_object, folder::Raw,
    is_gguf,
};
use crate::{Error, Result};

/// Bytes of tensors in one file, as transformers splits them at most.
const MAX_SHARD: u64 = 5_000_000_000;

/// What follows a linear layer's name in its weight's.
const WEIGHT: &str = ".weight";

/// What older checkpoints keep of a GPT-2, GPT-J or GPT-NeoX beside its weights: the causal mask, and the number that
/// stands for what it hides, which may be -inf or beyond f16. No model reads them.
const CONSTANTS: [&str; 3] = [".masked_bias", ".attn.bias", ".attention.bias"];

/// Names Python files that go with a model.
const AUTO_MAP: &str = "auto_map";

/// Elements worked on at a time: 4 MiB in f32.
const BLOCK: usize = 1 << 20;

/// Bytes copied between two looks for signals.
pub(super) const COPIED: usize = 64 << 20;

/// What a model folder holds beside its weights and its config.
const COMPANIONS: [&str; 11] = [
    TOOL_USE_TEMPLATE,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Writes the merged model to `out`, which must not exist yet. Without `dtype` every tensor keeps its own, which a
/// quantised one cannot: an update does not survive in four bits. What is in a format that weights are not read from,
/// and the masks of older checkpoints, are copied as they lie, whatever `dtype` says. `poll` is asked between blocks
/// whether to stop.
///
/// # Errors
/// [`Error::Recipe`] where `out` is taken, or the base is quantised and no `dtype` is named; [`Error::Input`] where the
/// adapter does not fit the base or a value does not fit the number format; [`Error::Resource`] where the disk has too
/// little room; [`Error::Run`] where writing fails; what `poll` says. `out` is then left absent.
pub fn merge(
    base: &ModelFolder,
    adapter: &AdapterFolder,
    out: &Path,
    dtype: Option<DType>,
    poll: &dyn Fn() -> Result<()>,
) -> Result<()> {
    merge_in_shards(base, adapter, out, dtype, MAX_SHARD, poll)
}

/// An export replaces nothing.
pub(crate) fn refuse_taken(out: &Path) -> Result<()> {
    match out.exists() {
        true => Err(Error::recipe(format!("{}: it exists already; name a folder that does not", out.display()))),
        false => Ok(()),
    }
}

/// Asks for the room of an export before its first byte is written.
pub(super) fn require_room(out: &Path, bytes: u64) -> Result<()> {
    space::require(out, bytes, "the export", "make room, or name a place on another disk")
}

/// Begins the folder `out`, which will take so many bytes, where there is room for them: what a dead export left has
/// gone by then.
pub(super) fn begin(out: &Path, bytes: u64) -> Result<Folder> {
    let folder = Folder::create_atomic(out)?;
    // another export may have ended meanwhile
    refuse_taken(out)?;
    require_room(out, bytes)?;
    Ok(folder)
}

/// The values of a quantised base lie on a grid that updated ones do not lie on.
fn refuse_quantised(base: &ModelFolder) -> Result<()> {
    if base.quantised().is_empty() { Ok(()) } else { Err(unnamed_type(base)) }
}

fn unnamed_type(base: &ModelFolder) -> Error {
    Error::recipe(format!(
        "{}: the base is quantised ({}), so the merged weights cannot keep its type. Name the unquantised original with \
         --base MODEL: the adapter is then merged into the better weights, for which it was not trained, though. Or add \
         --dtype bf16: the quantised values are written out as bf16, with the adapter added; the folder then takes \
         2 bytes a weight, and its base is no better than the quantised one",
        base.path().display(),
        base.quantised().join(", ")
    ))
}

fn merge_in_shards(
    base: &ModelFolder,
    adapter: &AdapterFolder,
    out: &Path,
    dtype: Option<DType>,
    max_shard: u64,
    poll: &dyn Fn() -> Result<()>,
) -> Result<()> {
    refuse_taken(out)?;
    if dtype.is_none() {
        refuse_quantised(base)?;
    }
    let config = Config::read(base.path())?;
    adapter.check_fits(&config.modules())?;
    let is_head = |matrix: &AdapterMatrix| config.family.head == matrix.module;
    if config.tie_word_embeddings && adapter.matrices.iter().any(is_head) {
        let shown = base.path().display();
        return Err(Error::input(format!(
            "{shown}: the head is the embedding (tie_word_embeddings), an adapter on lm_head cannot be merged into it"
        )));
    }

    // what is quantised stands as ordinary linear layers, the merged folder has the family's own
    let linears = (0..config.num_hidden_layers).flat_map(|layer| config.linears(layer));
    let to_transpose =
        linears.filter(|linear| config.family.transposed && !config.lies_transposed(base, &linear.module));
    let stored_name = |module: &str| config.family.stored_name(&format!("{module}{WEIGHT}"), |name| base.has(name));
    let to_transpose: BTreeSet<String> = to_transpose.map(|linear| stored_name(&linear.module)).collect();
    let tensor = |name: &str| -> Result<StoredTensor> {
        let tensor = base.tensor(name)?;
        Ok(if to_transpose.contains(name) { tensor.transposed() } else { tensor })
    };

    let shards = plan_shards(base, tensor, dtype, max_shard)?;
    let total: u64 = shards.iter().flatten().map(|(_, stored, shape)| bytes_of(*stored, shape)).sum();
    let folder = begin(out, total + companion_bytes(base.path()))?;
    let file_name = |number: usize| match shards.len() {
        1 => "model.safetensors".to_string(),
        count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    let transposed = |matrix: &AdapterMatrix| config.family.transposed && !is_head(matrix);
    let mut matrices = BTreeMap::new();
    for matrix in &adapter.matrices {
        let name = stored_name(&matrix.module);
        let (stored, (output, input)) = (tensor(&name)?.shape, (matrix.output, matrix.input));
        let stands = if transposed(matrix) { [input, output] } else { [output, input] };
        if stored != stands {
            let shown = base.path().display();
            return Err(Error::input(format!(
                "{shown}: tensor {name:?} has the shape {stored:?}, config.json says {stands:?}; the two files do not \
                 belong together"
            )));
        }
        matrices.insert(name, matrix);
    }
    for (number, shard) in shards.iter().enumerate() {
        let path = folder.path().join(file_name(number));
        let mut writer = SafetensorsWriter::create(&path, shard, &[("format", "pt")])?;
        for (name, stored, _) in shard {
            let matrix = matrices.get(name);
            if let Some(raw) = base.raw(name).filter(|raw| matrix.is_none() && raw.stored == *stored) {
                for bytes in raw.bytes.chunks(COPIED) {
                    poll()?;
                    writer.write(name, bytes)?;
                }
            } else if let Stored::Float(dtype) = *stored {
                let tensor = tensor(name)?;
                match matrix {
                    None => write_blocks(&mut writer, name, &tensor, dtype, poll, |_, _| {})?,
                    Some(matrix) => {
                        let scale = adapter.config.scale_of(&matrix.module)? as f32;
                        let add = if transposed(matrix) { add_transposed } else { add };
                        let change = |row, rows: &mut [f32]| add(matrix, scale, row, rows);
                        write_blocks(&mut writer, name, &tensor, dtype, poll, change)?;
                    }
                }
            }
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let tensors = || shards.iter().enumerate().flat_map(|(number, shard)| shard.iter().map(move |t| (number, t)));
        let map: BTreeMap<&str, String> = tensors().map(|(n, (name, ..))| (name.as_str(), file_name(n))).collect();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write_json(&folder.path().join("model.safetensors.index.json"), &index)?;
    }
    copy_companions(base.path(), folder.path(), dtype)?;
    folder.finish()
}

type Shard = Vec<(String, Stored, Vec<usize>)>;

/// Fills files with tensors in the order of their names; within a file the wider numbers come first, so that all
/// are aligned.
fn plan_shards(
    base: &ModelFolder,
    tensor: impl Fn(&str) -> Result<StoredTensor>,
    dtype: Option<DType>,
    max_shard: u64,
) -> Result<Vec<Shard>> {
    let (mut shards, mut filled) = (vec![Shard::new()], 0);
    for name in base.names() {
        let (stored, shape) = match base.raw(name) {
            Some(Raw { stored, shape, .. }) if matches!(stored, Stored::Other(_)) || is_constant(name) => {
                (stored, shape.to_vec())
            }
            _ => {
                let tensor = tensor(name)?;
                let own = || DType::named(&tensor.format).ok_or_else(|| unnamed_type(base));
                (dtype.map_or_else(own, Ok)?.into(), tensor.shape)
            }
        };
        let bytes = bytes_of(stored, &shape);
        if filled > 0 && filled + bytes > max_shard {
            shards.push(Shard::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((name.to_string(), stored, shape));
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|(_, stored, _)| std::cmp::Reverse(stored.name_and_size().1));
    }
    Ok(shards)
}

fn is_constant(name: &str) -> bool {
    CONSTANTS.iter().any(|ending| name.ends_with(ending))
}

pub(super) fn bytes_of(stored: Stored, shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64 * stored.name_and_size().1 as u64
}

/// Writes a tensor in another format or with something added: `change` gets the first row's number and the rows.
fn write_blocks(
    writer: &mut SafetensorsWriter,
    name: &str,
    tensor: &StoredTensor,
    dtype: DType,
    poll: &dyn Fn() -> Result<()>,
    change: impl Fn(usize, &mut [f32]),
) -> Result<()> {
    let (width, height) = (tensor.columns(), tensor.rows());
    // where there is no row, a row may be of any width
    if width == 0 || height == 0 {
        return Ok(());
    }
    let block = (BLOCK / width).clamp(1, height);
    let (mut values, mut source, mut bytes) = (vec![0.0; block * width], Vec::new(), Vec::new());
    for first in (0..height).step_by(block) {
        poll()?;
        let rows = first..height.min(first + block);
        let values = &mut values[..rows.len() * width];
        tensor.decode(rows, 0..width, values);
        source.clear();
        source.extend_from_slice(values);
        change(first, values);
        // what is infinite in the base stays so
        let lost = |(value, source): &(&f32, &f32)| !source.is_infinite() && !dtype.holds(**value);
        if let Some((value, _)) = values.iter().zip(&source).find(lost) {
            return Err(Error::input(format!(
                "tensor {name:?}: the value {value} does not fit {dtype}; choose another --dtype"
            )));
        }
        bytes.clear();
        dtype.encode(values, &mut bytes);
        writer.write(name, &bytes)?;
    }
    Ok(())
}

/// Adds `scale·B·A` to rows of a weight, `rows` `[n, input]` from row `first` on.
fn add(matrix: &AdapterMatrix, scale: f32, first: usize, rows: &mut [f32]) {
    let (r, input) = (matrix.r, matrix.input);
    rows.par_chunks_mut(input).enumerate().for_each_init(
        || vec![0f32; input],
        |delta, (row, weights)| {
            delta.fill(0.0);
            let row = first + row;
            for (b, a) in matrix.b[row * r..(row + 1) * r].iter().zip(matrix.a.chunks_exact(input)) {
                delta.iter_mut().zip(a).for_each(|(delta, a)| *delta += b * a);
            }
            weights.iter_mut().zip(delta).for_each(|(weight, delta)| *weight += scale * *delta);
        },
    );
}

/// The same where the weight is stored transposed: `rows` `[n, output]` from input `first` on.
fn add_transposed(matrix: &AdapterMatrix, scale: f32, first: usize, rows: &mut [f32]) {
    let (r, input) = (matrix.r, matrix.input);
    rows.par_chunks_mut(matrix.output).enumerate().for_each(|(row, weights)| {
        let a: Vec<f32> = (0..r).map(|k| matrix.a[k * input + first + row]).collect();
        for (weight, b) in weights.iter_mut().zip(matrix.b.chunks_exact(r)) {
            *weight += scale * b.iter().zip(&a).map(|(b, a)| b * a).sum::<f32>();
        }
    });
}

/// Config, tokenizer and templates; the config states the new format where there is one.
pub(super) fn copy_companions(from: &Path, to: &Path, dtype: Option<DType>) -> Result<()> {
    let mut config = config_object(from)?.1;
    // The new weights are plain, whatever the base's were, and Python files are not copied.
    for key in ["quantization_config", "quantization", AUTO_MAP] {
        config.shift_remove(key);
    }
    if is_gguf(from) {
        for (name, text) in gguf::tokenizer::files(GgufFile::open(from)?.metadata())? {
            let written = to.join(name);
            make_folder_of(&written)?;
            write_text(&written, &text)?;
        }
    }
    for name in COMPANIONS.into_iter().filter(|_| !is_gguf(from)) {
        let source = from.join(name);
        if source.exists() {
            let (mut file, _) = outside::open(&source)?;
            let copied = to.join(name);
            make_folder_of(&copied)?;
            write_atomic(&copied, |to| std::io::copy(&mut file, to).map(drop))?;
        }
    }
    without_code(&to.join("tokenizer_config.json"))?;
    if let Some(dtype) = dtype {
        // `dtype` is transformers 5's name, `torch_dtype` that of 4, which 5 reads as well.
        let stated: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
        for key in if stated.is_empty() { vec!["torch_dtype"] } else { stated } {
            config.insert(key.to_string(), Value::from(dtype.torch_name()));
        }
    }
    write_json(&to.join("config.json"), &Value::Object(config))
}

/// Bytes that [`copy_companions`] copies from a folder; what it makes of a GGUF file's metadata is not known before.
pub(super) fn companion_bytes(from: &Path) -> u64 {
    COMPANIONS.iter().filter_map(|name| fs::metadata(from.join(name)).ok()).map(|found| found.len()).sum()
}

fn make_folder_of(file: &Path) -> Result<()> {
    file.parent().map_or(Ok(()), disk::create_dir_all).map_err(|e| Error::writing(file, e))
}

/// Takes the names of Python files out of a copy of `tokenizer_config.json`.
fn without_code(copy: &Path) -> Result<()> {
    if !copy.exists() {
        return Ok(());
    }
    let mut config = object_file(copy)?;
    match config.shift_remove(AUTO_MAP) {
        Some(_) => write_json(copy, &Value::Object(config)),
        None => Ok(()),
    }
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_text(path, &format!("{value:#}\n"))
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
