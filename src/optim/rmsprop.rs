//! RMSprop as `torch.optim.RMSprop` computes it with its defaults (no momentum, not centred), the optimizer of the DPO
//! paper, in f32.

use candle_core::{DType, Tensor};

use super::{
    clip::Gradient,
    elementwise::{all, update},
};
use crate::Result;
#[cfg(any(test, feature = "cuda", feature = "metal"))]
use crate::kernels::gpu;

/// torch's default: how much of the mean square is kept a step.
const ALPHA: f64 = 0.99;
/// torch's default, added to the root of the mean square.
const EPS: f64 = 1e-8;

/// RMSprop over one flat vector.
#[derive(Debug)]
pub struct Rmsprop {
    weight_decay: f64,
    /// Steps taken; the formula does not use it.
    pub(super) step: u64,
    /// Running mean of squared gradients, `[n]`.
    pub(super) square_avg: Tensor,
    /// How large the last step on a GPU made its numbers; none where something else has changed them since.
    #[cfg(any(test, feature = "cuda", feature = "metal"))]
    pub(super) largest: Option<gpu::optimizer::Largest>,
}

impl Rmsprop {
    /// A zero mean square for `params` (`[n]`). `weight_decay` is torch's for this optimizer: an L2 term
    /// `weight_decay · params` added to the (scaled) gradient, not AdamW's decoupled decay.
    pub fn new(params: &Tensor, weight_decay: f64) -> Result<Self> {
        let square_avg = Tensor::zeros(params.dims(), DType::F32, params.device())?;
        Ok(Self {
            weight_decay,
            step: 0,
            square_avg,
            #[cfg(any(test, feature = "cuda", feature = "metal"))]
            largest: None,
        })
    }

    /// See [`super::Optimizer::step`].
    pub fn step(&mut self, params: &Tensor, gradient: Gradient, lr: f64) -> Result<bool> {
        #[cfg(any(feature = "cuda", feature = "metal"))]
        if gpu::serves(params) {
            return self.gpu_step(params, gradient, lr);
        }
        let Gradient { values: grads, scale: grad_scale, .. } = gradient;
        let l2 = self.weight_decay;
        let (scale, decay, keep, take) = (grad_scale as f32, l2 as f32, ALPHA as f32, (1.0 - ALPHA) as f32);
        let (rate, eps) = (lr as f32, EPS as f32);
        let next_s = |s: f32, g: f32, p: f32| {
            let g = g * scale + decay * p;
            s * keep + take * g * g
        };
        let next_p = |p: f32, g: f32, s: f32| p - rate * ((g * scale + decay * p) / (s.sqrt() + eps));
        let finite = |[p, g, s, _]: [f32; 4]| {
            let s = next_s(s, g, p);
            s.is_finite() && next_p(p, g, s).is_finite()
        };
        if !all([params, grads, &self.square_avg, grads], finite)? {
            return Ok(false);
        }
        self.step += 1;
        update(&self.square_avg, grads, params, next_s, |s, g, p| {
            (s * ALPHA)? + (((g * grad_scale)? + (p * l2)?)?.sqr()? * (1.0 - ALPHA))?
        })?;
        update(params, grads, &self.square_avg, next_p, |p, g, s| {
            p - ((((g * grad_scale)? + (p * l2)?)? / (s.sqrt()? + EPS)?)? * lr)?
        })?;
        Ok(true)
    }

    #[cfg(any(test, feature = "cuda", feature = "metal"))]
    pub(super) fn gpu_step(&mut self, params: &Tensor, gradient: Gradient, lr: f64) -> Result<bool> {
        let Gradient { values: grads, norm, scale: grad_scale } = gradient;
        let numbers = gpu::optimizer::Rmsprop {
            grad_scale: grad_scale as f32,
            decay: self.weight_decay as f32,
            keep: ALPHA as f32,
            take: (1.0 - ALPHA) as f32,
            rate: lr as f32,
            eps: EPS as f32,
        };
        let known = gpu::optimizer::Known { norm, before: self.largest.as_ref() };
        let taken = gpu::optimizer::rmsprop(params, grads, &self.square_avg, known, numbers)?;
        let Some(largest) = taken else { return Ok(false) };
        self.step += 1;
        self.largest = Some(largest);
        Ok(true)
    }
}
