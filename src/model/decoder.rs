//! The whole decoder: embedding, layers, last norm, head, opened from a model's folder.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{block::Block, config::Config, family::Family, linear::Linear, rotary::Rotary};
use crate::{
    Error, Result,
    kernels::attention::Heads,
    weights::{folder::ModelFolder, matrix::FrozenMatrix},
};

/// Linear layers in a block.
const LINEARS: usize = 7;

/// A frozen decoder.
#[derive(Debug)]
pub struct Decoder {
    embed: FrozenMatrix,
    /// The layers, first to last.
    pub blocks: Vec<Block>,
    /// The last norm's weight, `[hidden]`.
    pub norm: Tensor,
    /// `[vocabulary, hidden]`; the embedding itself where they are tied.
    pub head: FrozenMatrix,
    /// Rotary frequencies.
    pub rotary: Rotary,
    /// The norms' epsilon.
    pub eps: f64,
    /// Where it computes.
    pub device: Device,
}

impl Decoder {
    /// Opens the model in `folder`: nothing is copied on the CPU but norms and biases.
    ///
    /// # Errors
    /// [`Error::Input`] where a tensor is missing or has another shape than `config` says.
    pub fn open(folder: &ModelFolder, config: &Config, device: &Device) -> Result<Self> {
        let family = config.family;
        let open = Opener { folder, device };
        let embed = open.matrix(family.embed, config.vocab_size, config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => embed.clone(),
            false => open.matrix(family.head, config.vocab_size, config.hidden_size)?,
        };
        let blocks = (0..config.num_hidden_layers).map(|layer| open.block(layer, family, config));
        let (frequencies, scale) = config.rope.inverse_frequencies(config.head_dim, 0);
        Ok(Self {
            embed,
            blocks: blocks.collect::<Result<_>>()?,
            norm: open.vector(family.norm, config.hidden_size)?,
            head,
            rotary: Rotary { frequencies, scale },
            eps: config.rms_norm_eps,
            device: device.clone(),
        })
    }

    /// The embeddings of tokens: `[tokens, hidden]`.
    pub fn embed(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        self.embed.rows(ids)
    }

    /// How many tokens the model knows.
    pub fn vocabulary(&self) -> usize {
        self.embed.outputs
    }

    /// All linear layers but the head, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| {
            [
                &block.q_proj,
                &block.k_proj,
                &block.v_proj,
                &block.o_proj,
                &block.gate_proj,
                &block.up_proj,
                &block.down_proj,
            ]
        })
    }

    /// The linear layers that can be adapted, as `(module, inputs, outputs)`, in the order of their numbers.
    pub fn linear_shapes(&self) -> Vec<(String, usize, usize)> {
        self.linears().map(|linear| (linear.name.clone(), linear.weight.inputs, linear.weight.outputs)).collect()
    }
}

/// Takes tensors out of a folder and checks their shapes.
struct Opener<'a> {
    folder: &'a ModelFolder,
    device: &'a Device,
}

impl Opener<'_> {
    fn block(&self, layer: usize, family: Family, config: &Config) -> Result<Block> {
        let Config { hidden_size: hidden, intermediate_size: mlp, num_attention_heads: n, .. } = *config;
        let (kv, dim) = (config.num_key_value_heads, config.head_dim);
        let part = |name: &str| format!("{}.{layer}.{name}", family.layers);
        let linear = |slot: usize, name: &str, outputs: usize, inputs: usize, bias: bool| -> Result<Linear> {
            let name = part(name);
            Ok(Linear {
                id: layer * LINEARS + slot,
                weight: self.matrix(&format!("{name}.weight"), outputs, inputs)?,
                bias: bias.then(|| self.vector(&format!("{name}.bias"), outputs)).transpose()?,
                name,
            })
        };
        let (attention_bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        Ok(Block {
            input_layernorm: self.vector(&part("input_layernorm.weight"), hidden)?,
            q_proj: linear(0, "self_attn.q_proj", n * dim, hidden, attention_bias)?,
            k_proj: linear(1, "self_attn.k_proj", kv * dim, hidden, attention_bias)?,
            v_proj: linear(2, "self_attn.v_proj", kv * dim, hidden, attention_bias)?,
            o_proj: linear(3, "self_attn.o_proj", hidden, n * dim, attention_bias)?,
            post_attention_layernorm: self.vector(&part("post_attention_layernorm.weight"), hidden)?,
            gate_proj: linear(4, "mlp.gate_proj", mlp, hidden, mlp_bias)?,
            up_proj: linear(5, "mlp.up_proj", mlp, hidden, mlp_bias)?,
            down_proj: linear(6, "mlp.down_proj", hidden, mlp, mlp_bias)?,
            heads: Heads { n, kv, dim, scale: 1.0 / (dim as f64).sqrt(), window: config.sliding_window },
            eps: config.rms_norm_eps,
        })
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenMatrix> {
        FrozenMatrix::new(Arc::new(self.tensor(name, &[rows, columns])?), rows, columns, self.device)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.tensor(name, &[len])?.to_f32(), len, self.device)?)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<crate::weights::StoredTensor> {
        let tensor = self.folder.tensor(name)?;
        if tensor.shape == shape {
            return Ok(tensor);
        }
        Err(Error::input(format!(
            "{}: tensor {name:?} has the shape {:?}, the config says {shape:?}; the two files do not belong together",
            self.folder.path().display(),
            tensor.shape
        )))
    }
}
