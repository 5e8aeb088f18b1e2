//! One GGUF file with config, tokenizer and chat template in it, as llama.cpp's converter writes them.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use super::{To, Written, each_block, gguf_keys, gguf_tokenizer};
use crate::model::Config;
use crate::weights::gguf::GgmlType;
use crate::weights::gguf::encode::encode;
use crate::weights::gguf::matrix::row_of_halves;
use crate::weights::gguf::names::{Architecture, Change, layer_of};
use crate::weights::gguf::writer::{Entry, GgufWriter, Keys};
use crate::weights::{DType, ModelFolder, is_gguf};
use crate::{Error, Result};

pub fn write(
    model: &ModelFolder,
    config: &Config,
    to: To,
    out: &Path,
    told: &mut dyn FnMut(&Written) -> Result<()>,
) -> Result<()> {
    let refuse = |reason: &str| Error::input(format!("{}: {reason}", model.path().display()));
    if is_gguf(model.path()) {
        return Err(refuse(
            "GGUF is written from a folder of safetensors alone; name the model that this file was made from",
        ));
    }
    let architecture = Architecture::of_model_type(config.family.model_type)
        .ok_or_else(|| refuse("models of this family are not written as GGUF; choose --to nf4"))?;
    let mut keys = Keys::default();
    gguf_keys::describe(&mut keys, &architecture, config, to)
        .map_err(|reason| refuse(&format!("{reason} is not written as GGUF; choose --to nf4")))?;
    gguf_tokenizer::describe(&mut keys, model.path(), config)?;

    let mut planned: Vec<(Source, Entry)> = Vec::new();
    for (name, numbers) in gguf_keys::factors(config, model.path())? {
        let entry = (name.to_string(), GgmlType::F32, vec![numbers.len()]);
        planned.push((Source::Numbers(numbers), entry));
    }
    for folder_name in model.names() {
        if config.tie_word_embeddings && folder_name.strip_suffix(".weight") == Some(config.family.head) {
            continue;
        }
        // older checkpoints keep the rope's frequencies, which follow from the config
        if folder_name.ends_with(".rotary_emb.inv_freq") {
            continue;
        }
        // llama.cpp would read what the config knows nothing of: more layers, biases that it does not state
        let stated = |name: &str| {
            let inside = layer_of(name).is_none_or(|(layer, _)| (layer as usize) < config.num_hidden_layers);
            inside && (config.qkv_bias || !name.ends_with(".bias"))
        };
        let Some((gguf_name, change)) = architecture.gguf_name(folder_name).filter(|(name, _)| stated(name)) else {
            return Err(refuse(&format!("tensor {folder_name:?} is no part of what is written as GGUF")));
        };
        let shape = model.info(folder_name).map(|info| info.shape).unwrap_or_default();
        let inner = gguf_name.starts_with("blk.");
        let entry = (gguf_name, format(&shape, to, inner), shape);
        planned.push((Source::Tensor(folder_name.to_string(), change), entry));
    }
    let part = out.with_file_name(format!(
        ".{}.incomplete",
        out.file_name().map(|name| name.to_string_lossy()).unwrap_or_default()
    ));
    let written = write_tensors(model, config.head_dim, &keys, &planned, &part, told);
    let renamed = written.and_then(|()| std::fs::rename(&part, out).map_err(|e| Error::writing(out, e)));
    if renamed.is_err() {
        // best effort: the error that matters is the first one
        let _ = std::fs::remove_file(&part);
    }
    renamed
}

/// The format of a tensor: small ones stay whole, the embedding and the head keep eight bits.
fn format(shape: &[usize], to: To, inner: bool) -> GgmlType {
    match *shape {
        [_, columns] if columns.is_multiple_of(256) && to == To::Q4K && inner => GgmlType::Q4_K,
        [_, columns] if columns.is_multiple_of(32) && to == To::Q4K && inner => GgmlType::Q5_0,
        [_, columns] if columns.is_multiple_of(32) => GgmlType::Q8_0,
        _ => GgmlType::F32,
    }
}

/// Where a tensor's numbers come from.
enum Source {
    /// From a tensor of the folder, changed so.
    Tensor(String, Change),
    /// They are these, as f32.
    Numbers(Vec<f32>),
}

fn write_tensors(
    model: &ModelFolder,
    head_dim: usize,
    keys: &Keys,
    planned: &[(Source, Entry)],
    part: &Path,
    told: &mut dyn FnMut(&Written) -> Result<()>,
) -> Result<()> {
    let entries: Vec<Entry> = planned.iter().map(|(_, entry)| entry.clone()).collect();
    let writing = |e| Error::writing(part, e);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(part).map_err(writing)?);
    let mut writer = GgufWriter::begin(&mut file, keys, &entries).map_err(writing)?;
    for (source, (_, kind, _)) in planned {
        let (source, change) = match source {
            Source::Tensor(source, change) => (source, change),
            Source::Numbers(numbers) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                writer.write(&bytes).and_then(|()| writer.end_tensor()).map_err(writing)?;
                continue;
            }
        };
        let tensor = model.tensor(source)?;
        let order = |place: usize| match change {
            Change::HeadRows => row_of_halves(place, head_dim),
            Change::None | Change::OneAdded => place,
        };
        let added = if *change == Change::OneAdded { 1.0 } else { 0.0 };
        let row = |row: &[f32], bytes: &mut Vec<u8>, back: &mut [f32]| {
            match *change {
                Change::OneAdded => encode(*kind, &row.iter().map(|x| x + added).collect::<Vec<_>>(), bytes),
                Change::None | Change::HeadRows => encode(*kind, row, bytes),
            }
            match kind {
                GgmlType::F32 => DType::F32.decode(bytes, back),
                _ => kind.decode(bytes, 0, back),
            }
            back.iter_mut().for_each(|x| *x -= added);
        };
        let mut size = 0;
        let error = each_block(&tensor, order, row, |bytes| {
            size += bytes.len() as u64;
            writer.write(bytes).map_err(writing)
        })?;
        writer.end_tensor().map_err(writing)?;
        told(&Written { name: source.clone(), format: kind.to_string(), bytes: size, error })?;
    }
    file.into_inner().map_err(|e| writing(e.into_error()))?.sync_all().map_err(writing)
}
