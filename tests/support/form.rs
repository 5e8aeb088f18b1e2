//! The decoder once more, in f64 and in candle's differentiable operations, a sequence at a time: what autograd and
//! central differences are taken of. Nothing here is shared with the library but configs and frequencies.

use std::{collections::BTreeMap, path::Path};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{log_softmax, silu, softmax};
use dpo_lora::{
    kernels::dropout::Dropout,
    model::{Config, lora::Adapter},
    weights::ModelFolder,
};

/// The linear layers of a block, in the order of their numbers.
pub const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

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
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
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

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?.sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(&self.weights[&format!("{name}.weight")])
    }

    fn linear(&self, x: &Tensor, layer: usize, slot: usize, learning: &Learning) -> Result<Tensor> {
        let module = format!("model.layers.{layer}.{}", LINEARS[slot]);
        let mut y = x.matmul(&self.weights[&format!("{module}.weight")].t()?)?;
        if let Some(bias) = self.weights.get(&format!("{module}.bias")) {
            y = y.broadcast_add(bias)?;
        }
        let Some([a, b]) = learning.matrices.get(&module) else { return Ok(y) };
        let dropped = match learning.dropout {
            None => x.clone(),
            Some(dropout) => {
                let ones = Tensor::ones(x.shape(), DType::F32, &Device::Cpu)?;
                (x * dropout.apply(&ones, layer * LINEARS.len() + slot)?.to_dtype(DType::F64)?)?
            }
        };
        y + (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * learning.scale)?
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
        let (rows, dim) = (positions.len(), self.config.head_dim);
        let (n, kv) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let (frequencies, scale) = self.config.rope.inverse_frequencies(dim, 0);
        let angles = positions.iter().flat_map(|p| frequencies.iter().map(move |f| f64::from(*p as f32 * f)));
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (rows, dim / 2), &Device::Cpu)?;
        let (cos, sin) = ((angles.cos()? * f64::from(scale))?, (angles.sin()? * f64::from(scale))?);
        let by_head = |x: Tensor, n: usize| x.reshape((rows, n, dim))?.transpose(0, 1)?.contiguous();
        let turn = |x: Tensor| {
            let (first, second) = (x.narrow(2, 0, dim / 2)?, x.narrow(2, dim / 2, dim / 2)?);
            let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
            let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
            Tensor::cat(&[turned_first, turned_second], 2)
        };
        let serving = Tensor::from_iter((0..n).map(|head| (head * kv / n) as u32), &Device::Cpu)?;
        let mask: Vec<f64> = (0..rows * rows).map(|at| if hides(at / rows, at % rows) { -1e30 } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?;

        let normed = self.norm(x, &format!("model.layers.{layer}.input_layernorm"))?;
        let q = turn(by_head(self.linear(&normed, layer, 0, learning)?, n)?)?;
        let k = turn(by_head(self.linear(&normed, layer, 1, learning)?, kv)?)?.index_select(&serving, 0)?;
        let v = by_head(self.linear(&normed, layer, 2, learning)?, kv)?.index_select(&serving, 0)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (dim as f64).sqrt())?.broadcast_add(&mask)?;
        let values = softmax(&scores, D::Minus1)?.matmul(&v)?;
        let values = values.transpose(0, 1)?.contiguous()?.reshape((rows, n * dim))?;
        let middle = (x + self.linear(&values, layer, 3, learning)?)?;

        let normed = self.norm(&middle, &format!("model.layers.{layer}.post_attention_layernorm"))?;
        let gate = silu(&self.linear(&normed, layer, 4, learning)?)?;
        let act = (gate * self.linear(&normed, layer, 5, learning)?)?;
        middle + self.linear(&act, layer, 6, learning)?
    }

    /// The summed log-prob of an answer, prompt and answer being one plain causal sequence.
    pub fn logp(&self, prompt: &[u32], answer: &[u32], learning: &Learning) -> Result<Tensor> {
        let ids = [prompt, &answer[..answer.len() - 1]].concat();
        let positions: Vec<usize> = (0..ids.len()).collect();
        let hides = |i: usize, j: usize| j > i || self.config.sliding_window.is_some_and(|window| i - j >= window);
        let embedding = &self.weights["model.embed_tokens.weight"];
        let mut x = embedding.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            x = self.block(layer, &x, &positions, hides, learning)?;
        }
        let last = self.norm(&x.narrow(0, prompt.len() - 1, answer.len())?, "model.norm")?;
        let head = self.weights.get("lm_head.weight").unwrap_or(embedding);
        let logps = log_softmax(&last.matmul(&head.t()?)?, D::Minus1)?;
        logps.gather(&Tensor::new(answer, &Device::Cpu)?.unsqueeze(1)?, 1)?.sum_all()
    }
}
