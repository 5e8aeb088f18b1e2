//! One layer of the decoder: attention and an MLP, each around a residual, one after the other or side by side.
//!
//! What the backward pass needs, [`Kept`], is what the forward pass computes up to the last product. It is handed over
//! from there, or recomputed from the layer's input.

use candle_core::{Result, Tensor};

use super::{
    attention::{Attention, Mixed, Projected},
    linear::{Linear, Through},
    mlp::{Inner, Mlp},
    tokens::Tokens,
};
use crate::kernels::attention::{Attended, attention};

/// The frozen parts of a layer.
#[derive(Debug)]
pub struct Block {
    /// The first half.
    pub attention: Attention,
    /// The second half.
    pub mlp: Mlp,
    /// Whether the MLP reads the layer's input, as the attention does, or what the attention's residual wrote.
    pub side_by_side: bool,
}

/// Everything that the backward pass needs of a layer's forward pass, but for its input.
pub struct Kept {
    projected: Projected,
    attended: Attended,
    mixed: Mixed,
    /// After the first residual: `[tokens, hidden]`.
    middle: Tensor,
    inner: Inner,
}

impl Block {
    /// Its linear layers, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().chain(self.mlp.linears())
    }

    /// The layer's output `[tokens, hidden]` for the input `x[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Tensor> {
        let Projected { q, k, v, .. } = self.project(x, tokens, through)?;
        let values = attention(&q, &k, &v, &tokens.spans, self.attention.heads)?.values;
        drop((q, k, v));
        self.rest(x, &values, through)
    }

    /// Norm, queries, keys and values, positions.
    pub fn project(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Projected> {
        self.attention.project(x, tokens, through)
    }

    /// What follows the attention, given its mixed values.
    pub fn rest(&self, x: &Tensor, values: &Tensor, through: Through) -> Result<Tensor> {
        let (middle, _) = self.attention.add(x, values, through)?;
        let Inner { last, .. } = self.mlp.inner(self.mlp_reads(x, &middle), through)?;
        self.mlp.add(&middle, &last, through)
    }

    /// The layer's output, and what its backward pass needs but for norms and activations, which are soon done again.
    pub fn forward_keeping(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<(Tensor, Kept)> {
        let mut kept = self.recompute(x, tokens, through)?;
        let y = self.mlp.add(&kept.middle, &kept.inner.last, through)?;
        kept.projected.slim();
        kept.inner.slim();
        Ok((y, kept))
    }

    /// What the backward pass needs, from the layer's input: the forward pass without its last product.
    pub fn recompute(&self, x: &Tensor, tokens: &Tokens, through: Through) -> Result<Kept> {
        let projected = self.project(x, tokens, through)?;
        let attended = attention(&projected.q, &projected.k, &projected.v, &tokens.spans, self.attention.heads)?;
        let (middle, mixed) = self.attention.add(x, &attended.values, through)?;
        let inner = self.mlp.inner(self.mlp_reads(x, &middle), through)?;
        Ok(Kept { projected, attended, mixed, middle, inner })
    }

    /// The gradient that reaches the layer's input `x`, from the gradient `dy` of its output. Adds the gradients of the
    /// layer's adapters to theirs.
    pub fn backward(&self, x: &Tensor, kept: Kept, dy: Tensor, tokens: &Tokens, through: Through) -> Result<Tensor> {
        let Kept { projected, attended, mixed, middle, inner } = kept;
        let past = self.mlp.backward(self.mlp_reads(x, &middle), inner, &dy, through)?;
        drop(middle);
        // what reaches the attention's output: all that reaches the middle, or the layer's output alone
        let d = match self.side_by_side {
            true => dy,
            false => {
                drop(dy);
                past.clone()
            }
        };
        self.attention.backward(x, (projected, attended, mixed), (d, &past), tokens, through)
    }

    fn mlp_reads<'a>(&self, x: &'a Tensor, middle: &'a Tensor) -> &'a Tensor {
        if self.side_by_side { x } else { middle }
    }
}
