//! Forward and backward passes over packed tokens: layer by layer, keeping each layer's input alone.

use candle_core::{Result, Tensor};

use super::pack::Packed;
use crate::{
    kernels::norm::{rms_norm, rms_norm_backward},
    model::{decoder::Decoder, linear::Through},
    objective::logps::{TokenScore, score},
};

/// What the backward pass needs of the forward pass.
pub struct Saved {
    /// The input of every layer, `[tokens, hidden]`.
    inputs: Vec<Tensor>,
    /// The last layer's output at the rows that predict, `[answer tokens, hidden]`.
    picked: Tensor,
    /// `∂logp/∂normed(picked)`, `[answer tokens, hidden]`.
    d_normed: Tensor,
}

/// Scores of the answers' tokens, answer after answer.
pub fn forward(model: &Decoder, packed: &Packed, through: Through) -> Result<Vec<TokenScore>> {
    let mut x = model.embed(&packed.tokens.ids)?;
    for block in &model.blocks {
        x = block.forward(&x, &packed.tokens, through)?;
    }
    let picked = x.index_select(&packed.rows(x.device())?, 0)?;
    let normed = rms_norm(&picked, &model.norm, model.eps)?;
    Ok(score(&model.head, &normed, &packed.targets, false)?.0)
}

/// The same, keeping what [`backward`] needs.
pub fn forward_saving(model: &Decoder, packed: &Packed, through: Through) -> Result<(Vec<TokenScore>, Saved)> {
    let mut x = model.embed(&packed.tokens.ids)?;
    let mut inputs = Vec::with_capacity(model.blocks.len());
    for block in &model.blocks {
        let y = block.forward(&x, &packed.tokens, through)?;
        inputs.push(std::mem::replace(&mut x, y));
    }
    let picked = x.index_select(&packed.rows(x.device())?, 0)?;
    let normed = rms_norm(&picked, &model.norm, model.eps)?;
    let (scores, d_normed) = score(&model.head, &normed, &packed.targets, true)?;
    let d_normed = d_normed.ok_or_else(|| candle_core::Error::Msg("score gave no gradient".into()))?;
    Ok((scores, Saved { inputs, picked, d_normed }))
}

/// Adds the adapter's gradients, `d_logps` being the loss's derivative by each answer token's log-prob.
pub fn backward(model: &Decoder, packed: &Packed, saved: Saved, d_logps: &[f32], through: Through) -> Result<()> {
    let Saved { mut inputs, picked, d_normed } = saved;
    let device = picked.device();
    let weights = Tensor::new(d_logps, device)?.unsqueeze(1)?;
    let d_normed = d_normed.broadcast_mul(&weights)?;
    let d_picked = rms_norm_backward(&picked, &model.norm, model.eps, &d_normed, &d_normed.zeros_like()?)?;
    let rows = Tensor::zeros((packed.tokens.ids.len(), picked.dim(1)?), picked.dtype(), device)?;
    let mut dy = rows.index_add(&packed.rows(device)?, &d_picked, 0)?;
    while let (Some(x), Some(block)) = (inputs.pop(), model.blocks.get(inputs.len())) {
        let kept = block.recompute(&x, &packed.tokens, through)?;
        dy = block.backward(&x, kept, dy, &packed.tokens, through)?;
    }
    Ok(())
}
