//! The whole decoder: embedding, layers, last norm, head, opened from a model's folder.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    attention::Attention,
    block::Block,
    config::{Config, LayerTraits, LinearShape},
    family::{self, NormKind, Qkv, QueryNorm},
    head::Head,
    join::Join,
    linear::Linear,
    mlp::{Mlp, Up},
    norm::Norm,
    parts::Parts,
    rotary::{Frequencies, Rotary},
    tokens::Tokens,
};
use crate::{
    Error, Result,
    kernels::{attention::Heads, compute::Compute, rope::Turn},
    weights::{StoredMatrix, folder::ModelFolder, matrix::FrozenMatrix, upload::Uploader},
};

/// A frozen decoder.
#[derive(Debug)]
pub struct Decoder {
    embed: FrozenMatrix,
    /// Learned positions, `[positions, hidden]`.
    positions: Option<FrozenMatrix>,
    /// What embeddings are multiplied with.
    embedding_scale: f64,
    /// The layers, first to last.
    pub blocks: Vec<Block>,
    /// The last norm; where logits are divided by a number, its weight is.
    norm: Norm,
    /// What follows the last norm; its matrix is the embedding itself where they are tied.
    pub head: Head,
    /// Rotary frequencies.
    pub rotary: Rotary,
    /// Where it computes.
    pub device: Device,
}

impl Decoder {
    /// Opens the model in `folder`: nothing is copied on the CPU but norms and biases. Its matrices multiply in
    /// `compute`.
    ///
    /// # Errors
    /// [`Error::Input`] where a tensor is missing or has another shape than `config` says.
    pub fn open(folder: &ModelFolder, config: &Config, device: &Device, compute: Compute) -> Result<Self> {
        let uploader = (!device.is_cpu()).then(|| Uploader::new(device, compute));
        Self::opened(Opener { folder, config, device, compute, uploader })
    }

    /// The same with every matrix uploaded, whatever the device is: on the CPU it goes the way of an accelerator's.
    ///
    /// # Errors
    /// As [`Decoder::open`].
    pub fn open_uploaded(folder: &ModelFolder, config: &Config, device: &Device, compute: Compute) -> Result<Self> {
        let uploader = Some(Uploader::new(device, compute));
        Self::opened(Opener { folder, config, device, compute, uploader })
    }

    /// Holds a folder against a config: all that a decoder is made of is there, in the shapes that the config says.
    ///
    /// # Errors
    /// As [`Decoder::open`].
    pub fn check(folder: &ModelFolder, config: &Config) -> Result<()> {
        Self::open(folder, config, &Device::Cpu, Compute::F32).map(drop)
    }

    fn opened(open: Opener) -> Result<Self> {
        let Opener { config, device, .. } = open;
        let (family, hidden) = (config.family, config.hidden_size);
        let embed = open.matrix(family.embed, config.vocab_size, hidden)?;
        let head = match config.tie_word_embeddings {
            true => embed.clone(),
            false => open.matrix(family.head, config.vocab_size, hidden)?,
        };
        let mut norm = open.norm(family.norm, hidden)?;
        if config.logits_divisor != 1.0 {
            norm.weight = (norm.weight / config.logits_divisor)?;
        }
        let mut numbers = 0..;
        let frequencies = config.ropes.iter().map(|rope| {
            let (radians, scale) = rope.inverse_frequencies(0);
            Frequencies { radians, scale }
        });
        Ok(Self {
            embed,
            positions: match family.positions {
                Some(name) => Some(open.matrix(name, config.max_position_embeddings, hidden)?),
                None => None,
            },
            embedding_scale: config.embedding_scale,
            blocks: (0..config.num_hidden_layers)
                .map(|layer| open.block(layer, &mut numbers))
                .collect::<Result<_>>()?,
            norm,
            head: Head {
                weight: head,
                bias: family.head_bias.then(|| open.bias(family.head, config.vocab_size)).transpose()?,
                cap: config.logit_cap,
            },
            rotary: Rotary { sets: frequencies.collect() },
            device: device.clone(),
        })
    }

    /// The input of the first layer: `[tokens, hidden]`.
    pub fn embed(&self, tokens: &Tokens) -> candle_core::Result<Tensor> {
        let mut x = self.embed.rows(&tokens.ids)?;
        if self.embedding_scale != 1.0 {
            x = (x * self.embedding_scale)?;
        }
        match &self.positions {
            Some(learned) => {
                let positions: Vec<u32> = tokens.positions.iter().map(|position| *position as u32).collect();
                x + learned.rows(&positions)?
            }
            None => Ok(x),
        }
    }

    /// The last norm, between the last layer and the head.
    pub fn final_norm(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.norm.forward(x)
    }

    /// The gradient that reaches the last layer's output `x` from the gradient `dy` of its norm.
    pub fn final_norm_backward(&self, x: &Tensor, dy: &Tensor) -> candle_core::Result<Tensor> {
        self.norm.backward(x, dy, &dy.zeros_like()?)
    }

    /// How many tokens the model knows.
    pub fn vocabulary(&self) -> usize {
        self.embed.outputs
    }

    /// All linear layers but the head, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// The linear layers that can be adapted, as `(module, inputs, outputs)`, in the order of their numbers.
    pub fn linear_shapes(&self) -> Vec<(String, usize, usize)> {
        self.linears().map(|linear| (linear.name.clone(), linear.weight.inputs, linear.weight.outputs)).collect()
    }
}

/// Takes tensors out of a folder and checks their shapes.
struct Opener<'a> {
    folder: &'a ModelFolder,
    config: &'a Config,
    device: &'a Device,
    compute: Compute,
    /// How matrices go to the device; none: they are used where they lie.
    uploader: Option<Uploader>,
}

impl Opener<'_> {
    /// A layer, its linear layers numbered from where `numbers` stands.
    fn block(&self, layer: usize, numbers: &mut impl Iterator<Item = usize>) -> Result<Block> {
        let Config { family, hidden_size: hidden, head_dim: dim, residual_scale: scale, .. } = *self.config;
        let (n, kv) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let LayerTraits { window, rope, scale: score_scale } = self.config.layers[layer];
        let name = |name: &str| format!("{}.{layer}.{name}", family.layers);
        let norm = |part: Option<&str>| part.map(|part| self.norm(&name(part), hidden)).transpose();
        let query_norm = |part: &str, heads: usize| match family.query_norm {
            QueryNorm::None => Ok(None),
            QueryNorm::EachHead => self.norm(&name(part), dim).map(Some),
            QueryNorm::AllHeads => self.norm(&name(part), heads * dim).map(Some),
        };
        // in the order in which the config lists them
        let mut linears = self.config.linears(layer).into_iter().zip(numbers);
        let mut linear = || match linears.next() {
            Some((shape, id)) => self.linear(shape, id),
            None => Err(Error::run(format!("{}: a layer's matrices are fewer than its parts", family.model_type))),
        };

        let qkv = match family.qkv {
            Qkv::Apart(_) => Parts::Apart([linear()?, linear()?, linear()?]),
            Qkv::Joined(_) => Parts::Joined { linear: linear()?, widths: [n * dim, kv * dim, kv * dim] },
            Qkv::ByHead(_) => Parts::ByHead { linear: linear()?, heads: n },
        };
        let attention = Attention {
            norm: norm(family.norms.attention)?,
            qkv,
            query_norms: query_norm("self_attn.q_norm", n)?
                .zip(query_norm("self_attn.k_norm", kv)?)
                .map(|(queries, keys)| [queries, keys]),
            rope: rope.zip(family.rope).map(|(set, traits)| (set, Turn { dim, pairing: traits.pairing })),
            heads: Heads { n, kv, dim, scale: score_scale, window, cap: self.config.score_cap, compute: self.compute },
            output: linear()?,
            join: Join { norm: norm(family.norms.after_attention)?, scale },
        };
        let wide = self.config.intermediate_size;
        let up = match family.up {
            family::Up::Gated(_) => Up::Gated(Parts::Apart([linear()?, linear()?])),
            family::Up::GatedJoined(_) => Up::Gated(Parts::Joined { linear: linear()?, widths: [wide; 2] }),
            family::Up::Plain(_) => Up::Plain(Parts::Apart([linear()?])),
        };
        let mlp = Mlp {
            norm: norm(family.norms.mlp)?,
            up,
            activation: self.config.activation,
            down: linear()?,
            join: Join { norm: norm(family.norms.after_mlp)?, scale },
        };
        Ok(Block { attention, mlp, side_by_side: self.config.side_by_side })
    }

    fn linear(&self, shape: LinearShape, id: usize) -> Result<Linear> {
        let LinearShape { module, inputs, outputs, bias } = shape;
        let weight = match self.config.lies_transposed(self.folder, &module) {
            false => self.matrix(&module, outputs, inputs)?,
            true => {
                let stored = self.tensor(&format!("{module}.weight"), &[inputs, outputs])?;
                self.frozen(stored.transposed(), outputs, inputs)
            }
        };
        let bias = bias.then(|| self.bias(&module, outputs)).transpose()?;
        Ok(Linear { name: module, id, weight, bias })
    }

    fn norm(&self, module: &str, width: usize) -> Result<Norm> {
        let (kind, eps) = (self.config.family.norm_kind, self.config.norm_eps);
        let mut weight = self.vector(&format!("{module}.weight"), width)?;
        if kind == NormKind::RmsPlusOne {
            weight = (weight + 1.0)?;
        }
        let bias = (kind == NormKind::Layer).then(|| self.bias(module, width)).transpose()?;
        Ok(Norm { weight, bias, eps })
    }

    fn matrix(&self, module: &str, rows: usize, columns: usize) -> Result<FrozenMatrix> {
        let stored = self.tensor(&format!("{module}.weight"), &[rows, columns])?;
        Ok(self.frozen(stored, rows, columns))
    }

    fn frozen(&self, stored: impl StoredMatrix + 'static, rows: usize, columns: usize) -> FrozenMatrix {
        match &self.uploader {
            Some(uploader) => FrozenMatrix::uploaded(Arc::new(stored), rows, columns, uploader.clone()),
            None => FrozenMatrix::new(Arc::new(stored), rows, columns, self.device, self.compute),
        }
    }

    fn bias(&self, module: &str, len: usize) -> Result<Tensor> {
        self.vector(&format!("{module}.bias"), len)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.tensor(name, &[len])?.to_f32(), len, self.device)?)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<crate::weights::StoredTensor> {
        let name = self.config.family.stored_name(name, |name| self.folder.has(name));
        let tensor = self.folder.tensor(&name)?;
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
