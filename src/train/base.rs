//! The frozen model with all that belongs to it.

use std::path::PathBuf;

use candle_core::Device;

use crate::{
    Error, Result,
    data::tokenizer::Tokenizer,
    hub,
    kernels::compute::Compute,
    model::{Config, decoder::Decoder},
    weights::ModelFolder,
};

/// A base, opened.
pub struct Base {
    /// What the recipe calls it: a hub id, a folder or a file.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Its files.
    pub folder: ModelFolder,
    /// Its shapes.
    pub config: Config,
    /// It itself.
    pub model: Decoder,
    /// In which type its matrices multiply.
    pub compute: Compute,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl Base {
    /// Opens a hub id, downloading it where the cache has not got it, or a folder, or a GGUF file. Its matrices
    /// multiply in `compute`.
    ///
    /// # Errors
    /// [`Error::Input`] naming what is missing or wrong.
    pub fn open(name: &str, revision: &str, device: &Device, compute: Compute) -> Result<Self> {
        let path = hub::model(name, revision)?;
        let config = Config::read(&path)?;
        let folder = ModelFolder::open(&path)?;
        let tokenizer = Tokenizer::open(&path)?.embedded(config.vocab_size)?;
        let model = Decoder::open(&folder, &config, device, compute)?;
        Ok(Self { name: name.to_string(), path, folder, config, model, compute, tokenizer })
    }

    /// Refuses to write past the positions that the model knows and we compute exactly; with it, what a sample can take
    /// of memory is bounded.
    ///
    /// # Errors
    /// [`Error::Recipe`] with the number of new tokens that is possible.
    pub fn check_room(&self, prompt_tokens: usize, max_new_tokens: usize) -> Result<()> {
        let positions = self.positions();
        match prompt_tokens.saturating_add(max_new_tokens) <= positions {
            true => Ok(()),
            false => Err(Error::recipe(format!(
                "max_new_tokens is {max_new_tokens}, but after a prompt of {prompt_tokens} tokens this model has {} of its \
                 {positions} positions left; set it to that or less",
                positions.saturating_sub(prompt_tokens)
            ))),
        }
    }

    /// The positions that the model knows and we compute exactly.
    pub fn positions(&self) -> usize {
        let most = self.config.max_position_embeddings;
        self.config.longest_exact().map_or(most, |(longest, _)| longest.min(most))
    }

    /// The linear layers that can be adapted, as `(module, inputs, outputs)`.
    pub fn linears(&self) -> Vec<(String, usize, usize)> {
        self.model.linear_shapes()
    }
}
