//! What stands between the matrices of an MLP: `f(gate) · up` or `f(x)` alone, forward and backward, for SiLU and both
//! forms of GELU (Hendrycks & Gimpel 2016).

use std::f32::consts::FRAC_1_SQRT_2;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    gate::{swiglu, swiglu_backward},
    host::{floats, matrix},
    profile::{Part, Timed},
    special::{erf, exp, tanh},
};

/// Elements that a task takes at once.
const BLOCK: usize = 1 << 13;
/// `sqrt(2 / π)`.
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// `1 / sqrt(2π)`.
const DENSITY_AT_0: f32 = 0.398_942_3;
/// Of the cube in the tanh form.
const CUBE: f32 = 0.044_715;

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`, by erf.
    Gelu,
    /// The same with a tanh for Φ, as GPT-2 and Gemma compute it.
    GeluTanh,
}

/// `f(gate) · up`, element by element.
pub fn gated(f: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(gate) {
        return super::gpu::activation::gated(f, gate, up);
    }
    match f {
        Activation::Silu => swiglu(gate, up),
        _ if !gate.device().is_cpu() => plain::apply(f, gate)? * up,
        Activation::Gelu => map2(gate, up, |gate, up| gelu(gate).0 * up),
        Activation::GeluTanh => map2(gate, up, |gate, up| gelu_tanh(gate).0 * up),
    }
}

/// `(dgate, dup)` from the gradient `dy` of `f(gate) · up`.
pub fn gated_backward(f: Activation, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(gate) {
        return super::gpu::activation::gated_backward(f, gate, up, dy);
    }
    match f {
        Activation::Silu => swiglu_backward(gate, up, dy),
        _ if !gate.device().is_cpu() => Ok((((dy * up)? * plain::slope(f, gate)?)?, (dy * plain::apply(f, gate)?)?)),
        Activation::Gelu => gated_slopes(gate, up, dy, gelu),
        Activation::GeluTanh => gated_slopes(gate, up, dy, gelu_tanh),
    }
}

/// `f(x)`, element by element.
pub fn apply(f: Activation, x: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::activation::apply(f, x);
    }
    match f {
        _ if !x.device().is_cpu() => plain::apply(f, x),
        Activation::Silu => map2(x, x, |x, _| silu(x).0),
        Activation::Gelu => map2(x, x, |x, _| gelu(x).0),
        Activation::GeluTanh => map2(x, x, |x, _| gelu_tanh(x).0),
    }
}

/// The gradient of `x` from that of `f(x)`.
pub fn backward(f: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let _timed = Timed::start(Part::Elementwise);
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(x) {
        return super::gpu::activation::backward(f, x, dy);
    }
    match f {
        _ if !x.device().is_cpu() => dy * plain::slope(f, x)?,
        Activation::Silu => map2(x, dy, |x, dy| silu(x).1 * dy),
        Activation::Gelu => map2(x, dy, |x, dy| gelu(x).1 * dy),
        Activation::GeluTanh => map2(x, dy, |x, dy| gelu_tanh(x).1 * dy),
    }
}

/// Value and derivative: with `s = sigmoid(x)`, `s · (1 + x · (1 − s))`.
fn silu(x: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-x));
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Value and derivative: `Φ(x) + x · φ(x)`.
fn gelu(x: f32) -> (f32, f32) {
    let probability = 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2));
    (x * probability, probability + x * DENSITY_AT_0 * exp(-0.5 * x * x))
}

/// Value and derivative: with `t = tanh(u)`, `(1 + t) / 2 + x / 2 · (1 − t²) · du/dx`.
fn gelu_tanh(x: f32) -> (f32, f32) {
    let t = tanh(SQRT_2_OVER_PI * (x + CUBE * x * x * x));
    let du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBE * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du)
}

fn map2(a: &Tensor, b: &Tensor, of: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
    let ((rows, columns), a, b) = (a.dims2()?, floats(a)?, floats(b)?);
    let mut y = vec![0f32; rows * columns];
    y.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK)).zip(b.par_chunks(BLOCK)).for_each(|((y, a), b)| {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = of(*a, *b);
        }
    });
    matrix(y, rows, columns)
}

fn gated_slopes(
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    of: impl Fn(f32) -> (f32, f32) + Sync,
) -> Result<(Tensor, Tensor)> {
    let ((rows, columns), gate, up, dy) = (gate.dims2()?, floats(gate)?, floats(up)?, floats(dy)?);
    let (mut dgate, mut dup) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
    let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK));
    dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK)).zip(inputs).for_each(
        |((dgate, dup), ((gate, up), dy))| {
            for i in 0..gate.len() {
                let (value, slope) = of(gate[i]);
                dup[i] = dy[i] * value;
                dgate[i] = dy[i] * up[i] * slope;
            }
        },
    );
    Ok((matrix(dgate, rows, columns)?, matrix(dup, rows, columns)?))
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
mod plain {
    use super::*;

    pub fn apply(f: Activation, x: &Tensor) -> Result<Tensor> {
        match f {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
        }
    }

    pub fn slope(f: Activation, x: &Tensor) -> Result<Tensor> {
        match f {
            Activation::Silu => {
                let s = candle_nn::ops::sigmoid(x)?;
                let rest = ((x * (1.0 - &s)?)? + 1.0)?;
                s * rest
            }
            Activation::Gelu => {
                let probability = (((x * f64::from(FRAC_1_SQRT_2))?.erf()? + 1.0)? * 0.5)?;
                let density = ((x.sqr()? * -0.5)?.exp()? * f64::from(DENSITY_AT_0))?;
                probability + (x * density)?
            }
            Activation::GeluTanh => {
                let square = (x.sqr()? * f64::from(CUBE))?;
                let t = ((x * (&square + 1.0)?)? * f64::from(SQRT_2_OVER_PI))?.tanh()?;
                let du = (((square * 3.0)? + 1.0)? * f64::from(SQRT_2_OVER_PI))?;
                let inner = ((x * (1.0 - t.sqr()?)?)? * du)?;
                ((t + 1.0)? + inner)? * 0.5
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    const ALL: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];

    /// In operations that candle can differentiate.
    fn form(f: Activation, x: &Tensor) -> Result<Tensor> {
        match f {
            Activation::Silu => x.silu(),
            Activation::Gelu => (x * 0.5)? * ((x / 2f64.sqrt())?.erf()? + 1.0)?,
            Activation::GeluTanh => {
                let u = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                (x * 0.5)? * (u.tanh()? + 1.0)?
            }
        }
    }

    #[test]
    fn kernel_equals_plain_tensors_forward_and_backward() -> Result<()> {
        // more than one block, and a rest
        for shape in [(1, 1), (3, BLOCK / 2 + 5)] {
            let (x, up, dy) = ((random(shape, 1) * 9.0)?, random(shape, 2), random(shape, 3));
            for f in ALL {
                let (value, slope) = (plain::apply(f, &x)?, plain::slope(f, &x)?);
                assert!(worst(&apply(f, &x)?, &value) < 5e-6, "{f:?}");
                assert!(worst(&backward(f, &x, &dy)?, &(&dy * &slope)?) < 5e-6, "{f:?}");
                assert!(worst(&gated(f, &x, &up)?, &(&value * &up)?) < 5e-6, "{f:?}");
                let (dgate, dup) = gated_backward(f, &x, &up, &dy)?;
                assert!(worst(&dgate, &((&dy * &up)? * &slope)?) < 5e-6, "{f:?}");
                assert!(worst(&dup, &(&dy * &value)?) < 5e-6, "{f:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn backward_holds() -> Result<()> {
        let (x, up, dy) = ((random((4, 10), 1) * 5.0)?, random((4, 10), 2), random((4, 10), 3));
        for f in ALL {
            gradients_hold([&backward(f, &x, &dy)?], [&x], &dy, |[x]| form(f, x), 1e-6)?;
            let (dx, dup) = gated_backward(f, &x, &up, &dy)?;
            gradients_hold([&dx, &dup], [&x, &up], &dy, |[x, up]| form(f, x)? * up, 1e-6)?;
        }
        Ok(())
    }
}
