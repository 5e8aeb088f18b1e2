//! One layer of the decoder: attention and a gated MLP, each behind a norm and around a residual.
//!
//! What the backward pass needs, [`Kept`], is what the forward pass computes up to the last product. It is handed over
//! from there, or recomputed from the layer's input.

use candle_core::{Result, Tensor};

use super::{
    linear::{Linear, Through},
    rotary::Angles,
    tokens::Tokens,
};
use crate::kernels::{
    attention::{Attended, Heads, attention, attention_backward},
    gate::{swiglu, swiglu_backward},
    norm::{rms_norm, rms_norm_backward},
    rope::rope,
};

/// The frozen parts of a layer, named as its weights are.
#[derive(Debug)]
pub struct Block {
    /// `[hidden]`.
    pub input_layernorm: Tensor,
    /// `[n_heads · head_dim, hidden]`.
    pub q_proj: Linear,
    /// `[n_kv_heads · head_dim, hidden]`.
    pub k_proj: Linear,
    /// `[n_kv_heads · head_dim, hidden]`.
    pub v_proj: Linear,
    /// `[hidden, n_heads · head_dim]`.
    pub o_proj: Linear,
    /// `[hidden]`.
    pub post_attention_layernorm: Tensor,
    /// `[intermediate, hidden]`.
    pub gate_proj: Linear,
    /// `[intermediate, hidden]`.
    pub up_proj: Linear,
    /// `[hidden, intermediate]`.
    pub down_proj: Linear,
    /// Shape of the attention.
    pub heads: Heads,
    /// The norms' epsilon.
    pub eps: f64,
}

/// Queries, keys and values, turned by their positions, and what led to them.
pub struct Projected {
    /// The normed input `[tokens, hidden]`.
    normed: Tensor,
    thin: [Option<Tensor>; 3],
    /// `[tokens, n_heads · head_dim]`.
    pub q: Tensor,
    /// `[tokens, n_kv_heads · head_dim]`.
    pub k: Tensor,
    /// `[tokens, n_kv_heads · head_dim]`.
    pub v: Tensor,
}

/// Everything that the backward pass needs of a layer's forward pass, but for its input.
pub struct Kept {
    projected: Projected,
    attended: Attended,
    gated: Gated,
}

/// The second half of a layer, up to the last product.
struct Gated {
    o_thin: Option<Tensor>,
    /// After the first residual: `[tokens, hidden]`.
    middle: Tensor,
    normed: Tensor,
    thin: [Option<Tensor>; 2],
    gate: Tensor,
    up: Tensor,
    /// `silu(gate) · up`: `[tokens, intermediate]`.
    act: Tensor,
    down_thin: Option<Tensor>,
}

impl Block {
    /// Its linear layers, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let attention = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        attention.into_iter().chain([&self.gate_proj, &self.up_proj, &self.down_proj])
    }

    /// The layer's output `[tokens, hidden]` for the input `x[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Tensor> {
        let Projected { q, k, v, .. } = self.project(x, tokens, through)?;
        let values = attention(&q, &k, &v, &tokens.spans, self.heads)?.values;
        drop((q, k, v));
        self.rest(x, &values, through)
    }

    /// What follows the attention, given its mixed values.
    pub fn rest(&self, x: &Tensor, values: &Tensor, through: Through) -> Result<Tensor> {
        let Gated { middle, act, down_thin, .. } = self.gated(x, values, through)?;
        let y = self.down_proj.apply(&act, down_thin.as_ref(), through)?;
        middle + y
    }

    /// Norm, the three projections, positions.
    pub fn project(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Projected> {
        let normed = rms_norm(x, &self.input_layernorm, self.eps)?;
        let project = |linear: &Linear| {
            let thin = linear.thin(&normed, through)?;
            let y = linear.apply(&normed, thin.as_ref(), through)?;
            Result::Ok((thin, y))
        };
        let ((q_thin, q), (k_thin, k)) = (project(&self.q_proj)?, project(&self.k_proj)?);
        let (v_thin, v) = project(&self.v_proj)?;
        let Angles { cos, sin } = &tokens.angles[0];
        let q = rope(q, cos, sin, false)?;
        let k = rope(k, cos, sin, false)?;
        Ok(Projected { thin: [q_thin, k_thin, v_thin], normed, q, k, v })
    }

    fn gated(&self, x: &Tensor, values: &Tensor, through: Through) -> Result<Gated> {
        let o_thin = self.o_proj.thin(values, through)?;
        let middle = (x + self.o_proj.apply(values, o_thin.as_ref(), through)?)?;
        let normed = rms_norm(&middle, &self.post_attention_layernorm, self.eps)?;
        let gate_thin = self.gate_proj.thin(&normed, through)?;
        let gate = self.gate_proj.apply(&normed, gate_thin.as_ref(), through)?;
        let up_thin = self.up_proj.thin(&normed, through)?;
        let up = self.up_proj.apply(&normed, up_thin.as_ref(), through)?;
        let act = swiglu(&gate, &up)?;
        let down_thin = self.down_proj.thin(&act, through)?;
        Ok(Gated { o_thin, middle, normed, thin: [gate_thin, up_thin], gate, up, act, down_thin })
    }

    /// The layer's output, and what its backward pass needs.
    pub fn forward_keeping(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<(Tensor, Kept)> {
        let kept = self.recompute(x, tokens, through)?;
        let Gated { middle, act, down_thin, .. } = &kept.gated;
        let y = (middle + self.down_proj.apply(act, down_thin.as_ref(), through)?)?;
        Ok((y, kept))
    }

    /// What the backward pass needs, from the layer's input: the forward pass without its last product.
    pub fn recompute(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Kept> {
        let projected = self.project(x, tokens, through)?;
        let attended = attention(&projected.q, &projected.k, &projected.v, &tokens.spans, self.heads)?;
        let gated = self.gated(x, &attended.values, through)?;
        Ok(Kept { projected, attended, gated })
    }

    /// The gradient that reaches the layer's input `x`, from the gradient `dy` of its output. Adds the gradients of the
    /// layer's adapters to theirs.
    pub fn backward(&self, x: &Tensor, kept: Kept, dy: Tensor, tokens: &Tokens, through: Through) -> Result<Tensor> {
        let Kept { projected, attended, gated } = kept;
        let d_middle = self.gated_backward(gated, &attended.values, dy, through)?;
        self.attention_half_backward(x, projected, &attended, d_middle, tokens, through)
    }

    /// From the layer's output back to `(dmiddle, dvalues)`.
    fn gated_backward(&self, gated: Gated, values: &Tensor, dy: Tensor, through: Through) -> Result<(Tensor, Tensor)> {
        let Gated { o_thin, middle, normed, thin: [gate_thin, up_thin], gate, up, act, down_thin } = gated;
        let d_act = act.zeros_like()?;
        self.down_proj.backward(&act, down_thin.as_ref(), &dy, &d_act, through)?;
        drop(act);
        let (d_gate, d_up) = swiglu_backward(&gate, &up, &d_act)?;
        drop((gate, up, d_act));
        let d_normed = normed.zeros_like()?;
        self.gate_proj.backward(&normed, gate_thin.as_ref(), &d_gate, &d_normed, through)?;
        self.up_proj.backward(&normed, up_thin.as_ref(), &d_up, &d_normed, through)?;
        drop((d_gate, d_up, normed));
        let d_middle = rms_norm_backward(&middle, &self.post_attention_layernorm, self.eps, &d_normed, &dy)?;
        let d_values = values.zeros_like()?;
        self.o_proj.backward(values, o_thin.as_ref(), &d_middle, &d_values, through)?;
        Ok((d_middle, d_values))
    }

    /// From `(dmiddle, dvalues)` back to the layer's input.
    fn attention_half_backward(
        &self,
        x: &Tensor,
        projected: Projected,
        attended: &Attended,
        (d_middle, d_values): (Tensor, Tensor),
        tokens: &Tokens,
        through: Through,
    ) -> Result<Tensor> {
        let Projected { normed, thin, q, k, v } = projected;
        let [dq, dk, dv] =
            attention_backward([&q, &k, &v], attended, &d_values, &tokens.spans, &tokens.groups, self.heads)?;
        let Angles { cos, sin } = &tokens.angles[0];
        let dq = rope(dq, cos, sin, true)?;
        let dk = rope(dk, cos, sin, true)?;
        let d_normed = normed.zeros_like()?;
        for (linear, thin, d) in
            [(&self.q_proj, &thin[0], dq), (&self.k_proj, &thin[1], dk), (&self.v_proj, &thin[2], dv)]
        {
            linear.backward(&normed, thin.as_ref(), &d, &d_normed, through)?;
        }
        rms_norm_backward(x, &self.input_layernorm, self.eps, &d_normed, &d_middle)
    }
}
