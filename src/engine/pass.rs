//! Forward and backward passes, layer by layer: all micro-batches of a sweep pass a layer before the next is touched,
//! so a layer's weights are read once a pass.

use std::path::Path;

use candle_core::Tensor;

use super::{
    ahead::Ahead,
    pack::Packed,
    saved::Inputs,
    schedule::{Direction, Schedule},
    within_pool,
};
use crate::{
    Result,
    model::{
        block::{Block, Kept},
        decoder::Decoder,
        linear::Through,
    },
    objective::logps::{TokenScore, score},
};

/// Called between a layer's micro-batches; an error ends the pass there.
pub type Poll<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// A model and the way through it.
#[derive(Clone, Copy)]
pub struct Engine<'a> {
    /// The frozen base.
    pub model: &'a Decoder,
    /// What is held where. `sweep` and `micro` are its callers' to keep.
    pub schedule: &'a Schedule,
    /// Where a scratch file may be made.
    pub scratch: &'a Path,
    /// Looked at on the way.
    pub poll: Poll<'a>,
}

/// A micro-batch and the adapter that it goes through.
#[derive(Clone, Copy)]
pub struct Micro<'a> {
    /// The tokens.
    pub packed: &'a Packed,
    /// The adapter.
    pub through: Through<'a>,
}

/// What the backward pass needs of the forward pass.
pub struct Saved {
    /// The input of every layer for every micro-batch, layer after layer.
    inputs: Inputs,
    /// What the last layers kept, layer after layer, a value a micro-batch.
    kept: Vec<Vec<Kept>>,
    heads: Vec<Head>,
}

/// What remains of a micro-batch at the head.
struct Head {
    /// The last layer's output at the rows that predict, `[answer tokens, hidden]`.
    picked: Tensor,
    /// `∂logp/∂normed(picked)`, `[answer tokens, hidden]`.
    d_normed: Tensor,
}

/// Scores of the answers' tokens, answer after answer, for each micro-batch.
pub type Scores = Vec<Vec<TokenScore>>;

/// Scores of one micro-batch.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) where the device fails or has no room.
pub fn forward(model: &Decoder, packed: &Packed, through: Through) -> Result<Vec<TokenScore>> {
    let schedule = Schedule::default();
    let engine = Engine { model, schedule: &schedule, scratch: Path::new("."), poll: &|| Ok(()) };
    Ok(engine.forward(&[Micro { packed, through }])?.swap_remove(0))
}

impl Engine<'_> {
    /// Scores of every micro-batch.
    ///
    /// # Errors
    /// What `poll` says; [`Error::Tensor`](crate::Error::Tensor) where the device fails or has no room.
    pub fn forward(&self, micros: &[Micro]) -> Result<Scores> {
        within_pool(|| self.forward_in_pool(micros))
    }

    fn forward_in_pool(&self, micros: &[Micro]) -> Result<Scores> {
        let mut xs = self.embed(micros)?;
        let mut ahead = self.ahead();
        for layer in 0..self.model.blocks.len() {
            let block = self.enter(layer, Direction::Forward);
            for (x, micro) in xs.iter_mut().zip(micros) {
                (self.poll)()?;
                *x = block.forward(x, &micro.packed.tokens, micro.through)?;
                ahead.queued()?;
            }
            self.leave(layer);
        }
        let scores = xs.into_iter().zip(micros).map(|(x, micro)| Ok(self.head(x, micro, false)?.0)).collect();
        self.leave_head();
        scores
    }

    /// Scores of the policy's micro-batches and what [`Engine::backward`] needs of them; in the same visit of every
    /// layer also the scores of the reference's.
    ///
    /// # Errors
    /// As [`Engine::forward`], and where a scratch file cannot be made or written.
    pub fn forward_saving(&self, policy: &[Micro], reference: &[Micro]) -> Result<(Scores, Scores, Saved)> {
        let layers = self.model.blocks.len();
        let (mut xs, mut reference_xs) = (self.embed(policy)?, self.embed(reference)?);
        let mut inputs = self.inputs(&xs)?;
        let mut kept = Vec::new();
        let mut ahead = self.ahead();
        for layer in 0..layers {
            let block = self.enter(layer, Direction::Forward);
            for (x, micro) in reference_xs.iter_mut().zip(reference) {
                (self.poll)()?;
                *x = block.forward(x, &micro.packed.tokens, micro.through)?;
                ahead.queued()?;
            }
            let keeps = layer + self.schedule.keep >= layers;
            let mut kept_here = Vec::new();
            for (x, micro) in xs.iter_mut().zip(policy) {
                (self.poll)()?;
                let tokens = &micro.packed.tokens;
                let y = if keeps {
                    let (y, kept) = block.forward_keeping(x, tokens, micro.through)?;
                    kept_here.push(kept);
                    y
                } else {
                    block.forward(x, tokens, micro.through)?
                };
                inputs.put(std::mem::replace(x, y))?;
                ahead.queued()?;
            }
            if keeps {
                kept.push(kept_here);
            }
            self.leave(layer);
        }
        let reference_scores =
            reference_xs.into_iter().zip(reference).map(|(x, micro)| Ok(self.head(x, micro, false)?.0));
        let reference_scores = reference_scores.collect::<Result<_>>()?;
        let (mut scores, mut heads) = (Vec::new(), Vec::new());
        for (x, micro) in xs.into_iter().zip(policy) {
            let (tokens, head) = self.head(x, micro, true)?;
            scores.push(tokens);
            heads.extend(head);
        }
        self.leave_head();
        Ok((scores, reference_scores, Saved { inputs, kept, heads }))
    }

    /// Adds the adapter's gradients, `d_logps` being the loss's derivative by each answer token's log-prob.
    ///
    /// # Errors
    /// As [`Engine::forward_saving`].
    pub fn backward(&self, micros: &[Micro], saved: Saved, d_logps: &[Vec<f32>]) -> Result<()> {
        let Saved { mut inputs, mut kept, heads } = saved;
        let mut dys = Vec::with_capacity(micros.len());
        for ((micro, head), d_logps) in micros.iter().zip(heads).zip(d_logps) {
            dys.push(self.head_backward(micro, head, d_logps)?);
        }
        let mut ahead = self.ahead();
        for layer in (0..self.model.blocks.len()).rev() {
            let block = self.enter(layer, Direction::Backward);
            let mut kept_here = kept.pop().map(Vec::into_iter);
            for (i, (micro, dy)) in micros.iter().zip(&mut dys).enumerate() {
                (self.poll)()?;
                let x = inputs.take(layer * micros.len() + i)?;
                let Packed { tokens, runs, .. } = micro.packed;
                let through = Through { runs: Some(runs), ..micro.through };
                let kept = match kept_here.as_mut().and_then(Iterator::next) {
                    Some(kept) => kept,
                    None => block.recompute(&x, tokens, through)?,
                };
                // the gradient is moved out, so that the block can let go of it as soon as it is used
                let upstream = std::mem::replace(dy, x.clone());
                *dy = block.backward(&x, kept, upstream, tokens, through)?;
                ahead.queued()?;
            }
            self.leave(layer);
        }
        Ok(())
    }

    fn ahead(&self) -> Ahead<'_> {
        Ahead::of(&self.model.device)
    }

    /// Where the inputs wait that all layers save of these.
    fn inputs(&self, xs: &[Tensor]) -> Result<Inputs> {
        if !self.schedule.scratch {
            return Ok(Inputs::in_memory());
        }
        let numbers = xs.iter().map(Tensor::elem_count).sum::<usize>() * self.model.blocks.len();
        Inputs::aside(&self.model.device, numbers, self.scratch)
    }

    fn embed(&self, micros: &[Micro]) -> Result<Vec<Tensor>> {
        micros.iter().map(|micro| Ok(self.model.embed(&micro.packed.tokens)?)).collect()
    }

    /// From the last layer's output to scores.
    fn head(&self, x: Tensor, micro: &Micro, gradient: bool) -> Result<(Vec<TokenScore>, Option<Head>)> {
        (self.poll)()?;
        let Self { model, schedule, .. } = self;
        let picked = x.index_select(&micro.packed.rows(x.device())?, 0)?;
        drop(x);
        let normed = model.final_norm(&picked)?;
        let (scores, d_normed) = score(&model.head, &normed, &micro.packed.targets, schedule.head_chunk, gradient)?;
        Ok((scores, d_normed.map(|d_normed| Head { picked, d_normed })))
    }

    /// From the derivatives by log-probs to that by the last layer's output.
    fn head_backward(&self, micro: &Micro, head: Head, d_logps: &[f32]) -> Result<Tensor> {
        let Head { picked, d_normed } = head;
        let device = picked.device();
        let d_normed = d_normed.broadcast_mul(&Tensor::new(d_logps, device)?.unsqueeze(1)?)?;
        let d_picked = self.model.final_norm_backward(&picked, &d_normed)?;
        let rows = Tensor::zeros((micro.packed.tokens.ids.len(), picked.dim(1)?), picked.dtype(), device)?;
        Ok(rows.index_add(&micro.packed.rows(device)?, &d_picked, 0)?)
    }

    /// A layer about to be used; where weights stream, what comes after it is read ahead.
    fn enter(&self, layer: usize, direction: Direction) -> &Block {
        let blocks = &self.model.blocks;
        if self.schedule.stream {
            let asked = self.schedule.asks_for(layer, blocks.len(), direction);
            let linears = asked.iter().flatten().flat_map(|layer| blocks[*layer].linears());
            linears.for_each(|linear| linear.weight.will_need());
            if asked[1].is_none() && direction == Direction::Forward {
                self.model.head.weight.will_need();
            }
        }
        &blocks[layer]
    }

    /// A layer that is done with.
    fn leave(&self, layer: usize) {
        if self.schedule.lets_go(layer, self.model.blocks.len()) {
            self.model.blocks[layer].linears().for_each(|linear| linear.weight.done_with());
        }
    }

    /// All micro-batches of a sweep have passed the head.
    fn leave_head(&self) {
        if self.schedule.stream && !self.schedule.head_stays {
            self.model.head.weight.free();
        }
    }
}
