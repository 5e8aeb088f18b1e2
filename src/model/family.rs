//! The table of families: what a decoder of each is called by and made of.

use super::config::Config;
use crate::{Error, Result};

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The embedding's tensor, `[vocabulary, hidden]`.
    pub embed: &'static str,
    /// What a layer's number follows in its tensors' names.
    pub layers: &'static str,
    /// The last norm's tensor.
    pub norm: &'static str,
    /// The head's tensor where it is not tied to the embedding.
    pub head: &'static str,
}

const LLAMA: Family = Family {
    model_type: "llama",
    embed: "model.embed_tokens.weight",
    layers: "model.layers",
    norm: "model.norm.weight",
    head: "lm_head.weight",
};

/// Llama 2 and 3, SmolLM2, TinyLlama; Mistral, which adds a sliding window to `config.json`.
const FAMILIES: [Family; 2] = [LLAMA, Family { model_type: "mistral", ..LLAMA }];

impl Family {
    /// The row for a model.
    ///
    /// # Errors
    /// [`Error::Input`] for a family that is not in the table.
    pub fn of(config: &Config) -> Result<Self> {
        FAMILIES.into_iter().find(|family| family.model_type == config.model_type).ok_or_else(|| {
            let known = FAMILIES.map(|family| family.model_type).join(", ");
            Error::input(format!("config.json: the family {:?} is not known; known are {known}", config.model_type))
        })
    }
}
