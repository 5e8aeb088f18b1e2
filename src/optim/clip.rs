//! The gradient's global norm and the factor that keeps it bounded, as `torch.nn.utils.clip_grad_norm_`.

use candle_core::{DType, Device, Storage, Tensor};
use rayon::prelude::*;

use super::elementwise::flat;
use crate::Result;
#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::kernels::gpu;

/// Elements a partial sum. Fixed, and the partial sums are added in order: the norm does not depend on the number of
/// threads.
const CHUNK: usize = 16 * 1024;

/// A step's gradient as an optimizer takes it.
#[derive(Debug, Clone, Copy)]
pub struct Gradient<'a> {
    /// `[n]`, f32, contiguous.
    pub values: &'a Tensor,
    /// Their [`global_norm`].
    pub norm: f64,
    /// What they are multiplied by before use: `max / (norm + 1e-6)`, at most 1.
    pub scale: f64,
}

impl<'a> Gradient<'a> {
    /// Measures the norm and clips it to `max`; 0 does not clip.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn clipped(values: &'a Tensor, max: f64) -> Result<Self> {
        let norm = global_norm(values)?;
        Ok(Self { values, norm, scale: clip_scale(norm, max) })
    }
}

/// The Euclidean norm of `grads` (`[n]`, f32, contiguous). On the CPU the sum is in f64; on other devices the partial
/// sums over `CHUNK` elements are in f32. Not finite where an element is not: check it before the step.
pub fn global_norm(grads: &Tensor) -> Result<f64> {
    let (storage, layout) = grads.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        #[cfg(any(feature = "cuda", feature = "metal"))]
        if gpu::serves(grads) {
            return Ok(gpu::optimizer::norm(grads)?);
        }
        return norm_by_tensors(grads);
    };
    let partial: Vec<f64> = flat(storage, layout)?
        .par_chunks(CHUNK)
        .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
        .collect();
    Ok(partial.iter().sum::<f64>().sqrt())
}

/// [`global_norm`] in plain tensor operations.
fn norm_by_tensors(grads: &Tensor) -> Result<f64> {
    let n = grads.elem_count();
    let whole = n - n % CHUNK;
    let mut sum = 0.0;
    for (start, rows, columns) in [(0, whole / CHUNK, CHUNK), (whole, 1, n - whole)] {
        if rows * columns > 0 {
            let squares = grads.narrow(0, start, rows * columns)?.reshape((rows, columns))?.sqr()?.sum(1)?;
            let partial = squares.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            sum += partial.iter().sum::<f64>();
        }
    }
    Ok(sum.sqrt())
}

/// What gradients of global norm `norm` are multiplied by: `max / (norm + 1e-6)`, at most 1; a `max` of 0 never clips.
fn clip_scale(norm: f64, max: f64) -> f64 {
    if max == 0.0 { 1.0 } else { (max / (norm + 1e-6)).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_the_same_at_any_number_of_threads_and_on_either_path() -> Result<()> {
        let values: Vec<f32> = (0..3 * CHUNK + 17).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect();
        let exact = values.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        let grads = Tensor::new(values, &Device::Cpu)?;
        let norms: Vec<f64> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                pool.install(|| global_norm(&grads))
            })
            .collect::<Result<_>>()?;
        assert!(norms.iter().all(|norm| norm.to_bits() == norms[0].to_bits()), "{norms:?}");
        assert!((norms[0] / exact - 1.0).abs() < 1e-12);
        assert!((norm_by_tensors(&grads)? / exact - 1.0).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn clipping_scales_down_and_never_up() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert_eq!(clip_scale(4.0, 0.0), 1.0);
        assert_eq!(clip_scale(4.0, 1.0), 1.0 / 4.000001);
    }
}
