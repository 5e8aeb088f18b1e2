//! The decoder once more, in f64 and in candle's differentiable operations, a sequence at a time: what autograd and
//! central differences are taken of. Nothing here is shared with the library but configs, the families' rows and
//! frequencies.

use std::{collections::BTreeMap, path::Path};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{log_softmax, silu, softmax};
use dpo_lora::{
    kernels::{activation::Activation, dropout::Dropout, rope::Pairing},
    model::{
        Config,
        family::{NormKind, Qkv, QueryNorm, Up},
        lora::Adapter,
    },
    weights::ModelFolder,
};

/// A decoder's weights in f64.
pub struct Form {
    weights: BTreeMap<String, Tensor>,
    /// Its shapes.
    pub config: Config,
}

/// What learns: A and B by module, the scale, and what is dropped on the way to A.
#[derive(Clone, Default)]
pub struct Learning {
    /// A `[r, inputs]` and B `[outputs, r]`.
    pub matrices: BTreeMap<String, [Tensor; 2]>,
    /// Of `B · A · x`.
    pub scale: f64,
    /// Drawn by the library's function, which has a test of its own.
    pub dropout: Option<Dropout>,
}

impl Learning {
    /// The matrices of an adapter that has one scale.
    pub fn of(adapter: &Adapter) -> Self {
        let scale = adapter.shapes[0].scale;
        assert!(adapter.shapes.iter().all(|shape| shape.scale == scale));
        let wide = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
        let matrices = adapter.shapes.iter().map(|shape| {
            let lora = adapter.layer(shape.linear).unwrap();
            (shape.module.clone(), [wide(&lora.a), wide(&lora.b)])
        });
        Self { matrices: matrices.collect(), scale, dropout: None }
    }
}

impl Form {
    pub fn open(folder: &Path) -> Self {
        let (config, files) = (Config::read(folder).unwrap(), ModelFolder::open(folder).unwrap());
        let wide = |name: &str| {
            let tensor = files.tensor(name).unwrap();
            let numbers: Vec<f64> = tensor.to_f32().into_iter().map(f64::from).collect();
            (name.to_string(), Tensor::from_vec(numbers, tensor.shape, &Device::Cpu).unwrap())
        };
        Self { weights: files.names().map(wide).collect(), config }
    }

    fn norm(&self, x: &Tensor, module: &str) -> Result<Tensor> {
        let weight = &self.weights[&format!("{module}.weight")];
        let by_deviation = |x: &Tensor| {
            let deviation = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.norm_eps)?.sqrt()?;
            x.broadcast_div(&deviation)
        };
        match self.config.family.norm_kind {
            NormKind::Rms => by_deviation(x)?.broadcast_mul(weight),
            NormKind::RmsPlusOne => by_deviation(x)?.broadcast_mul(&(weight + 1.0)?),
            NormKind::Layer => {
                let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
                let bias = &self.weights[&format!("{module}.bias")];
                by_deviation(&centered)?.broadcast_mul(weight)?.broadcast_add(bias)
            }
        }
    }

    /// A norm that a family may be without.
    fn perhaps(&self, x: Tensor, layer: usize, part: Option<&str>) -> Result<Tensor> {
        match part {
            Some(part) => self.norm(&x, &self.module(layer, part)),
            None => Ok(x),
        }
    }

    fn module(&self, layer: usize, part: &str) -> String {
        format!("{}.{layer}.{part}", self.config.family.layers)
    }

    fn linear(&self, x: &Tensor, layer: usize, part: &str, learning: &Learning) -> Result<Tensor> {
        let module = self.module(layer, part);
        let weight = &self.weights[&format!("{module}.weight")];
        let mut y = if self.config.family.transposed { x.matmul(weight)? } else { x.matmul(&weight.t()?)? };
        if let Some(bias) = self.weights.get(&format!("{module}.bias")) {
            y = y.broadcast_add(bias)?;
        }
        let Some([a, b]) = learning.matrices.get(&module) else { return Ok(y) };
        let dropped = match learning.dropout {
            None => x.clone(),
            Some(dropout) => {
                let ones = Tensor::ones(x.shape(), DType::F32, &Device::Cpu)?;
                let here = self.config.linears(layer);
                let slot = here.iter().position(|linear| linear.module == module).expect("a linear layer");
                (x * dropout.apply(&ones, layer * here.len() + slot)?.to_dtype(DType::F64)?)?
            }
        };
        y + (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * learning.scale)?
    }

    /// Queries, keys and values by head, `[heads, rows, dim]`.
    fn heads(&self, x: &Tensor, layer: usize, learning: &Learning) -> Result<[Tensor; 3]> {
        let (rows, dim) = (x.dim(0)?, self.config.head_dim);
        let (n, kv) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let norm = |x: Tensor, part: &str| self.norm(&x, &self.module(layer, part));
        let by_head = |x: Tensor, n: usize| x.reshape((rows, n, dim))?.transpose(0, 1)?.contiguous();
        let [q, k, v] = match self.config.family.qkv {
            Qkv::Apart(parts) => {
                let [q, k, v] = parts.map(|part| self.linear(x, layer, part, learning));
                [q?, k?, v?]
            }
            Qkv::Joined(part) => {
                let all = self.linear(x, layer, part, learning)?;
                [
                    all.narrow(1, 0, n * dim)?,
                    all.narrow(1, n * dim, kv * dim)?,
                    all.narrow(1, (n + kv) * dim, kv * dim)?,
                ]
            }
            Qkv::ByHead(part) => {
                let all = self.linear(x, layer, part, learning)?.reshape((rows, n, 3 * dim))?;
                let part = |i: usize| all.narrow(2, i * dim, dim)?.contiguous()?.reshape((rows, n * dim));
                [part(0)?, part(1)?, part(2)?]
            }
        };
        let (q, k) = match self.config.family.query_norm {
            QueryNorm::None => (by_head(q, n)?, by_head(k, kv)?),
            QueryNorm::EachHead => {
                (norm(by_head(q, n)?, "self_attn.q_norm")?, norm(by_head(k, kv)?, "self_attn.k_norm")?)
            }
            QueryNorm::AllHeads => {
                (by_head(norm(q, "self_attn.q_norm")?, n)?, by_head(norm(k, "self_attn.k_norm")?, kv)?)
            }
        };
        Ok([q, k, by_head(v, kv)?])
    }

    /// Heads `[heads, rows, dim]`, turned.
    fn turned(&self, x: Tensor, layer: usize, positions: &[usize]) -> Result<Tensor> {
        let (Some(number), Some(traits)) = (self.config.layers[layer].rope, self.config.family.rope) else {
            return Ok(x);
        };
        let rope = &self.config.ropes[number];
        let (frequencies, scale) = rope.inverse_frequencies(0);
        let angles = positions.iter().flat_map(|p| frequencies.iter().map(move |f| f64::from(*p as f32 * f)));
        let half = rope.dim / 2;
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (positions.len(), half), &Device::Cpu)?;
        let (cos, sin) = ((angles.cos()? * f64::from(scale))?, (angles.sin()? * f64::from(scale))?);
        let (n, rows, dim) = x.dims3()?;
        let turning = x.narrow(2, 0, rope.dim)?;
        let (first, second) = match traits.pairing {
            Pairing::Halves => (turning.narrow(2, 0, half)?, turning.narrow(2, half, half)?),
            Pairing::Neighbours => {
                let pairs = turning.contiguous()?.reshape((n, rows, half, 2))?;
                (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?)
            }
        };
        let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        let turned = match traits.pairing {
            Pairing::Halves => Tensor::cat(&[turned_first, turned_second], 2)?,
            Pairing::Neighbours => Tensor::stack(&[turned_first, turned_second], 3)?.reshape((n, rows, rope.dim))?,
        };
        match rope.dim == dim {
            true => Ok(turned),
            false => Tensor::cat(&[turned, x.narrow(2, rope.dim, dim - rope.dim)?], 2),
        }
    }

    fn activated(&self, x: &Tensor) -> Result<Tensor> {
        match self.config.activation {
            Activation::Silu => silu(x),
            Activation::Gelu => (x * 0.5)? * ((x / 2f64.sqrt())?.erf()? + 1.0)?,
            Activation::GeluTanh => {
                let cube = ((x * x)? * x)?;
                let inner = ((x + (cube * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                (x * 0.5)? * (inner.tanh()? + 1.0)?
            }
        }
    }

    /// One layer over `x[tokens, hidden]`, the tokens standing at `positions`; `hides` is true where one does not see
    /// another, by their rows.
    pub fn block(
        &self,
        layer: usize,
        x: &Tensor,
        positions: &[usize],
        hides: impl Fn(usize, usize) -> bool,
        learning: &Learning,
    ) -> Result<Tensor> {
        let (rows, config, family) = (positions.len(), &self.config, &self.config.family);
        let (n, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let serving = Tensor::from_iter((0..n).map(|head| (head * kv / n) as u32), &Device::Cpu)?;
        let mask: Vec<f64> = (0..rows * rows).map(|at| if hides(at / rows, at % rows) { -1e30 } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?;

        let normed = self.perhaps(x.clone(), layer, family.norms.attention)?;
        let [q, k, v] = self.heads(&normed, layer, learning)?;
        let q = self.turned(q, layer, positions)?;
        let k = self.turned(k, layer, positions)?.contiguous()?.index_select(&serving, 0)?;
        let v = v.contiguous()?.index_select(&serving, 0)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? * config.layers[layer].scale)?;
        let scores = capped(scores, config.score_cap)?.broadcast_add(&mask)?;
        let values = softmax(&scores, D::Minus1)?.matmul(&v)?;
        let values = values.transpose(0, 1)?.contiguous()?.reshape((rows, n * config.head_dim))?;
        let mixed = self.linear(&values, layer, family.output, learning)?;
        let mixed = (self.perhaps(mixed, layer, family.norms.after_attention)? * config.residual_scale)?;

        let middle = (x + mixed)?;
        let normed = if config.side_by_side { x.clone() } else { middle.clone() };
        let normed = self.perhaps(normed, layer, family.norms.mlp)?;
        let act = match family.up {
            Up::Gated([gate, up]) => {
                let gate = self.linear(&normed, layer, gate, learning)?;
                (self.activated(&gate)? * self.linear(&normed, layer, up, learning)?)?
            }
            Up::GatedJoined(part) => {
                let (all, width) = (self.linear(&normed, layer, part, learning)?, config.intermediate_size);
                (self.activated(&all.narrow(1, 0, width)?)? * all.narrow(1, width, width)?)?
            }
            Up::Plain(part) => self.activated(&self.linear(&normed, layer, part, learning)?)?,
        };
        let down = self.linear(&act, layer, family.down, learning)?;
        middle + (self.perhaps(down, layer, family.norms.after_mlp)? * config.residual_scale)?
    }

    /// The summed log-prob of an answer, prompt and answer being one plain causal sequence.
    pub fn logp(&self, prompt: &[u32], answer: &[u32], learning: &Learning) -> Result<Tensor> {
        let (config, family) = (&self.config, &self.config.family);
        let ids = [prompt, &answer[..answer.len() - 1]].concat();
        let positions: Vec<usize> = (0..ids.len()).collect();
        let embedding = &self.weights[&format!("{}.weight", family.embed)];
        let mut x = (embedding.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)? * config.embedding_scale)?;
        if let Some(learned) = family.positions {
            x = (x + self.weights[&format!("{learned}.weight")].narrow(0, 0, ids.len())?)?;
        }
        for layer in 0..config.num_hidden_layers {
            let window = config.layers[layer].window;
            let hides = |i: usize, j: usize| j > i || window.is_some_and(|window| i - j >= window);
            x = self.block(layer, &x, &positions, hides, learning)?;
        }
        let last = self.norm(&x.narrow(0, prompt.len() - 1, answer.len())?, family.norm)?;
        let named = [Some(family.head), family.stored_head].into_iter().flatten();
        let stored = named.filter_map(|name| self.weights.get(&format!("{name}.weight"))).next();
        let mut logits = (last.matmul(&stored.unwrap_or(embedding).t()?)? / config.logits_divisor)?;
        if family.head_bias {
            logits = logits.broadcast_add(&self.weights[&format!("{}.bias", family.head)])?;
        }
        let logps = log_softmax(&capped(logits, config.logit_cap)?, D::Minus1)?;
        logps.gather(&Tensor::new(answer, &Device::Cpu)?.unsqueeze(1)?, 1)?.sum_all()
    }
}

fn capped(x: Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x),
    }
}
