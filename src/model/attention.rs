//! The first half of a layer: norm, queries, keys and values, positions, attention, the way back to the residual.

use candle_core::{Result, Tensor};

use super::{
    join::Join,
    linear::{Linear, Through},
    norm::Norm,
    parts::{Parts, Thins},
    rotary::Angles,
    tokens::Tokens,
};
use crate::kernels::{
    attention::{Attended, Heads, attention_backward},
    rope::{Turn, rope},
    sum::add,
};

/// The frozen parts of a layer's attention.
#[derive(Debug)]
pub struct Attention {
    /// Before it; none: the layer's input is used as it is.
    pub norm: Option<Norm>,
    /// Queries `n_heads · head_dim`, keys and values `n_kv_heads · head_dim`.
    pub qkv: Parts<3>,
    /// Of queries and of keys, before they turn.
    pub query_norms: Option<[Norm; 2]>,
    /// How heads turn, and the number of their set of angles; none: they do not.
    pub rope: Option<(usize, Turn)>,
    /// Shape of the attention.
    pub heads: Heads,
    /// `[hidden, n_heads · head_dim]`.
    pub output: Linear,
    /// What becomes of its output.
    pub join: Join,
}

/// Queries, keys and values, turned by their positions, and what led to them.
pub struct Projected {
    /// The normed input `[tokens, hidden]`, unless it is to be computed again.
    normed: Option<Tensor>,
    thins: Thins,
    /// Queries and keys before their norms, where they have any.
    unnormed: Option<[Tensor; 2]>,
    /// `[tokens, n_heads · head_dim]`.
    pub q: Tensor,
    /// `[tokens, n_kv_heads · head_dim]`.
    pub k: Tensor,
    /// `[tokens, n_kv_heads · head_dim]`.
    pub v: Tensor,
}

impl Projected {
    /// Lets go of what costs little to compute again.
    pub fn slim(&mut self) {
        self.normed = None;
    }
}

/// What led from mixed values to the output.
pub struct Mixed {
    thin: Option<Tensor>,
    /// Where a norm follows, what it reads.
    output: Option<Tensor>,
}

impl Attention {
    /// Its linear layers, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv.linears().iter().chain([&self.output])
    }

    /// Norm, projections, positions.
    pub fn project(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Projected> {
        let normed = self.normed(x)?;
        let ([q, k, v], thins) = self.qkv.forward(&normed, through)?;
        let (q, k, unnormed) = match &self.query_norms {
            Some([q_norm, k_norm]) => (q_norm.forward(&q)?, k_norm.forward(&k)?, Some([q, k])),
            None => (q, k, None),
        };
        let (q, k) = (self.turned(q, tokens, false)?, self.turned(k, tokens, false)?);
        Ok(Projected { normed: Some(normed), thins, unnormed, q, k, v })
    }

    fn normed(&self, x: &Tensor) -> Result<Tensor> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        }
    }

    fn turned(&self, x: Tensor, tokens: &Tokens, back: bool) -> Result<Tensor> {
        let Some((set, turn)) = self.rope else { return Ok(x) };
        let Angles { cos, sin } = &tokens.angles[set];
        rope(x, cos, sin, turn, back)
    }

    /// `x` with what follows from the mixed values added.
    pub fn add(&self, x: &Tensor, values: &Tensor, through: Through) -> Result<(Tensor, Mixed)> {
        let thin = self.output.thin(values, through)?;
        let output = self.output.apply(values, thin.as_ref(), through)?;
        let sum = self.join.forward(x, &output)?;
        Ok((sum, Mixed { thin, output: self.join.norm.is_some().then_some(output) }))
    }

    /// The gradient that reaches the layer's input `x`: `past`, what reaches it past this half, and what the gradient
    /// `d` of this half's output adds.
    pub fn backward(
        &self,
        x: &Tensor,
        (projected, attended, mixed): (Projected, Attended, Mixed),
        (d, past): (Tensor, &Tensor),
        tokens: &Tokens,
        through: Through,
    ) -> Result<Tensor> {
        let d_output = self.join.backward(mixed.output.as_ref(), &d)?;
        drop((d, mixed.output));
        let d_values = self.output.backward(&attended.values, mixed.thin.as_ref(), &d_output, through)?;
        drop(d_output);

        let Projected { normed, thins, unnormed, q, k, v } = projected;
        let [dq, dk, dv] =
            attention_backward([&q, &k, &v], &attended, &d_values, &tokens.spans, &tokens.groups, self.heads)?;
        drop((q, k, v, attended, d_values));
        let (mut dq, mut dk) = (self.turned(dq, tokens, true)?, self.turned(dk, tokens, true)?);
        if let Some(([q_norm, k_norm], [q, k])) = self.query_norms.as_ref().zip(unnormed) {
            dq = q_norm.backward(&q, &dq, &dq.zeros_like()?)?;
            dk = k_norm.backward(&k, &dk, &dk.zeros_like()?)?;
        }
        let normed = normed.map_or_else(|| self.normed(x), Ok)?;
        let d_normed = self.qkv.backward(&normed, &thins, [dq, dk, dv], through)?;
        match &self.norm {
            Some(norm) => norm.backward(x, &d_normed, past),
            None => add(&d_normed, past),
        }
    }
}
