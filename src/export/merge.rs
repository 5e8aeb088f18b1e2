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
use crate::model::Config;
use crate::outside;
use crate::store::{Folder, SafetensorsWriter, write_atomic};
use crate::weights::gguf::{self, GgufFile};
use crate::weights::safetensors::Stored;
use crate::weights::{DType, ModelFolder, StoredMatrix, StoredTensor, config_object, folder::Raw, is_gguf};
use crate::{Error, Result};

/// Bytes of tensors in one file, as transformers splits them at most.
const MAX_SHARD: u64 = 5_000_000_000;

/// What follows a linear layer's name in its weight's.
const WEIGHT: &str = ".weight";

/// Elements worked on at a time: 4 MiB in f32.
const BLOCK: usize = 1 << 20;

/// What a model folder holds beside its weights and its config.
const COMPANIONS: [&str; 11] = [
    "additional_chat_templates/tool_use.jinja",
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
/// quantised one cannot: an update does not survive in four bits. What is in a format that weights are not read from, as
/// the masks of older checkpoints are, is copied as it lies, whatever `dtype` says.
///
/// # Errors
/// [`Error::Recipe`] where `out` is taken, or the base is quantised and no `dtype` is named; [`Error::Input`] where the adapter does not fit the base or a value does
/// not fit the number format; [`Error::Run`] or [`Error::Resource`] where writing fails. `out` is then left absent.
pub fn merge(base: &ModelFolder, adapter: &AdapterFolder, out: &Path, dtype: Option<DType>) -> Result<()> {
    merge_in_shards(base, adapter, out, dtype, MAX_SHARD)
}

/// An export replaces nothing.
pub(crate) fn refuse_taken(out: &Path) -> Result<()> {
    match out.exists() {
        true => Err(Error::recipe(format!("{}: it exists already; name a folder that does not", out.display()))),
        false => Ok(()),
    }
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
    let to_turn = linears.filter(|linear| config.family.turned && !config.lies_turned(base, &linear.module));
    let stored_name = |module: &str| config.family.stored_name(&format!("{module}{WEIGHT}"), |name| base.has(name));
    let to_turn: BTreeSet<String> = to_turn.map(|linear| stored_name(&linear.module)).collect();
    let tensor = |name: &str| -> Result<StoredTensor> {
        let tensor = base.tensor(name)?;
        Ok(if to_turn.contains(name) { tensor.turned() } else { tensor })
    };

    let folder = Folder::create_atomic(out)?;
    let shards = plan_shards(base, tensor, dtype, max_shard)?;
    let file_name = |number: usize| match shards.len() {
        1 => "model.safetensors".to_string(),
        count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    let turned = |matrix: &AdapterMatrix| config.family.turned && !is_head(matrix);
    let mut matrices = BTreeMap::new();
    for matrix in &adapter.matrices {
        let name = stored_name(&matrix.module);
        let (stored, (output, input)) = (tensor(&name)?.shape, (matrix.output, matrix.input));
        let stands = if turned(matrix) { [input, output] } else { [output, input] };
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
                writer.write(name, raw.bytes)?;
            } else if let Stored::Float(dtype) = *stored {
                let tensor = tensor(name)?;
                match matrix {
                    None => write_blocks(&mut writer, name, &tensor, dtype, |_, _| {})?,
                    Some(matrix) => {
                        let scale = adapter.config.scale_of(&matrix.module)? as f32;
                        let add = if turned(matrix) { add_turned } else { add };
                        write_blocks(&mut writer, name, &tensor, dtype, |row, rows| add(matrix, scale, row, rows))?;
                    }
                }
            }
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let tensors = || shards.iter().enumerate().flat_map(|(number, shard)| shard.iter().map(move |t| (number, t)));
        let total: u64 = tensors().map(|(_, (_, stored, shape))| bytes_of(*stored, shape)).sum();
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
            Some(Raw { stored: stored @ Stored::Other(_), shape, .. }) => (stored, shape.to_vec()),
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

fn bytes_of(stored: Stored, shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64 * stored.name_and_size().1 as u64
}

/// Writes a tensor in another format or with something added: `change` gets the first row's number and the rows.
fn write_blocks(
    writer: &mut SafetensorsWriter,
    name: &str,
    tensor: &StoredTensor,
    dtype: DType,
    change: impl Fn(usize, &mut [f32]),
) -> Result<()> {
    let (width, height) = (tensor.columns(), tensor.rows());
    // where there is no row, a row may be of any width
    if width == 0 || height == 0 {
        return Ok(());
    }
    let block = (BLOCK / width).clamp(1, height);
    let (mut values, mut bytes) = (vec![0.0; block * width], Vec::new());
    for first in (0..height).step_by(block) {
        let rows = first..height.min(first + block);
        let values = &mut values[..rows.len() * width];
        tensor.decode(rows, 0..width, values);
        change(first, values);
        if let Some(value) = values.iter().find(|value| !dtype.holds(**value)) {
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

/// The same where the weight is stored turned: `rows` `[n, output]` from input `first` on.
fn add_turned(matrix: &AdapterMatrix, scale: f32, first: usize, rows: &mut [f32]) {
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
    // The new weights are plain, whatever the base's were.
    for key in ["quantization_config", "quantization"] {
        config.shift_remove(key);
    }
    if is_gguf(from) {
        for (name, text) in gguf::tokenizer::files(GgufFile::open(from)?.metadata())? {
            write_atomic(&to.join(name), |file| std::io::Write::write_all(file, text.as_bytes()))?;
        }
    }
    for name in COMPANIONS.into_iter().filter(|_| !is_gguf(from)) {
        let source = from.join(name);
        if source.exists() {
            let (mut file, _) = outside::open(&source)?;
            let copied = to.join(name);
            fs::create_dir_all(copied.parent().unwrap_or(to)).map_err(|e| Error::writing(&copied, e))?;
            write_atomic(&copied, |to| std::io::copy(&mut file, to).map(drop))?;
        }
    }
    if let Some(dtype) = dtype {
        // `dtype` is transformers 5's name, `torch_dtype` that of 4, which 5 reads as well.
        let stated: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
        for key in if stated.is_empty() { vec!["torch_dtype"] } else { stated } {
            config.insert(key.to_string(), Value::from(dtype.torch_name()));
        }
    }
    write_json(&to.join("config.json"), &Value::Object(config))
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_atomic(path, |file| std::io::Write::write_all(file, format!("{value:#}\n").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::AdapterConfig;
    use crate::store::verify;

    const CONFIG: &str = r#"{"model_type":"llama","hidden_size":4,"intermediate_size":6,"num_hidden_layers":1,
        "num_attention_heads":2,"vocab_size":5,"rms_norm_eps":1e-5,"max_position_embeddings":8,"dtype":"bfloat16"}"#;

    /// Quarters between -1 and 1: every sum and product here is exact in f32 and bf16.
    fn value(i: usize) -> f32 {
        (i * 5 % 9) as f32 / 4.0 - 1.0
    }

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(value).collect()
    }

    /// A base of an embedding, a norm (f32), two adapted matrices and a head.
    fn base() -> (tempfile::TempDir, ModelFolder) {
        base_with(&[])
    }

    /// The same with more tensors; those of other formats hold bytes that count up.
    fn base_with(more: &[(&str, Stored, &[usize])]) -> (tempfile::TempDir, ModelFolder) {
        let folder = tempfile::tempdir().unwrap();
        let own: [(&str, Stored, &[usize]); 5] = [
            ("model.norm.weight", DType::F32.into(), &[4]),
            ("model.embed_tokens.weight", DType::BF16.into(), &[5, 4]),
            ("model.layers.0.mlp.up_proj.weight", DType::BF16.into(), &[6, 4]),
            ("model.layers.0.mlp.down_proj.weight", DType::BF16.into(), &[4, 6]),
            ("lm_head.weight", DType::BF16.into(), &[5, 4]),
        ];
        let entry = |(name, stored, shape): &(&str, Stored, &[usize])| (name.to_string(), *stored, shape.to_vec());
        let entries: Vec<_> = own.iter().chain(more).map(entry).collect();
        let mut writer = SafetensorsWriter::create(&folder.path().join("model.safetensors"), &entries, &[]).unwrap();
        for (name, stored, shape) in &entries {
            let elements: usize = shape.iter().product();
            let mut bytes = Vec::new();
            match stored {
                Stored::Float(dtype) => dtype.encode(&values(elements), &mut bytes),
                Stored::Other(_) => bytes.extend((0..).take(elements * stored.name_and_size().1)),
            }
            writer.write(name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        fs::write(folder.path().join("config.json"), CONFIG).unwrap();
        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        fs::write(folder.path().join(COMPANIONS[0]), "for tools").unwrap();
        fs::write(folder.path().join("optimizer.bin"), "not ours").unwrap();
        let model = ModelFolder::open(folder.path()).unwrap();
        (folder, model)
    }

    fn matrix(module: &str, input: usize, output: usize) -> AdapterMatrix {
        let (a, b) = (values(2 * input), values(output * 2));
        AdapterMatrix { module: module.into(), a, b, r: 2, input, output }
    }

    /// Rank 2, scale 4.
    fn adapter() -> AdapterFolder {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"peft_type":"LORA","r":2,"lora_alpha":8,"target_modules":["up_proj","down_proj"]}"#;
        fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        AdapterFolder {
            config: AdapterConfig::read(folder.path()).unwrap(),
            matrices: vec![matrix("model.layers.0.mlp.up_proj", 4, 6), matrix("model.layers.0.mlp.down_proj", 6, 4)],
        }
    }

    /// `W + 4·B·A`, element by element.
    fn expected(matrix: &AdapterMatrix) -> Vec<f32> {
        let element = |i: usize, j: usize| {
            let sum: f32 = (0..2).map(|k| matrix.b[i * 2 + k] * matrix.a[k * matrix.input + j]).sum();
            value(i * matrix.input + j) + 4.0 * sum
        };
        (0..matrix.output).flat_map(|i| (0..matrix.input).map(move |j| element(i, j))).collect()
    }

    #[test]
    fn the_adapted_matrices_change_and_nothing_else() {
        let (_folder, base) = base();
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("merged");
        let adapter = adapter();
        merge(&base, &adapter, &out, None).unwrap();
        let merged = ModelFolder::open(&out).unwrap();
        assert!(merged.names().eq(base.names()));
        for name in base.names() {
            let (before, after) = (base.plain(name).unwrap(), merged.plain(name).unwrap());
            assert_eq!((before.dtype, &before.shape), (after.dtype, &after.shape), "{name}");
            match adapter.matrices.iter().find(|matrix| format!("{}.weight", matrix.module) == name) {
                Some(matrix) => assert_eq!(after.to_f32(), expected(matrix), "{name}"),
                None => assert_eq!(after.bytes(), before.bytes(), "{name}"),
            }
        }
        verify(&out).unwrap();
        let mut files: Vec<_> = fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name()).collect();
        files.sort();
        let templates = "additional_chat_templates";
        assert_eq!(files, [templates, "config.json", "manifest.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(fs::read_to_string(out.join(COMPANIONS[0])).unwrap(), "for tools");
        assert!(fs::read_to_string(out.join("config.json")).unwrap().contains("\"dtype\": \"bfloat16\""));
        let said = merge(&base, &adapter, &out, None).unwrap_err();
        assert!(said.to_string().contains("exists already") && said.exit_code() == 2);
    }

    #[test]
    fn shards_hold_the_same_tensors() {
        let (_folder, base) = base();
        let place = tempfile::tempdir().unwrap();
        let (one, many) = (place.path().join("one"), place.path().join("many"));
        merge(&base, &adapter(), &one, Some(DType::F32)).unwrap();
        merge_in_shards(&base, &adapter(), &many, Some(DType::F32), 200).unwrap();
        assert!(many.join("model-00003-of-00003.safetensors").exists());
        let (one, many) = (ModelFolder::open(&one).unwrap(), ModelFolder::open(&many).unwrap());
        assert!(one.names().eq(many.names()));
        for name in one.names() {
            let (a, b) = (one.plain(name).unwrap(), many.plain(name).unwrap());
            assert_eq!((a.dtype, a.bytes()), (DType::F32, b.bytes()), "{name}");
        }
        let config = fs::read_to_string(many.path().join("config.json")).unwrap();
        assert!(config.contains("\"dtype\": \"float32\"") && !config.contains("torch_dtype"), "{config}");
    }

    #[test]
    fn what_is_no_weight_is_copied_whatever_the_type() {
        let types: Vec<&str> =
            "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ U16 I16 U32 I32 U64 I64 F64 C64"
                .split(' ')
                .collect();
        let more: Vec<(&str, Stored, &[usize])> =
            types.iter().map(|name| (*name, Stored::Other(name), &[1, 3, 1][..])).collect();
        let (_folder, base) = base_with(&more);
        let place = tempfile::tempdir().unwrap();
        for (name, dtype) in [("own", None), ("f32", Some(DType::F32))] {
            let out = place.path().join(name);
            merge_in_shards(&base, &adapter(), &out, dtype, 100).unwrap();
            let merged = ModelFolder::open(&out).unwrap();
            assert!(merged.names().eq(base.names()));
            for name in &types {
                let (before, after) = (base.raw(name).unwrap(), merged.raw(name).unwrap());
                assert_eq!((before.stored, before.shape), (after.stored, after.shape), "{name}");
                assert_eq!(before.bytes, after.bytes, "{name}");
            }
        }
    }

    #[test]
    fn a_tensor_without_rows_stays_without() {
        let shapes = [("a", [0, 1 << 61]), ("b", [1 << 60, 0])];
        let (_folder, base) = base_with(&shapes.each_ref().map(|(name, shape)| (*name, DType::F32.into(), &shape[..])));
        let place = tempfile::tempdir().unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let out = place.path().join(dtype.to_string());
            merge(&base, &adapter(), &out, Some(dtype)).unwrap();
            let merged = ModelFolder::open(&out).unwrap();
            for (name, shape) in &shapes {
                assert_eq!(merged.raw(name).unwrap().shape, shape);
            }
        }
    }

    #[test]
    fn what_cannot_be_merged_leaves_nothing() {
        let (folder, base) = base();
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("merged");
        let said = |adapter: &AdapterFolder, dtype| {
            let error = merge(&base, adapter, &out, dtype).unwrap_err();
            assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "{error}");
            assert_eq!(error.exit_code(), 3);
            error.to_string()
        };
        let mut huge = adapter();
        huge.matrices[0].b[0] = 1e6;
        assert!(said(&huge, Some(DType::F16)).contains("up_proj.weight\": the value"));
        let mut other = adapter();
        other.matrices[0].module = "model.layers.1.mlp.up_proj".into();
        assert!(said(&other, None).contains("made for another base"));
        let mut head = adapter();
        head.matrices.push(matrix("lm_head", 4, 5));
        fs::write(folder.path().join("config.json"), CONFIG.replace('{', "{\"tie_word_embeddings\":true,")).unwrap();
        assert!(said(&head, None).contains("the head is the embedding"));
    }

    #[test]
    fn rows_are_added_whatever_the_block() {
        let matrix = matrix("m", 3, 7);
        let whole = {
            let mut rows = vec![0.0; 21];
            add(&matrix, 0.5, 0, &mut rows);
            rows
        };
        let mut tail = vec![0.0; 6];
        add(&matrix, 0.5, 5, &mut tail);
        assert_eq!(tail, whole[15..]);
        let mut turned = vec![0.0; 14];
        add_turned(&matrix, 0.5, 1, &mut turned);
        let transposed = (1..3).flat_map(|input| (0..7).map(move |output| output * 3 + input));
        assert!(turned.iter().copied().eq(transposed.map(|at| whole[at])));
    }
}
