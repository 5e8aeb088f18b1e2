//! Rotary positions (Su et al. 2021) as Llama turns them: the first half of a head's coordinates with the second.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{operand, operand_mut};

/// Turns every head of `x[tokens, heads · head_dim]` in place by the angles whose cosines and sines
/// `cos`, `sin` `[tokens, head_dim / 2]` give. With `back` it turns the other way, which is the backward pass.
pub fn rope(x: Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Tensor> {
    if x.device().is_cpu() {
        x.inplace_op3(cos, sin, &Turn { back })?;
        return Ok(x);
    }
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
        let (tokens, width) = x_layout.shape().dims2()?;
        let half = cos_layout.shape().dims2()?.1;
        if cos_layout.dims() != sin_layout.dims() || cos_layout.dims()[0] != tokens || width % (2 * half) != 0 {
            bail!("rope: x {:?} with angles {:?}", x_layout.shape(), cos_layout.shape());
        }
        let (cos, sin) = (operand(cos, cos_layout)?, operand(sin, sin_layout)?);
        let sign = if self.back { -1.0 } else { 1.0 };
        let angles = cos.par_chunks_exact(half).zip(sin.par_chunks_exact(half));
        operand_mut(x, x_layout)?.par_chunks_exact_mut(width).zip(angles).with_min_len(8).for_each(
            |(row, (cos, sin))| {
                for head in row.chunks_exact_mut(2 * half) {
                    let (first, second) = head.split_at_mut(half);
                    for i in 0..half {
                        let (a, b, sin) = (first[i], second[i], sign * sin[i]);
                        first[i] = a * cos[i] - b * sin;
                        second[i] = b * cos[i] + a * sin;
                    }
                }
            },
        );
        Ok(())
    }
}
