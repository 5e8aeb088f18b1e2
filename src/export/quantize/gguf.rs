//! One GGUF file with config, tokenizer and chat template in it, as llama.cpp's converter writes them.

use std::io::BufWriter;
use std::path::Path;

use super::{To, Written, each_block, gguf_keys, gguf_tokenizer};
use crate::export::merge::{refuse_taken, require_room};
use crate::model::Config;
use crate::store::NewFile;
use crate::weights::gguf::GgmlType;
use crate::weights::gguf::encode::encode;
use crate::weights::gguf::matrix::row_of_halves;
use crate::weights::gguf::names::{Architecture, Change, layer_of};
use crate::weights::gguf::writer::{Entry, GgufWriter, Keys, data_bytes};
use crate::weights::{DType, ModelFolder, is_gguf};
use crate::{Error, Result};

pub fn write(
    model: &ModelFolder,
    config: &Config,
    to: To,
    out: &Path,
    told: &mut dyn FnMut(&Written) -> Result<()>,
    poll: &dyn Fn() -> Result<()>,
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
    let (sources, entries): (Vec<Source>, Vec<Entry>) = planned.into_iter().unzip();
    let writing = |e| Error::writing(out, e);
    let mut file = BufWriter::with_capacity(1 << 20, NewFile::create_atomic(out)?);
    // what a dead one left has gone, and another one may have ended meanwhile
    refuse_taken(out)?;
    require_room(out, data_bytes(&entries) as u64)?;
    let mut writer = GgufWriter::begin(&mut file, &keys, &entries).map_err(writing)?;
    for (source, (_, kind, _)) in sources.iter().zip(&entries) {
        match source {
            Source::Tensor(name, change) => {
                let order = |place: usize| match change {
                    Change::HeadRows => row_of_halves(place, config.head_dim),
                    Change::None | Change::OneAdded => place,
                };
                let mut bytes = 0;
                let error = each_block(&model.tensor(name)?, poll, order, row(*kind, *change), |row| {
                    bytes += row.len() as u64;
                    writer.write(row).map_err(writing)
                })?;
                told(&Written { name: name.clone(), format: kind.to_string(), bytes, error })?;
            }
            Source::Numbers(numbers) => {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                writer.write(&bytes).map_err(writing)?;
            }
        }
        writer.end_tensor().map_err(writing)?;
    }
    file.into_inner().map_err(|e| writing(e.into_error()))?.finish()
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

/// The bytes of a row in the file, and the numbers that are read back from them.
fn row(kind: GgmlType, change: Change) -> impl Fn(&[f32], &mut Vec<u8>, &mut [f32]) {
    let added = if change == Change::OneAdded { 1.0 } else { 0.0 };
    move |row, bytes, back| {
        match change {
            Change::OneAdded => encode(kind, &row.iter().map(|x| x + added).collect::<Vec<_>>(), bytes),
            Change::None | Change::HeadRows => encode(kind, row, bytes),
        }
        match kind {
            GgmlType::F32 => DType::F32.decode(bytes, back),
            _ => kind.decode(bytes, 0, back),
        }
        back.iter_mut().for_each(|x| *x -= added);
    }
}
