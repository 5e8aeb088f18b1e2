//! Layer norm (Ba et al. 2016) over the rows of `x[tokens, hidden]`, forward and backward.

use candle_core::{D, Result, Tensor};
use rayon::prelude::*;

use super::{
    host::{dot, floats, matrix},
    profile::{Part, Timed},
};

/// Rows that a task takes at once.
const ROWS: usize = 8;

/// `y = (x − mean(x)) / sqrt(variance(x) + eps) · w + b`.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::layer_norm::layer_norm(x, w, b, eps);
    }
    if !x.device().is_cpu() {
        return plain::layer_norm(x, w, b, eps);
    }
    let (rows, hidden) = x.dims2()?;
    let (x, w, b) = (floats(x)?, floats(w)?, floats(b)?);
    let mut y = vec![0f32; rows * hidden];
    y.par_chunks_mut(hidden).zip(x.par_chunks(hidden)).with_min_len(ROWS).for_each(|(y, x)| {
        let scale = center(x, eps, y);
        for ((y, w), b) in y.iter_mut().zip(&*w).zip(&*b) {
            *y = *y * scale * w + b;
        }
    });
    matrix(y, rows, hidden)
}

/// The gradient that reaches `x` through the norm, plus `residual`, the gradient that reaches it past the norm.
///
/// With `c = x − mean(x)`, `s = 1 / sqrt(variance(x) + eps)` and `g = dy · w`:
/// `dx = s · (g − mean(g) − c · s² · mean(g · c))`.
pub fn layer_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::layer_norm::layer_norm_backward(x, w, eps, dy, residual);
    }
    if !x.device().is_cpu() {
        return plain::layer_norm_backward(x, w, eps, dy, residual);
    }
    let (rows, hidden) = x.dims2()?;
    let (x, w, dy, residual) = (floats(x)?, floats(w)?, floats(dy)?, floats(residual)?);
    let mut dx = vec![0f32; rows * hidden];
    dx.par_chunks_mut(hidden).enumerate().with_min_len(ROWS).for_each_init(
        || vec![0f32; hidden],
        |c, (row, dx)| {
            let at = row * hidden..(row + 1) * hidden;
            let s = center(&x[at.clone()], eps, c);
            for ((g, dy), w) in dx.iter_mut().zip(&dy[at.clone()]).zip(&*w) {
                *g = dy * w;
            }
            let (mean, along) = (sum(dx) / hidden as f32, dot(dx, c) / hidden as f32 * s * s);
            for ((dx, c), residual) in dx.iter_mut().zip(&*c).zip(&residual[at]) {
                *dx = (*dx - mean - c * along) * s + residual;
            }
        },
    );
    matrix(dx, rows, hidden)
}

/// Puts `x − mean(x)` into `c` and returns `1 / sqrt(variance(x) + eps)`.
fn center(x: &[f32], eps: f64, c: &mut [f32]) -> f32 {
    let mean = sum(x) / x.len() as f32;
    for (c, x) in c.iter_mut().zip(x) {
        *c = x - mean;
    }
    1.0 / (dot(c, c) / x.len() as f32 + eps as f32).sqrt()
}

/// Σ x in sixteen interleaved sums, as [`dot`] adds.
fn sum(x: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let blocks = x.chunks_exact(16);
    let rest: f32 = blocks.remainder().iter().sum();
    for block in blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += x;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
mod plain {
    use super::*;

    /// What the row is without its mean, and one over its deviation.
    fn center(x: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        let c = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let s = (c.sqr()?.mean_keepdim(D::Minus1)? + eps)?.powf(-0.5)?;
        Ok((c, s))
    }

    pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
        let (c, s) = center(x, eps)?;
        c.broadcast_mul(&s)?.broadcast_mul(w)?.broadcast_add(b)
    }

    pub fn layer_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (c, s) = center(x, eps)?;
        let g = dy.broadcast_mul(w)?;
        let along = ((&g * &c)?.mean_keepdim(D::Minus1)? * s.sqr()?)?;
        let inner = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?.broadcast_sub(&c.broadcast_mul(&along)?)?;
        residual + inner.broadcast_mul(&s)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    const EPS: f64 = 1e-3;

    #[test]
    fn kernel_equals_plain_tensors_forward_and_backward() -> Result<()> {
        for (rows, hidden) in [(1, 2), (3, 16), (9, 40), (50, 33)] {
            let (x, w, b) = ((random((rows, hidden), 1) + 0.7)?, random(hidden, 2), random(hidden, 5));
            let (dy, residual) = (random((rows, hidden), 3), random((rows, hidden), 4));
            assert!(worst(&layer_norm(&x, &w, &b, EPS)?, &plain::layer_norm(&x, &w, &b, EPS)?) < 2e-6);
            let ours = layer_norm_backward(&x, &w, EPS, &dy, &residual)?;
            assert!(worst(&ours, &plain::layer_norm_backward(&x, &w, EPS, &dy, &residual)?) < 2e-5, "{rows} {hidden}");
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        let (x, w, b, dy) = ((random((5, 24), 1) + 0.5)?, random(24, 2), random(24, 3), random((5, 24), 4));
        let form = |x: &Tensor| {
            let (w, b) = (w.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?);
            let c = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let deviation = (c.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
            c.broadcast_div(&deviation)?.broadcast_mul(&w)?.broadcast_add(&b)
        };
        let none = dy.zeros_like()?;
        gradients_hold([&layer_norm_backward(&x, &w, EPS, &dy, &none)?], [&x], &dy, |[x]| form(x), 1e-6)?;
        // what reaches x past the norm is a second use of x
        gradients_hold([&layer_norm_backward(&x, &w, EPS, &dy, &dy)?], [&x], &dy, |[x]| form(x)? + x, 1e-6)
    }
}
