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
    use candle_core::Device;

    use super::{super::host::on, *};
    use crate::kernels::{
        oracle::{random, worst},
        soft_cap as cpu,
    };

    #[test]
    fn what_is_no_number_stays_none() -> Result<()> {
        let x = Tensor::new(&[[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN]], &Device::Cpu)?;
        on([&x], |[there]| {
            let capped = soft_cap(there.copy()?, 15.0)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(capped[0].is_nan() && capped[3].is_nan(), "{capped:?}");
            assert_eq!(capped[1..3], [15.0, -15.0]);
            Ok(())
        })
    }

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
