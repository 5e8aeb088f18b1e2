//! RMSNorm on a GPU.

use candle_core::{Result, Tensor};

use super::launch::{Launch, room, run};

/// See [`crate::kernels::norm::rms_norm`].
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let ((rows, hidden), y) = (x.dims2()?, room(x.shape(), x)?);
    let words = [hidden as u32, (eps as f32).to_bits()];
    run(&Launch { kernel: "rms_norm", groups: [rows, 1, 1], words: &words }, &[x, w], &[&y])?;
    Ok(y)
}

/// See [`crate::kernels::norm::rms_norm_backward`].
pub fn rms_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
    let ((rows, hidden), dx) = (x.dims2()?, room(x.shape(), x)?);
    let words = [hidden as u32, (eps as f32).to_bits()];
    let launch = Launch { kernel: "rms_norm_backward", groups: [rows, 1, 1], words: &words };
    run(&launch, &[x, w, dy, residual], &[&dx])?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::{super::host::on, *};
    use crate::kernels::{
        norm,
        oracle::{random, worst},
    };

    #[test]
    fn equals_the_cpus_forward_and_backward() -> Result<()> {
        for (rows, hidden) in [(1, 1), (3, 16), (2, 255), (9, 256), (5, 257), (4, 1000)] {
            let (x, w) = (random((rows, hidden), 1), random(hidden, 2));
            let (dy, residual) = (random((rows, hidden), 3), random((rows, hidden), 4));
            on([&x, &w, &dy, &residual], |[x_there, w_there, dy_there, residual_there]| {
                assert!(worst(&rms_norm(x_there, w_there, 1e-3)?, &norm::rms_norm(&x, &w, 1e-3)?) < 2e-6);
                let ours = rms_norm_backward(x_there, w_there, 1e-3, dy_there, residual_there)?;
                assert!(worst(&ours, &norm::rms_norm_backward(&x, &w, 1e-3, &dy, &residual)?) < 1e-5);
                Ok(())
            })?;
        }
        Ok(())
    }
}
