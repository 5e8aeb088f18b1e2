//! AdamW (Loshchilov & Hutter 2019) as `torch.optim.AdamW` computes it, in f32 with the bias corrections in f64.

use candle_core::{DType, Tensor};

use super::{
    clip::Gradient,
    elementwise::{all, update},
};
use crate::Result;
#[cfg(any(test, feature = "cuda", feature = "metal"))]
use crate::kernels::gpu;

/// torch's default, added to the root of the second moment.
const EPS: f64 = 1e-8;

/// AdamW over one flat vector.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    weight_decay: f64,
    /// Steps taken.
    pub(super) step: u64,
    /// First moment, `[n]`.
    pub(super) exp_avg: Tensor,
    /// Second moment, `[n]`.
    pub(super) exp_avg_sq: Tensor,
    /// How large the last step on a GPU made its numbers; none where something else has changed them since.
    #[cfg(any(test, feature = "cuda", feature = "metal"))]
    pub(super) largest: Option<gpu::optimizer::Largest>,
}

impl AdamW {
    /// Zero moments for `params` (`[n]`); `weight_decay` is decoupled.
    pub fn new(params: &Tensor, betas: [f64; 2], weight_decay: f64) -> Result<Self> {
        let zeros = || Tensor::zeros(params.dims(), DType::F32, params.device());
        Ok(Self {
            betas,
            weight_decay,
            step: 0,
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
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
        let step = self.step + 1;
        let [beta1, beta2] = self.betas;
        let correction1 = 1.0 - beta1.powf(step as f64);
        let correction2 = (1.0 - beta2.powf(step as f64)).sqrt();
        let decay = 1.0 - lr * self.weight_decay;
        let step_size = lr / correction1;

        let (scale, weight) = (grad_scale as f32, (1.0 - beta1) as f32);
        let (keep, take) = (beta2 as f32, (1.0 - beta2) as f32);
        let (decay32, root, rate, eps) = (decay as f32, correction2 as f32, step_size as f32, EPS as f32);
        let next_m = |m: f32, g: f32| lerp(m, g * scale, weight);
        let next_v = |v: f32, g: f32| {
            let g = g * scale;
            v * keep + take * g * g
        };
        let next_p = |p: f32, m: f32, v: f32| p * decay32 - rate * (m / (v.sqrt() / root + eps));
        let finite = |[p, g, m, v]: [f32; 4]| {
            let (m, v) = (next_m(m, g), next_v(v, g));
            m.is_finite() && v.is_finite() && next_p(p, m, v).is_finite()
        };
        if !all([params, grads, &self.exp_avg, &self.exp_avg_sq], finite)? {
            return Ok(false);
        }
        self.step = step;
        update(
            &self.exp_avg,
            grads,
            grads,
            |m, g, _| next_m(m, g),
            |m, g, _| m + (((g * grad_scale)? - m)? * (1.0 - beta1))?,
        )?;
        update(
            &self.exp_avg_sq,
            grads,
            grads,
            |v, g, _| next_v(v, g),
            |v, g, _| (v * beta2)? + ((g * grad_scale)?.sqr()? * (1.0 - beta2))?,
        )?;
        update(params, &self.exp_avg, &self.exp_avg_sq, next_p, |p, m, v| {
            (p * decay)? - ((m / ((v.sqrt()? / correction2)? + EPS)?)? * step_size)?
        })?;
        Ok(true)
    }

    #[cfg(any(test, feature = "cuda", feature = "metal"))]
    pub(super) fn gpu_step(&mut self, params: &Tensor, gradient: Gradient, lr: f64) -> Result<bool> {
        let Gradient { values: grads, norm, scale: grad_scale } = gradient;
        let (step, [beta1, beta2]) = (self.step + 1, self.betas);
        let numbers = gpu::optimizer::Adam {
            grad_scale: grad_scale as f32,
            weight: (1.0 - beta1) as f32,
            keep: beta2 as f32,
            take: (1.0 - beta2) as f32,
            decay: (1.0 - lr * self.weight_decay) as f32,
            root: (1.0 - beta2.powf(step as f64)).sqrt() as f32,
            rate: (lr / (1.0 - beta1.powf(step as f64))) as f32,
            eps: EPS as f32,
        };
        let known = gpu::optimizer::Known { norm, before: self.largest.as_ref() };
        let moments = [&self.exp_avg, &self.exp_avg_sq];
        let Some(largest) = gpu::optimizer::adam(params, grads, moments, known, numbers)? else { return Ok(false) };
        (self.step, self.largest) = (step, Some(largest));
        Ok(true)
    }
}

/// torch's `lerp`: the two forms differ in rounding, and each ends exactly at its own end.
fn lerp(from: f32, to: f32, weight: f32) -> f32 {
    if weight < 0.5 { from + weight * (to - from) } else { to - (to - from) * (1.0 - weight) }
}
