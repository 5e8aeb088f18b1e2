//! The optimizers' kernels for GPUs against the CPU's loops.

use super::*;
use crate::kernels::{
    gpu::{self, launch::launched},
    oracle::{random, worst},
};

#[test]
fn gpu_kernels_take_the_same_steps_in_one_launch_each() -> Result<()> {
    // more than one threadgroup, and a rest
    for n in [1, 257, 3000] {
        let numbers = |seed: u64| random(n, seed);
        let grads: Vec<Tensor> = (0..4).map(|step| numbers(10 + step)).collect();
        gpu::on([&numbers(1)], |[start]| {
            let there_of = |grads: &Tensor| grads.to_device(start.device());
            for (betas, decay) in [([0.9, 0.98], 0.1), ([0.3, 0.5], 0.0)] {
                let mut there = AdamW::new(start, betas, decay).unwrap();
                let mut here = AdamW::new(&numbers(1), betas, decay).unwrap();
                let (params_there, params) = (start.copy()?, numbers(1));
                launched();
                for grads in &grads {
                    let grads_there = there_of(grads)?;
                    let gradient =
                        Gradient { norm: gpu::optimizer::norm(&grads_there)?, values: &grads_there, scale: 0.7 };
                    assert!(there.gpu_step(&params_there, gradient, 1e-2).unwrap());
                    assert!(here.step(&params, scaled(grads, 0.7).unwrap(), 1e-2).unwrap());
                }
                // of the first step nothing is known
                let steps = ["squares", "adam_step"];
                assert_eq!(launched(), [&["squares", "adam_check", "adam_step"][..], &steps, &steps, &steps].concat());
                assert!(worst(&params_there, &params) < 1e-6, "{n}: {}", worst(&params_there, &params));
                assert!(worst(&there.exp_avg, &here.exp_avg) < 1e-6);
                assert!(worst(&there.exp_avg_sq, &here.exp_avg_sq) < 1e-6);
                assert_eq!(there.step, here.step);
            }
            let (mut there, mut here) = (Rmsprop::new(start, 0.1).unwrap(), Rmsprop::new(&numbers(1), 0.1).unwrap());
            let (params_there, params) = (start.copy()?, numbers(1));
            launched();
            for grads in &grads {
                let gradient = scaled(grads, 0.7).unwrap();
                let there_too = Gradient { values: &there_of(grads)?, ..gradient };
                assert!(there.gpu_step(&params_there, there_too, 1e-3).unwrap());
                assert!(here.step(&params, gradient, 1e-3).unwrap());
            }
            assert_eq!(launched(), ["rmsprop_check", "rmsprop_step", "rmsprop_step", "rmsprop_step", "rmsprop_step"]);
            assert!(worst(&params_there, &params) < 1e-6, "{n}: {}", worst(&params_there, &params));
            assert!(worst(&there.square_avg, &here.square_avg) < 1e-6);
            let norm = gpu::optimizer::norm(start)?;
            assert!((norm / global_norm(&numbers(1)).unwrap() - 1.0).abs() < 1e-6);
            Ok(())
        })?;
    }
    Ok(())
}

/// What an optimizer answers, and whether it left everything as it was.
type Outcome = (bool, bool);

fn outcome(optimizer: &mut Optimizer, params: &Tensor, gradient: Gradient, lr: f64, on_gpu: bool) -> Result<Outcome> {
    let all = |optimizer: &Optimizer| -> Result<Vec<Vec<u32>>> {
        let tensors = optimizer.state().1.into_iter().map(|(_, moment)| moment).chain([params.clone()]);
        let bits = |tensor: Tensor| Ok(tensor.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect());
        tensors.map(bits).collect()
    };
    let (before, steps) = (all(optimizer)?, optimizer.state().0);
    let taken = match (&mut *optimizer, on_gpu) {
        (Optimizer::AdamW(it), true) => it.gpu_step(params, gradient, lr)?,
        (Optimizer::Rmsprop(it), true) => it.gpu_step(params, gradient, lr)?,
        (it, false) => it.step(params, gradient, lr)?,
    };
    Ok((taken, all(optimizer)? == before && optimizer.state().0 == steps))
}

#[test]
fn gpu_kernels_refuse_exactly_the_steps_that_the_cpu_refuses() -> Result<()> {
    let start = random(700, 1);
    let ordinary = random(700, 2);
    let with = |bad: f32| -> Result<Tensor> {
        let mut grads = vec![0.5f32; 700];
        grads[641] = bad;
        Ok(Tensor::new(grads, &Device::Cpu)?)
    };
    // what is at fault, if anything: the gradient, its square, the rate, the rate times the decay
    let cases = [
        (f32::NAN, 1e-3, 0.0),
        (f32::INFINITY, 1e-3, 0.0),
        (3e38, 1e-3, 0.0),
        (1e30, 1e-3, 0.0),
        (1e18, 1e-3, 0.1),
        (1e15, 1e20, 0.0),
        (0.1, 1e300, 0.0),
        (0.1, 1e38, 1e10),
        (0.1, 1e37, 0.0),
        (0.1, 1e-3, 0.1),
    ];
    let (mut refused, mut taken) = (0, 0);
    for (bad, lr, decay) in cases {
        let bad_grads = with(bad)?;
        for adamw in [true, false] {
            // at the first step, and when something is known of the numbers
            for first in [true, false] {
                let made = |params: &Tensor| -> Result<Optimizer> {
                    Ok(match adamw {
                        true => Optimizer::AdamW(AdamW::new(params, [0.9, 0.999], decay)?),
                        false => Optimizer::Rmsprop(Rmsprop::new(params, decay)?),
                    })
                };
                let steps = |params: &Tensor, on_gpu: bool| -> Result<Vec<Outcome>> {
                    let mut optimizer = made(params)?;
                    let mut outcomes = Vec::new();
                    let ordinary = ordinary.to_device(params.device())?;
                    let bad_grads = bad_grads.to_device(params.device())?;
                    let norms = [global_norm(&ordinary)?, global_norm(&bad_grads)?];
                    let [ordinary, bad] = [(&ordinary, norms[0]), (&bad_grads, norms[1])]
                        .map(|(values, norm)| Gradient { values, norm, scale: 0.5 });
                    if !first {
                        outcomes.push(outcome(&mut optimizer, params, ordinary, 1e-3, on_gpu)?);
                    }
                    outcomes.push(outcome(&mut optimizer, params, bad, lr, on_gpu)?);
                    outcomes.push(outcome(&mut optimizer, params, ordinary, 1e-3, on_gpu)?);
                    Ok(outcomes)
                };
                let here = steps(&start.copy()?, false)?;
                refused += here.iter().filter(|(taken, _)| !taken).count();
                taken += here.iter().filter(|(taken, _)| *taken).count();
                assert!(here.iter().all(|(taken, same)| taken != same));
                gpu::on([&start], |[there]| {
                    let there = steps(&there.copy()?, true).unwrap();
                    assert_eq!(there, here, "adamw {adamw}, first {first}, {bad}, rate {lr}, decay {decay}");
                    Ok(())
                })?;
            }
        }
    }
    assert!(refused > 20 && taken > 60, "{refused} {taken}");
    Ok(())
}

#[test]
fn a_loaded_state_is_looked_at_anew() -> Result<()> {
    let (start, grads) = (random(300, 1), random(300, 2));
    gpu::on([&start, &grads], |[start, grads]| {
        let params = start.copy()?;
        let mut optimizer = Optimizer::AdamW(AdamW::new(start, [0.9, 0.999], 0.0).unwrap());
        let gradient = Gradient { values: grads, norm: global_norm(grads).unwrap(), scale: 1.0 };
        assert!(outcome(&mut optimizer, &params, gradient, 1e-3, true).unwrap().0);
        // a first moment so much larger than the second's root that their quotient leaves f32
        let moments = [("exp_avg", (start.ones_like()? * 3e38)?), ("exp_avg_sq", start.zeros_like()?)];
        optimizer.load_state(1, HashMap::from(moments.map(|(name, moment)| (name.to_string(), moment)))).unwrap();
        let none = Gradient { values: &start.zeros_like()?, norm: 0.0, scale: 1.0 };
        assert_eq!(outcome(&mut optimizer, &params, none, 1e-3, true).unwrap(), (false, true));
        Ok(())
    })
    .map_err(Into::into)
}
