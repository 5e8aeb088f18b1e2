//! Rotary positions (Su et al. 2021): pairs of a head's coordinates turn by angles that grow with the position.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    host::{operand, operand_mut},
    profile::{Part, Timed},
    simd::multiversion,
};

/// Which coordinates of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// The first half of those that turn with the second, as Llama's do.
    Halves,
    /// Each with its neighbour, as GPT-J's do.
    Neighbours,
}

/// How a head turns: its first coordinates, as many as there are cosines and sines, do, the rest stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Coordinates a head.
    pub dim: usize,
    /// Which of them turn together.
    pub pairing: Pairing,
}

/// Turns every head of `x[tokens, heads · dim]` in place by the angles whose cosines and sines
/// `cos`, `sin` `[tokens, rotated / 2]` give. With `back` it turns the other way, which is the backward pass.
pub fn rope(x: Tensor, cos: &Tensor, sin: &Tensor, turn: Turn, back: bool) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    if x.device().is_cpu() {
        x.inplace_op3(cos, sin, &Rope { turn, back })?;
        return Ok(x);
    }
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(&x) {
        return super::gpu::rope::rope(x, cos, sin, turn, back);
    }
    plain(&x, cos, sin, turn, back)
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor, turn: Turn, back: bool) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let half = cos.dim(1)?;
    let heads = x.reshape((tokens, width / turn.dim, turn.dim))?;
    let turning = heads.narrow(2, 0, 2 * half)?;
    let (first, second) = match turn.pairing {
        Pairing::Halves => (turning.narrow(2, 0, half)?, turning.narrow(2, half, half)?),
        Pairing::Neighbours => {
            let pairs = turning.reshape((tokens, width / turn.dim, half, 2))?;
            (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?)
        }
    };
    let cos = cos.unsqueeze(1)?;
    let sin = if back { sin.neg()? } else { sin.clone() }.unsqueeze(1)?;
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    let turned = match turn.pairing {
        Pairing::Halves => Tensor::cat(&[turned_first, turned_second], 2)?,
        Pairing::Neighbours => Tensor::stack(&[turned_first, turned_second], 3)?.flatten_from(2)?,
    };
    let rest = heads.narrow(2, 2 * half, turn.dim - 2 * half)?;
    Tensor::cat(&[turned, rest], 2)?.reshape((tokens, width))
}

struct Rope {
    turn: Turn,
    back: bool,
}

impl InplaceOp3 for Rope {
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
        let Turn { dim, pairing } = self.turn;
        let fits = cos_layout.dims() == sin_layout.dims() && cos_layout.dims()[0] == tokens;
        if !fits || dim < 2 * half || !width.is_multiple_of(dim) {
            bail!("rope: x {:?} in heads of {dim} with angles {:?}", x_layout.shape(), cos_layout.shape());
        }
        let (cos, sin) = (operand(cos, cos_layout)?, operand(sin, sin_layout)?);
        let sign = if self.back { -1.0 } else { 1.0 };
        let angles = cos.par_chunks(ROWS * half).zip(sin.par_chunks(ROWS * half));
        let rows = operand_mut(x, x_layout)?.par_chunks_mut(ROWS * width).zip(angles);
        let turn_rows = match pairing {
            Pairing::Halves => turn_halves,
            Pairing::Neighbours => turn_neighbours,
        };
        rows.for_each(|(rows, (cos, sin))| turn_rows(rows, width, dim, half, cos, sin, sign));
        Ok(())
    }
}

/// Rows that a task takes at once.
const ROWS: usize = 16;

multiversion! {
    fn turn_halves(rows: &mut [f32], width: usize, dim: usize, half: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (row, (cos, sin)) in rows.chunks_exact_mut(width).zip(angles) {
            for head in row.chunks_exact_mut(dim) {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                    (*first, *second) = turned(*first, *second, *cos, sign * sin);
                }
            }
        }
    }

    fn turn_neighbours(rows: &mut [f32], width: usize, dim: usize, half: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (row, (cos, sin)) in rows.chunks_exact_mut(width).zip(angles) {
            for head in row.chunks_exact_mut(dim) {
                for (pair, (cos, sin)) in head[..2 * half].chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                    (pair[0], pair[1]) = turned(pair[0], pair[1], *cos, sign * sin);
                }
            }
        }
    }
}

#[inline(always)]
fn turned(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    /// Whole heads and heads that turn in part, of two heads each.
    const TURNS: [Turn; 4] = [
        Turn { dim: 6, pairing: Pairing::Halves },
        Turn { dim: 8, pairing: Pairing::Halves },
        Turn { dim: 6, pairing: Pairing::Neighbours },
        Turn { dim: 10, pairing: Pairing::Neighbours },
    ];

    /// `x[7, 2 · dim]` and the angles of six coordinates.
    fn inputs(turn: Turn) -> (Tensor, Tensor, Tensor) {
        let angles = (random((7, 3), 1) * 30.0).unwrap();
        (random((7, 2 * turn.dim), 2), angles.cos().unwrap(), angles.sin().unwrap())
    }

    #[test]
    fn kernel_equals_plain_tensors_both_ways() -> Result<()> {
        for turn in TURNS {
            let (x, cos, sin) = inputs(turn);
            for back in [false, true] {
                let ours = rope(x.copy()?, &cos, &sin, turn, back)?;
                assert!(worst(&ours, &plain(&x, &cos, &sin, turn, back)?) < 1e-6, "{turn:?}, back: {back}");
            }
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        for turn in TURNS {
            let (x, cos, sin) = inputs(turn);
            let dy = random((7, 2 * turn.dim), 3);
            // column by column, as the definition has it
            let form = |[x]: [&Tensor; 1]| {
                let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
                let column = |at: usize| x.narrow(1, at, 1);
                let mut columns = Vec::new();
                for at in 0..2 * turn.dim {
                    let (head, i) = (at / turn.dim * turn.dim, at % turn.dim);
                    let (angle, other, sign) = match turn.pairing {
                        _ if i >= 6 => {
                            columns.push(column(at)?);
                            continue;
                        }
                        Pairing::Halves => (i % 3, (i + 3) % 6, if i < 3 { -1.0 } else { 1.0 }),
                        Pairing::Neighbours => (i / 2, i ^ 1, if i % 2 == 0 { -1.0 } else { 1.0 }),
                    };
                    let across = ((column(head + other)? * sin.narrow(1, angle, 1)?)? * sign)?;
                    columns.push(((column(at)? * cos.narrow(1, angle, 1)?)? + across)?);
                }
                Tensor::cat(&columns, 1)
            };
            assert!(worst(&rope(x.copy()?, &cos, &sin, turn, false)?, &form([&x])?) < 1e-6);
            gradients_hold([&rope(dy.copy()?, &cos, &sin, turn, true)?], [&x], &dy, form, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (x, cos, sin) = inputs(TURNS[0]);
        assert!(rope(x.narrow(0, 0, 6).unwrap().copy().unwrap(), &cos, &sin, TURNS[0], false).is_err());
        assert!(rope(random((7, 10), 4), &cos, &sin, TURNS[0], false).is_err());
        assert!(rope(random((7, 8), 4), &cos, &sin, Turn { dim: 4, ..TURNS[0] }, false).is_err());
    }
}
