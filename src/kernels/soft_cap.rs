//! Gemma's soft cap (Gemma Team 2024): `cap · tanh(x / cap)`, which keeps scores and logits within `±cap`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{
    host::{floats, matrix, operand_mut},
    special::tanh,
};

/// Elements that a task takes at once.
const BLOCK: usize = 1 << 13;

/// The cap of one number.
#[inline(always)]
pub fn capped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// The cap's derivative where its result is `y`: `1 − (y / cap)²`.
#[inline(always)]
pub fn slope_at(y: f32, cap: f32) -> f32 {
    let y = y / cap;
    1.0 - y * y
}

/// Caps `x[rows, columns]` in place.
pub fn soft_cap(x: Tensor, cap: f64) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.inplace_op1(&Cap { cap: cap as f32 })?;
        return Ok(x);
    }
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(&x) {
        return super::gpu::soft_cap::soft_cap(x, cap);
    }
    plain::soft_cap(&x, cap)
}

/// The derivative at every element, from the capped `y[rows, columns]`.
pub fn soft_cap_slope(y: &Tensor, cap: f64) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(y) {
        return super::gpu::soft_cap::soft_cap_slope(y, cap);
    }
    if !y.device().is_cpu() {
        return plain::soft_cap_slope(y, cap);
    }
    let ((rows, columns), y) = (y.dims2()?, floats(y)?);
    let mut slope = vec![0f32; rows * columns];
    slope.par_chunks_mut(BLOCK).zip(y.par_chunks(BLOCK)).for_each(|(slope, y)| {
        for (slope, y) in slope.iter_mut().zip(y) {
            *slope = slope_at(*y, cap as f32);
        }
    });
    matrix(slope, rows, columns)
}

struct Cap {
    cap: f32,
}

impl InplaceOp1 for Cap {
    fn name(&self) -> &'static str {
        "soft-cap"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        operand_mut(x, layout)?.par_chunks_mut(BLOCK).for_each(|x| {
            for x in x {
                *x = capped(*x, self.cap);
            }
        });
        Ok(())
    }
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
mod plain {
    use super::*;

    pub fn soft_cap(x: &Tensor, cap: f64) -> Result<Tensor> {
        (x / cap)?.tanh()? * cap
    }

    pub fn soft_cap_slope(y: &Tensor, cap: f64) -> Result<Tensor> {
        1.0 - (y / cap)?.sqr()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    #[test]
    fn kernel_equals_plain_tensors() -> Result<()> {
        // more than one block, and a rest
        for shape in [(1, 1), (3, BLOCK / 2 + 5)] {
            let x = (random(shape, 1) * 40.0)?;
            let (ours, theirs) = (soft_cap(x.copy()?, 15.0)?, plain::soft_cap(&x, 15.0)?);
            assert!(worst(&ours, &theirs) < 5e-6);
            assert!(worst(&soft_cap_slope(&ours, 15.0)?, &plain::soft_cap_slope(&theirs, 15.0)?) < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn slope_holds() -> Result<()> {
        let (x, dy) = ((random((5, 9), 1) * 20.0)?, random((5, 9), 2));
        let dx = (&dy * soft_cap_slope(&soft_cap(x.copy()?, 15.0)?, 15.0)?)?;
        gradients_hold([&dx], [&x], &dy, |[x]| (x / 15.0)?.tanh()? * 15.0, 1e-6)
    }
}
