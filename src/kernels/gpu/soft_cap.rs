//! The soft cap on a GPU.

use candle_core::{Result, Tensor};

use super::launch::{Launch, a_thread_each, room, run};

/// See [`crate::kernels::soft_cap::soft_cap`].
pub fn soft_cap(x: Tensor, cap: f64) -> Result<Tensor> {
    let n = x.elem_count();
    let words = [n as u32, (cap as f32).to_bits()];
    run(&Launch { kernel: "soft_cap", groups: a_thread_each(n), words: &words }, &[], &[&x])?;
    Ok(x)
}

/// See [`crate::kernels::soft_cap::soft_cap_slope`].
pub fn soft_cap_slope(y: &Tensor, cap: f64) -> Result<Tensor> {
    let (n, slope) = (y.elem_count(), room(y.shape(), y)?);
    let words = [n as u32, (cap as f32).to_bits()];
    run(&Launch { kernel: "soft_cap_slope", groups: a_thread_each(n), words: &words }, &[y], &[&slope])?;
    Ok(slope)
}

#[cfg(test)]
mod tests {
    use super::{super::host::on, *};
    use crate::kernels::{
        oracle::{random, worst},
        soft_cap as cpu,
    };

    #[test]
    fn equals_the_cpus() -> Result<()> {
        for shape in [(1, 1), (3, 257)] {
            let x = (random(shape, 1) * 400.0)?;
            on([&x], |[there]| {
                let (ours, theirs) = (soft_cap(there.copy()?, 15.0)?, cpu::soft_cap(x.copy()?, 15.0)?);
                assert!(worst(&ours, &theirs) < 5e-6);
                assert!(worst(&soft_cap_slope(&ours, 15.0)?, &cpu::soft_cap_slope(&theirs, 15.0)?) < 1e-6);
                Ok(())
            })?;
        }
        Ok(())
    }
}
