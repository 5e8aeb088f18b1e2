//! Dropout (Srivastava et al. 2014) whose mask is a function of a key, so that the backward pass can draw it again.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::host::matrix;
use crate::random::Stream;

/// What decides which elements of `x[tokens, width]` are dropped.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Probability that an element is dropped.
    pub p: f64,
    /// The random numbers of this step.
    pub stream: Stream,
    /// The number of `x`'s first row within the step, so that the cut into micro-batches does not matter.
    pub first_row: u64,
}

impl Dropout {
    /// `x`, an element being 0 with probability `p` and else divided by `1 − p`, as layer `linear` sees it.
    ///
    /// The gradient goes through the same function.
    pub fn apply(&self, x: &Tensor, linear: usize) -> Result<Tensor> {
        x * self.mask(x, linear)?
    }

    fn mask(&self, x: &Tensor, linear: usize) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let (stream, keep) = (self.stream.at(linear as u64), (1.0 / (1.0 - self.p)) as f32);
        let mut mask = vec![0f32; rows * width];
        mask.par_chunks_mut(width).enumerate().for_each(|(row, mask)| {
            let stream = stream.at(self.first_row + row as u64);
            for (i, element) in mask.iter_mut().enumerate() {
                *element = if stream.uniform(i as u64) < self.p { 0.0 } else { keep };
            }
        });
        matrix(mask, rows, width)?.to_device(x.device())
    }
}
