//! Activations and gates on a GPU.

use candle_core::{Result, Tensor};

use super::launch::{Launch, a_thread_each, room, run};
use crate::kernels::activation::Activation;

fn launch(kernel: &'static str, f: Activation, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    let form = match f {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    };
    let n = inputs[0].elem_count();
    run(&Launch { kernel, groups: a_thread_each(n), words: &[n as u32, form] }, inputs, outputs)
}

/// See [`crate::kernels::activation::gated`].
pub fn gated(f: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = room(gate.shape(), gate)?;
    launch("gated", f, &[gate, up], &[&y])?;
    Ok(y)
}

/// See [`crate::kernels::activation::gated_backward`].
pub fn gated_backward(f: Activation, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (dgate, dup) = (room(gate.shape(), gate)?, room(gate.shape(), gate)?);
    launch("gated_backward", f, &[gate, up, dy], &[&dgate, &dup])?;
    Ok((dgate, dup))
}

/// See [`crate::kernels::activation::apply`].
pub fn apply(f: Activation, x: &Tensor) -> Result<Tensor> {
    let y = room(x.shape(), x)?;
    launch("activation", f, &[x], &[&y])?;
    Ok(y)
}

/// See [`crate::kernels::activation::backward`].
pub fn backward(f: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dx = room(x.shape(), x)?;
    launch("activation_backward", f, &[x, dy], &[&dx])?;
    Ok(dx)
}

#[cfg(test)]
mod tests {
    use super::{super::host::on, *};
    use crate::kernels::{
        activation as cpu,
        oracle::{random, worst},
    };

    #[test]
    fn equal_the_cpus_forward_and_backward() -> Result<()> {
        for shape in [(1, 1), (3, 255), (5, 1031)] {
            let (x, up, dy) = ((random(shape, 1) * 9.0)?, random(shape, 2), random(shape, 3));
            for f in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
                on([&x, &up, &dy], |[x_there, up_there, dy_there]| {
                    assert!(worst(&apply(f, x_there)?, &cpu::apply(f, &x)?) < 5e-6, "{f:?}");
                    assert!(worst(&backward(f, x_there, dy_there)?, &cpu::backward(f, &x, &dy)?) < 5e-6, "{f:?}");
                    assert!(worst(&gated(f, x_there, up_there)?, &cpu::gated(f, &x, &up)?) < 5e-6, "{f:?}");
                    let (ours, theirs) =
                        (gated_backward(f, x_there, up_there, dy_there)?, cpu::gated_backward(f, &x, &up, &dy)?);
                    assert!(worst(&ours.0, &theirs.0) < 5e-6 && worst(&ours.1, &theirs.1) < 5e-6, "{f:?}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}
