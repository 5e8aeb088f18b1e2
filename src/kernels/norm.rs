//! RMSNorm (Zhang & Sennrich 2019) over the rows of `x[tokens, hidden]`, forward and backward.

use std::mem::MaybeUninit;

use candle_core::{D, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    host::{dot, filled, floats, matrix},
    profile::{Part, Timed},
    simd::multiversion,
};

/// Rows that a task takes at once.
const ROWS: usize = 8;

/// `y = x / sqrt(mean(x²) + eps) · w`.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::norm::rms_norm(x, w, eps);
    }
    if !x.device().is_cpu() {
        return plain::rms_norm(x, w, eps);
    }
    let (rows, hidden) = x.dims2()?;
    let (x, w) = (floats(x)?, floats(w)?);
    check(hidden, &w, &x, &[])?;
    let fill = |y: &mut [MaybeUninit<f32>]| {
        y.par_chunks_mut(ROWS * hidden).zip(x.par_chunks(ROWS * hidden)).for_each(|(y, x)| norm_rows(x, &w, eps, y));
    };
    // SAFETY: every row of x, which has as many elements, writes its row.
    matrix(unsafe { filled(rows * hidden, fill) }, rows, hidden)
}

/// The gradient that reaches `x` through the norm, plus `residual`, the gradient that reaches it past the norm.
///
/// With `s = 1 / sqrt(mean(x²) + eps)` and `g = dy · w`: `dx = s · (g − x · s² · mean(g · x))`.
pub fn rms_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::norm::rms_norm_backward(x, w, eps, dy, residual);
    }
    if !x.device().is_cpu() {
        return plain::rms_norm_backward(x, w, eps, dy, residual);
    }
    let (rows, hidden) = x.dims2()?;
    let (x, w, dy, residual) = (floats(x)?, floats(w)?, floats(dy)?, floats(residual)?);
    check(hidden, &w, &x, &[&dy, &residual])?;
    let fill = |dx: &mut [MaybeUninit<f32>]| {
        dx.par_chunks_mut(ROWS * hidden).enumerate().for_each(|(block, dx)| {
            let at = block * ROWS * hidden..block * ROWS * hidden + dx.len();
            norm_rows_backward(&x[at.clone()], &w, eps, &dy[at.clone()], &residual[at], dx);
        });
    };
    // SAFETY: every row of x, which has as many elements, writes its row.
    matrix(unsafe { filled(rows * hidden, fill) }, rows, hidden)
}

/// Rows of a weight for each of `hidden` columns, and others of the same size.
fn check(hidden: usize, w: &[f32], x: &[f32], others: &[&[f32]]) -> Result<()> {
    if w.len() != hidden || others.iter().any(|other| other.len() != x.len()) {
        bail!("norm: {} weights for {hidden} columns, or gradients of another size", w.len());
    }
    Ok(())
}

multiversion! {
    fn norm_rows(x: &[f32], w: &[f32], eps: f64, y: &mut [MaybeUninit<f32>]) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let scale = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                y.write(x * scale * w);
            }
        }
    }

    fn norm_rows_backward(
        x: &[f32],
        w: &[f32],
        eps: f64,
        dy: &[f32],
        residual: &[f32],
        dx: &mut [MaybeUninit<f32>],
    ) {
        let hidden = w.len();
        let rows = x.chunks_exact(hidden).zip(dy.chunks_exact(hidden)).zip(residual.chunks_exact(hidden));
        for (dx, ((x, dy), residual)) in dx.chunks_exact_mut(hidden).zip(rows) {
            let s = inverse_rms(x, eps);
            let mean = dot3(dy, w, x) / hidden as f32 * s * s * s;
            for ((dx, (dy, w)), (x, residual)) in dx.iter_mut().zip(dy.iter().zip(w)).zip(x.iter().zip(residual)) {
                dx.write(dy * w * s - x * mean + residual);
            }
        }
    }
}

/// Σ a·b·c, in the order of [`dot`].
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let ((a, a_rest), (b, b_rest), (c, c_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>(), c.as_chunks::<16>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for (sum, ((a, b), c)) in sums.iter_mut().zip(a.iter().zip(b).zip(c)) {
            *sum += a * b * c;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a * b * c).sum();
    sums.iter().sum::<f32>() + rest
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps as f32).sqrt()
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
mod plain {
    use super::*;

    pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
        candle_nn::ops::rms_norm(x, w, eps as f32)
    }

    pub fn rms_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let s = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.powf(-0.5)?;
        let g = dy.broadcast_mul(w)?;
        let mean = ((&g * x)?.mean_keepdim(D::Minus1)? * s.powf(3.0)?)?;
        residual + (g.broadcast_mul(&s)? - x.broadcast_mul(&mean)?)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    const EPS: f64 = 1e-3;

    fn form([x, w, residual]: [&Tensor; 3]) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean + EPS)?.sqrt()?)?.broadcast_mul(w)? + residual
    }

    #[test]
    fn kernel_equals_plain_tensors_forward_and_backward() -> Result<()> {
        for (rows, hidden) in [(1, 1), (3, 16), (9, 40), (50, 33)] {
            let (x, w) = (random((rows, hidden), 1), random(hidden, 2));
            let (dy, residual) = (random((rows, hidden), 3), random((rows, hidden), 4));
            assert!(worst(&rms_norm(&x, &w, EPS)?, &plain::rms_norm(&x, &w, EPS)?) < 2e-6);
            let ours = rms_norm_backward(&x, &w, EPS, &dy, &residual)?;
            assert!(worst(&ours, &plain::rms_norm_backward(&x, &w, EPS, &dy, &residual)?) < 1e-5, "{rows} {hidden}");
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        let (x, w, residual, dy) = (random((5, 24), 1), random(24, 2), random((5, 24), 3), random((5, 24), 4));
        // what reaches x past the norm is a second use of x: here a form that adds x itself
        let twice = |[x]: [&Tensor; 1]| form([x, &w.to_dtype(x.dtype())?, x]);
        gradients_hold([&rms_norm_backward(&x, &w, EPS, &dy, &dy)?], [&x], &dy, twice, 1e-6)?;
        let alone = |[x]: [&Tensor; 1]| form([x, &w.to_dtype(x.dtype())?, &residual.to_dtype(x.dtype())?]);
        let none = dy.zeros_like()?;
        gradients_hold([&rms_norm_backward(&x, &w, EPS, &dy, &none)?], [&x], &dy, alone, 1e-6)
    }
}
