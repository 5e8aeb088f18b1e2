//! Rotary positions on a GPU.

use candle_core::{Result, Tensor, bail};

use super::launch::{Launch, a_thread_each, run};
use crate::kernels::rope::{Pairing, Turn};

/// See [`crate::kernels::rope::rope`].
pub fn rope(x: Tensor, cos: &Tensor, sin: &Tensor, turn: Turn, back: bool) -> Result<Tensor> {
    let ((tokens, width), (rows, half)) = (x.dims2()?, cos.dims2()?);
    let Turn { dim, pairing } = turn;
    if rows != tokens || sin.dims() != cos.dims() || dim < 2 * half || !width.is_multiple_of(dim) {
        bail!("rope: x {:?} in heads of {dim} with angles {:?}", x.shape(), cos.shape());
    }
    let (heads, neighbours) = (width / dim, u32::from(pairing == Pairing::Neighbours));
    let n = tokens * heads * half;
    let sign = if back { -1f32 } else { 1.0 };
    let words = [n as u32, half as u32, dim as u32, heads as u32, neighbours, sign.to_bits()];
    run(&Launch { kernel: "rope", groups: a_thread_each(n), words: &words }, &[cos, sin], &[&x])?;
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::{super::host::on, *};
    use crate::kernels::{
        oracle::{random, worst},
        rope as cpu,
    };

    #[test]
    fn equals_the_cpus_both_ways() -> Result<()> {
        for (dim, pairing) in [
            (6, Pairing::Halves),
            (8, Pairing::Halves),
            (64, Pairing::Halves),
            (6, Pairing::Neighbours),
            (10, Pairing::Neighbours),
        ] {
            let turn = Turn { dim, pairing };
            let angles = (random((37, 3), 1) * 30.0)?;
            let (x, cos, sin) = (random((37, 3 * dim), 2), angles.cos()?, angles.sin()?);
            for back in [false, true] {
                on([&x, &cos, &sin], |[x_there, cos_there, sin_there]| {
                    let ours = rope(x_there.copy()?, cos_there, sin_there, turn, back)?;
                    assert!(worst(&ours, &cpu::rope(x.copy()?, &cos, &sin, turn, back)?) < 1e-6, "{turn:?} {back}");
                    Ok(())
                })?;
            }
        }
        assert!(
            rope(
                random((7, 10), 4),
                &random((7, 3), 1),
                &random((7, 3), 1),
                Turn { dim: 8, pairing: Pairing::Halves },
                false
            )
            .is_err()
        );
        Ok(())
    }
}
