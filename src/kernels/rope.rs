//! Rotary positions (Su et al. 2021) as Llama turns them: the first half of a head's coordinates with the second.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    host::{operand, operand_mut},
    profile::{Part, Timed},
    simd::multiversion,
};

/// Turns every head of `x[tokens, heads · head_dim]` in place by the angles whose cosines and sines
/// `cos`, `sin` `[tokens, head_dim / 2]` give. With `back` it turns the other way, which is the backward pass.
pub fn rope(x: Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.inplace_op3(cos, sin, &Turn { back })?;
        return Ok(x);
    }
    plain(&x, cos, sin, back)
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let half = cos.dim(1)?;
    let heads = x.reshape((tokens, width / half / 2, 2, half))?;
    let (first, second) = (heads.narrow(2, 0, 1)?, heads.narrow(2, 1, 1)?);
    let cos = cos.reshape((tokens, 1, 1, half))?;
    let sin = if back { sin.neg()? } else { sin.clone() }.reshape((tokens, 1, 1, half))?;
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_first, turned_second], 2)?.reshape((tokens, width))
}

struct Turn {
    back: bool,
}

impl InplaceOp3 for Turn {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<()> {
        let _timed = Timed::start(Part::Elementwise);
        let (tokens, width) = x_layout.shape().dims2()?;
        let half = cos_layout.shape().dims2()?.1;
        if cos_layout.dims() != sin_layout.dims() || cos_layout.dims()[0] != tokens || width % (2 * half) != 0 {
            bail!("rope: x {:?} with angles {:?}", x_layout.shape(), cos_layout.shape());
        }
        let (cos, sin) = (operand(cos, cos_layout)?, operand(sin, sin_layout)?);
        let sign = if self.back { -1.0 } else { 1.0 };
        let angles = cos.par_chunks(ROWS * half).zip(sin.par_chunks(ROWS * half));
        operand_mut(x, x_layout)?
            .par_chunks_mut(ROWS * width)
            .zip(angles)
            .for_each(|(rows, (cos, sin))| turn(rows, width, cos, sin, half, sign));
        Ok(())
    }
}

/// Rows that a task takes at once.
const ROWS: usize = 16;

multiversion! {
    fn turn(rows: &mut [f32], width: usize, cos: &[f32], sin: &[f32], half: usize, sign: f32) {
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (row, (cos, sin)) in rows.chunks_exact_mut(width).zip(angles) {
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                    let (a, b, sin) = (*first, *second, sign * sin);
                    *first = a * cos - b * sin;
                    *second = b * cos + a * sin;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    /// `x[7, 2 · 6]` and its angles.
    fn inputs() -> (Tensor, Tensor, Tensor) {
        let angles = (random((7, 3), 1) * 30.0).unwrap();
        (random((7, 12), 2), angles.cos().unwrap(), angles.sin().unwrap())
    }

    #[test]
    fn kernel_equals_plain_tensors_both_ways() -> Result<()> {
        let (x, cos, sin) = inputs();
        for back in [false, true] {
            assert!(worst(&rope(x.copy()?, &cos, &sin, back)?, &plain(&x, &cos, &sin, back)?) < 1e-6, "back: {back}");
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        let (x, cos, sin) = inputs();
        let dy = random((7, 12), 3);
        let form = |[x]: [&Tensor; 1]| {
            let (cos, sin) = (cos.to_dtype(x.dtype())?.unsqueeze(1)?, sin.to_dtype(x.dtype())?.unsqueeze(1)?);
            let heads = x.reshape((7, 2, 6))?;
            let (first, second) = (heads.narrow(2, 0, 3)?, heads.narrow(2, 3, 3)?);
            let turned = [
                (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
                (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
            ];
            Tensor::cat(&turned, 2)?.reshape((7, 12))
        };
        assert!(worst(&rope(x.copy()?, &cos, &sin, false)?, &form([&x])?) < 1e-6);
        gradients_hold([&rope(dy.copy()?, &cos, &sin, true)?], [&x], &dy, form, 1e-6)
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (x, cos, sin) = inputs();
        assert!(rope(x.narrow(0, 0, 6).unwrap().copy().unwrap(), &cos, &sin, false).is_err());
        assert!(rope(random((7, 10), 4), &cos, &sin, false).is_err());
    }
}
