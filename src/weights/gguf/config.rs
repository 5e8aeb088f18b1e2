//! A GGUF file's metadata as the `config.json` of the folder that it was converted from.
//!
//! What all architectures share is here, what single ones have is in `family`, positions are in `rope`.
//! A key that changes what is computed and is not read is refused, so that no model is read as another one.

use serde_json::{Map, Value, json};

use super::file::GgufFile;
use super::metadata::Metadata;
use super::names::{Architecture, Change, layer_of};
use super::{family, rope};
use crate::{Error, Result};

/// Keys of attention and positions that are read of every architecture.
const READ: [&str; 17] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
];
/// Keys beside those of attention and positions that change what is computed.
const SCALES: [&str; 6] = [
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "expert_count",
];

/// The architecture of a file.
///
/// # Errors
/// [`Error::Input`] where the file is no model, or of an architecture that is not read.
pub fn architecture(file: &GgufFile) -> Result<Architecture> {
    let metadata = file.metadata();
    let shown = metadata.path().display();
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(Error::input(format!("{shown}: it holds a {kind:?}, not a model; name the model's file")));
    }
    if metadata.size("split.count")?.is_some_and(|count| count > 1) {
        return Err(Error::input(format!(
            "{shown}: it is one part of several; join them with llama.cpp's `llama-gguf-split --merge FIRST OUT`"
        )));
    }
    let name = metadata.text("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture"))?;
    Architecture::find(name).ok_or_else(|| {
        let reason = format!("{name:?} is not read from GGUF; {} are. Use the model's folder", Architecture::known());
        metadata.bad("general.architecture", &reason)
    })
}

/// The folder's name of a file's tensor, and what was done to it; `None` where it is no weight but read with the
/// config.
///
/// # Errors
/// [`Error::Input`] where it is no part of such a model.
pub(in crate::weights) fn folder_name(
    metadata: &Metadata,
    row: &Architecture,
    name: &str,
) -> Result<Option<(String, Change)>> {
    match row.folder_name(name) {
        None if row.factors.contains(&name) => Ok(None),
        None => Err(Error::input(format!(
            "{}: tensor {name:?} is no part of a model of the architecture {} as it is read; use the model's folder",
            metadata.path().display(),
            row.name
        ))),
        known => Ok(known),
    }
}

/// Coordinates of a head.
///
/// # Errors
/// [`Error::Input`] naming the key that is missing or impossible.
pub(in crate::weights) fn head_dim(file: &GgufFile) -> Result<usize> {
    let reader = Reader { file, metadata: file.metadata(), row: architecture(file)? };
    reader.head_dim().map(|dim| dim as usize)
}

/// A file whose keys are read under its architecture's name.
pub(super) struct Reader<'a> {
    pub file: &'a GgufFile,
    pub metadata: &'a Metadata,
    pub row: Architecture,
}

/// The sizes that other keys are held against.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub hidden: u64,
    pub heads: u64,
    pub head_dim: u64,
    pub layers: u64,
    pub context: u64,
}

impl Reader<'_> {
    pub fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.row.name)
    }

    /// A complaint about a key.
    pub fn bad(&self, part: &str, reason: &str) -> Error {
        self.metadata.bad(&self.key(part), reason)
    }

    /// A whole number.
    pub fn size(&self, part: &str) -> Result<Option<u64>> {
        self.metadata.size(&self.key(part))
    }

    /// A whole number above 0 that has to be there.
    pub fn needed(&self, part: &str) -> Result<u64> {
        match self.size(part)?.ok_or_else(|| self.metadata.missing(&self.key(part)))? {
            0 => Err(self.bad(part, "it is 0; the file is broken, fetch another one")),
            size => Ok(size),
        }
    }

    /// A number above 0.
    pub fn positive(&self, part: &str) -> Result<Option<f64>> {
        let number = self.metadata.number(&self.key(part))?;
        let fits = |number: &f64| *number > 0.0 && (*number as f32).is_finite() && *number as f32 > 0.0;
        match number.filter(|number| !fits(number)) {
            Some(other) => {
                Err(self.bad(part, &format!("{other} is not above 0; the file is broken, fetch another one")))
            }
            None => Ok(number),
        }
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.file.tensors().contains_key(tensor)
    }

    fn head_dim(&self) -> Result<u64> {
        let (hidden, heads) = (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        match self.size("attention.key_length")? {
            Some(_) => self.needed("attention.key_length"),
            None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => Err(self.bad("attention.head_count", "it does not divide embedding_length; fetch another file")),
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let (hidden, heads) = (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        let head_dim = self.head_dim()?;
        for part in ["attention.value_length", "attention.key_length_swa", "attention.value_length_swa"] {
            if let Some(other) = self.size(part)?.filter(|other| *other != head_dim) {
                let reason = format!("{other}, where keys have {head_dim}, is not read; use the model's folder");
                return Err(self.bad(part, &reason));
            }
        }
        let (layers, tensors) = (self.needed("block_count")?, self.file.tensors().len());
        if layers > tensors as u64 {
            let reason = format!("{layers} layers in {tensors} tensors; the file is broken, fetch another one");
            return Err(self.bad("block_count", &reason));
        }
        Ok(Sizes { hidden, heads, head_dim, layers, context: self.needed("context_length")? })
    }

    /// Refuses what would change the computation and is not read, unless it says that nothing is changed.
    fn refuse_unread(&self, context: u64) -> Result<()> {
        let prefix = self.key("");
        for part in self.metadata.keys().filter_map(|key| key.strip_prefix(&prefix)) {
            let counts = part.starts_with("attention.") || part.starts_with("rope.") || SCALES.contains(&part);
            let yarn = part.starts_with("rope.scaling.yarn_");
            if !counts || yarn || READ.contains(&part) || self.row.keys.contains(&part) {
                continue;
            }
            let number = self.metadata.number(&self.key(part)).unwrap_or(None);
            let without = match part {
                "attention.layer_norm_epsilon" => true,
                "attention.sliding_window" => number.is_some_and(|window| window == 0.0 || window >= context as f64),
                _ => number == Some(0.0),
            };
            if !without {
                let reason = format!("it is not read of a model of the architecture {}", self.row.name);
                return Err(self.bad(part, &format!("{reason}; use the model's folder")));
            }
        }
        if self.metadata.flag(&self.key("attention.causal"))? == Some(false) {
            return Err(self.bad("attention.causal", "models that look ahead are not read; use another model"));
        }
        Ok(())
    }

    /// Every tensor is a part of the model, and in one of its layers.
    fn check_tensors(&self, layers: u64) -> Result<()> {
        let refuse = |name: &str, reason: &str| {
            Err(Error::input(format!("{}: tensor {name:?} {reason}", self.metadata.path().display())))
        };
        for name in self.file.tensors().keys() {
            folder_name(self.metadata, &self.row, name)?;
            // the first layer's bias tells of all
            let first = if name.contains(".attn_") { "blk.0.attn_q.bias" } else { "blk.0.ffn_up.bias" };
            if name.ends_with(".bias") && !self.has(first) {
                return refuse(name, &format!("stands without {first:?}, which is not read; use the model's folder"));
            }
            if layer_of(name).is_some_and(|(layer, _)| u64::from(layer) >= layers) {
                return refuse(
                    name,
                    &format!("is of no layer: {} says {layers}; use the model's folder", self.key("block_count")),
                );
            }
        }
        Ok(())
    }
}

/// What the folder's `config.json` says.
///
/// # Errors
/// [`Error::Input`] naming the key that is missing or means something that is not read.
pub fn config(file: &GgufFile) -> Result<Map<String, Value>> {
    let reader = Reader { file, metadata: file.metadata(), row: architecture(file)? };
    if reader.size("expert_count")?.is_some_and(|count| count > 0) {
        return Err(reader.bad("expert_count", "mixtures of experts are not read; use another model"));
    }
    let sizes = reader.sizes()?;
    reader.refuse_unread(sizes.context)?;
    reader.check_tensors(sizes.layers)?;
    let kv_heads = match reader.size("attention.head_count_kv")? {
        Some(_) => reader.needed("attention.head_count_kv")?,
        None => sizes.heads,
    };
    if !sizes.heads.is_multiple_of(kv_heads) {
        let reason = format!("{kv_heads} does not divide head_count, {}; fetch another file", sizes.heads);
        return Err(reader.bad("attention.head_count_kv", &reason));
    }
    let eps = "attention.layer_norm_rms_epsilon";
    let rms = reader.positive(eps)?.ok_or_else(|| reader.metadata.missing(&reader.key(eps)))?;
    let embedding = file.tensors().get("token_embd.weight").ok_or_else(|| {
        let shown = reader.metadata.path().display();
        Error::input(format!("{shown}: there is no tensor \"token_embd.weight\"; fetch another file of this model"))
    })?;

    let mut config = Map::new();
    let mut set = |name: &str, value: Value| {
        config.insert(name.to_string(), value);
    };
    set("architectures", json!([reader.row.class]));
    set("model_type", json!(reader.row.model_type));
    set("hidden_size", json!(sizes.hidden));
    set("intermediate_size", json!(reader.needed("feed_forward_length")?));
    set("num_hidden_layers", json!(sizes.layers));
    set("num_attention_heads", json!(sizes.heads));
    set("num_key_value_heads", json!(kv_heads));
    set("head_dim", json!(sizes.head_dim));
    set("vocab_size", json!(embedding.shape[0]));
    set("max_position_embeddings", json!(sizes.context));
    set("rms_norm_eps", json!(rms));
    set("tie_word_embeddings", json!(!reader.has("output.weight")));
    for (name, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        set(name, json!(reader.metadata.size(&format!("tokenizer.ggml.{id}_token_id"))?));
    }
    config.extend(family::config(&reader, sizes)?);
    config.extend(rope::config(&reader, sizes)?);
    Ok(config)
}
