//! The gate of a SwiGLU block (Shazeer 2020): `silu(gate) · up`, forward and backward.

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    host::{filled, floats, matrix},
    profile::{Part, Timed},
    simd::multiversion,
    special::exp,
};

/// Elements that a task takes at once.
const BLOCK: usize = 1 << 13;

/// `silu(gate) · up`, element by element.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(gate) {
        return super::gpu::activation::gated(super::activation::Activation::Silu, gate, up);
    }
    if !gate.device().is_cpu() {
        return plain::swiglu(gate, up);
    }
    let (rows, columns) = gate.dims2()?;
    let (gate, up) = (floats(gate)?, floats(up)?);
    check(&gate, &[&up])?;
    let fill = |y: &mut [MaybeUninit<f32>]| {
        let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK));
        y.par_chunks_mut(BLOCK).zip(inputs).for_each(|(y, (gate, up))| block(gate, up, y));
    };
    // SAFETY: the inputs have as many elements, and a block writes one for each.
    matrix(unsafe { filled(rows * columns, fill) }, rows, columns)
}

/// `(dgate, dup)` from the gradient `dy` of the product.
///
/// With `s = sigmoid(gate)`: `dup = dy · gate · s`, `dgate = dy · up · s · (1 + gate · (1 − s))`.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(gate) {
        return super::gpu::activation::gated_backward(super::activation::Activation::Silu, gate, up, dy);
    }
    if !gate.device().is_cpu() {
        return plain::swiglu_backward(gate, up, dy);
    }
    let (rows, columns) = gate.dims2()?;
    let (gate, up, dy) = (floats(gate)?, floats(up)?, floats(dy)?);
    check(&gate, &[&up, &dy])?;
    let mut dup = Vec::new();
    let fill = |dgate: &mut [MaybeUninit<f32>]| {
        let fill = |dup: &mut [MaybeUninit<f32>]| {
            let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK));
            let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
            outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dy))| block_backward(gate, up, dy, dgate, dup));
        };
        // SAFETY: as below.
        dup = unsafe { filled(rows * columns, fill) };
    };
    // SAFETY: the inputs have as many elements, and a block writes one of each result for each.
    let dgate = unsafe { filled(rows * columns, fill) };
    Ok((matrix(dgate, rows, columns)?, matrix(dup, rows, columns)?))
}

/// All of one length.
fn check(one: &[f32], others: &[&[f32]]) -> Result<()> {
    if others.iter().any(|other| other.len() != one.len()) {
        bail!("gate: {} elements beside {:?}", one.len(), others.iter().map(|other| other.len()).collect::<Vec<_>>());
    }
    Ok(())
}

multiversion! {
    fn block(gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            y.write(gate * sigmoid(*gate) * up);
        }
    }

    fn block_backward(
        gate: &[f32],
        up: &[f32],
        dy: &[f32],
        dgate: &mut [MaybeUninit<f32>],
        dup: &mut [MaybeUninit<f32>],
    ) {
        let inputs = gate.iter().zip(up).zip(dy);
        for ((dgate, dup), ((gate, up), dy)) in dgate.iter_mut().zip(dup).zip(inputs) {
            let s = sigmoid(*gate);
            dup.write(dy * gate * s);
            dgate.write(dy * up * s * (1.0 + gate * (1.0 - s)));
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
mod plain {
    use super::*;

    pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        gate.silu()? * up
    }

    pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let s = candle_nn::ops::sigmoid(gate)?;
        let dup = ((dy * gate)? * &s)?;
        let slope = (gate * (1.0 - &s)?)? + 1.0;
        Ok((((dy * up)? * (s * slope?)?)?, dup))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    #[test]
    fn kernel_equals_plain_tensors_forward_and_backward() -> Result<()> {
        // more than one block, and a rest
        for shape in [(1, 1), (3, BLOCK / 2 + 5)] {
            let (gate, up, dy) = ((random(shape, 1) * 9.0)?, random(shape, 2), random(shape, 3));
            assert!(worst(&swiglu(&gate, &up)?, &plain::swiglu(&gate, &up)?) < 5e-6);
            let (ours, theirs) = (swiglu_backward(&gate, &up, &dy)?, plain::swiglu_backward(&gate, &up, &dy)?);
            assert!(worst(&ours.0, &theirs.0) < 5e-6 && worst(&ours.1, &theirs.1) < 5e-6);
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        let (gate, up, dy) = ((random((4, 10), 1) * 5.0)?, random((4, 10), 2), random((4, 10), 3));
        let (dgate, dup) = swiglu_backward(&gate, &up, &dy)?;
        gradients_hold([&dgate, &dup], [&gate, &up], &dy, |[gate, up]| gate.silu()? * up, 1e-6)
    }
}
