//! Dropout (Srivastava et al. 2014) whose mask is a function of a key, so that the backward pass can draw it again.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{
    host::matrix,
    profile::{Part, Timed},
};
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
        let _timed = Timed::start(Part::Elementwise);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{random, worst};

    fn dropout(p: f64, first_row: u64) -> Dropout {
        Dropout { p, stream: Stream::new(5, "dropout"), first_row }
    }

    #[test]
    fn a_share_p_is_dropped_and_the_mean_stays() -> Result<()> {
        for p in [0.0, 0.1, 0.5, 0.9] {
            let ones = random((100, 400), 1).ones_like()?;
            let kept: Vec<f32> = dropout(p, 0).apply(&ones, 3)?.flatten_all()?.to_vec1()?;
            let zeros = kept.iter().filter(|x| **x == 0.0).count() as f64 / 40_000.0;
            // the share's standard deviation is at most 0.0025
            assert!((zeros - p).abs() < 0.0125, "{p}: {zeros}");
            let whole = (1.0 / (1.0 - p)) as f32;
            assert!(kept.iter().all(|x| *x == 0.0 || *x == whole), "{p}");
        }
        Ok(())
    }

    #[test]
    fn the_cut_into_micro_batches_does_not_matter() -> Result<()> {
        let x = random((12, 20), 2);
        let whole = dropout(0.4, 0).apply(&x, 1)?;
        let tail = dropout(0.4, 7).apply(&x.narrow(0, 7, 5)?.contiguous()?, 1)?;
        assert_eq!(worst(&whole.narrow(0, 7, 5)?, &tail), 0.0);
        Ok(())
    }

    #[test]
    fn layers_rows_and_steps_have_masks_of_their_own() -> Result<()> {
        let ones = random((1, 64), 1).ones_like()?;
        let step = |step: u64| Dropout { stream: Stream::new(5, "dropout").at(step), ..dropout(0.5, 0) };
        let masks = [
            dropout(0.5, 0).apply(&ones, 1)?,
            dropout(0.5, 0).apply(&ones, 2)?,
            dropout(0.5, 1).apply(&ones, 1)?,
            step(0).apply(&ones, 1)?,
            step(1).apply(&ones, 1)?,
        ];
        for (i, one) in masks.iter().enumerate() {
            assert!(masks[..i].iter().all(|other| worst(one, other) > 0.0), "mask {i} is another's");
        }
        Ok(())
    }
}
