//! What tests hold arithmetic against: candle's autograd and central differences, both in f64, of the same computation
//! written in candle's differentiable operations.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

use crate::random::Stream;

/// The step of central differences in f64: their error is about its square and 1e-16 over it.
const STEP: f64 = 1e-5;
/// Elements of a tensor at which central differences are taken, evenly spread.
const PROBES: usize = 64;

/// Numbers evenly spread over `[-1, 1)`.
pub fn random(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let (shape, stream) = (shape.into(), Stream::new(seed, "test"));
    let numbers = (0..shape.elem_count() as u64).map(|i| (2.0 * stream.uniform(i) - 1.0) as f32).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// The largest absolute difference.
pub fn worst(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.dims(), theirs.dims());
    numbers(ours).iter().zip(numbers(theirs)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The difference's norm over the norm of what it should be.
pub fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.dims(), theirs.dims());
    let (ours, theirs) = (numbers(ours), numbers(theirs));
    let difference: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / theirs.iter().map(|b| b * b).sum::<f64>().max(1e-30)).sqrt()
}

/// Holds `ours`, the gradients of `Σ dy · form(inputs)`, against candle's autograd (relative L2 within `tolerance`),
/// and that against central differences (each within 1e-7 of the largest).
pub fn gradients_hold<const N: usize>(
    ours: [&Tensor; N],
    inputs: [&Tensor; N],
    dy: &Tensor,
    form: impl Fn([&Tensor; N]) -> Result<Tensor>,
    tolerance: f64,
) -> Result<()> {
    let wide = |x: &Tensor| x.to_dtype(DType::F64)?.detach().copy();
    let dy = wide(dy)?;
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(&wide(x)?)).collect::<Result<_>>()?;
    let total = |at: [&Tensor; N]| (form(at)? * &dy)?.sum_all();
    let gradients = total(std::array::from_fn(|i| vars[i].as_tensor()))?.backward()?;
    for (i, ours) in ours.iter().enumerate() {
        let gradient = gradients.get(&vars[i]).expect("a gradient reaches every input").clone();
        let (autograd, point) = (numbers(&gradient), numbers(&vars[i]));
        let largest = autograd.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
        for at in (0..point.len()).step_by(point.len().div_ceil(PROBES)) {
            let moved = |step: f64| -> Result<f64> {
                let mut point = point.clone();
                point[at] += step;
                let point = Tensor::from_vec(point, inputs[i].shape(), &Device::Cpu)?;
                total(std::array::from_fn(|j| if j == i { &point } else { vars[j].as_tensor() }))?.to_scalar()
            };
            let slope = (moved(STEP)? - moved(-STEP)?) / (2.0 * STEP);
            let off = (slope - autograd[at]).abs() / largest;
            assert!(off < 1e-7, "input {i}, element {at}: autograd says {}, differences say {slope}", autograd[at]);
        }
        let off = relative(ours, &gradient);
        assert!(off < tolerance, "input {i}: ours is off by {off:.1e} of autograd's gradient");
    }
    Ok(())
}

fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
