//! The sum of two tensors on all cores: candle's is made by one.

use std::mem::MaybeUninit;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    host::{filled, floats, matrix},
    profile::{Part, Timed},
    simd::multiversion,
};

/// Elements that a task takes at once.
const BLOCK: usize = 1 << 13;

/// `a + b`, both `[rows, columns]`.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a + b;
    }
    let _timed = Timed::start(Part::Elementwise);
    let (rows, columns) = a.dims2()?;
    if b.dims() != [rows, columns] {
        bail!("a sum of {:?} and {:?}", a.shape(), b.shape());
    }
    let (a, b) = (floats(a)?, floats(b)?);
    let fill = |sum: &mut [MaybeUninit<f32>]| {
        let inputs = a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK));
        sum.par_chunks_mut(BLOCK).zip(inputs).for_each(|(sum, (a, b))| block(a, b, sum));
    };
    // SAFETY: both have as many elements, and a block writes one for each pair.
    matrix(unsafe { filled(rows * columns, fill) }, rows, columns)
}

multiversion! {
    fn block(a: &[f32], b: &[f32], sum: &mut [MaybeUninit<f32>]) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            sum.write(a + b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{random, worst};

    #[test]
    fn kernel_equals_plain_tensors() -> Result<()> {
        for (rows, columns) in [(1, 1), (3, 7), (100, 300)] {
            let (a, b) = (random((rows, columns), 1), random((rows, columns), 2));
            assert_eq!(worst(&add(&a, &b)?, &(&a + &b)?), 0.0);
        }
        assert!(add(&random((2, 3), 1), &random((3, 2), 2)).is_err());
        Ok(())
    }
}
