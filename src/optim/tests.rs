//! Against torch's optimizers and transformers' schedules (`tools/fixtures/optim.py`).

use candle_core::Device;
use serde::Deserialize;

use super::*;
use crate::recipe::LrSchedule;

#[derive(Deserialize)]
struct Fixture {
    start: Vec<f32>,
    grads: Vec<Vec<f32>>,
    runs: Vec<Run>,
    schedules: Vec<Rates>,
}

#[derive(Deserialize)]
struct Run {
    optimizer: recipe::Optimizer,
    lr: f64,
    weight_decay: f64,
    max_norm: f64,
    betas: [f64; 2],
    steps: Vec<Step>,
    state: HashMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Step {
    norm: f64,
    params: Vec<f32>,
}

#[derive(Deserialize)]
struct Rates {
    kind: LrSchedule,
    total: usize,
    warmup: usize,
    peak: f64,
    rates: Vec<f64>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../tests/fixtures/optim.json")).expect("the fixture")
}

impl Run {
    fn optimizer(&self, params: &Tensor) -> Result<Optimizer> {
        Ok(match self.optimizer {
            recipe::Optimizer::Adamw => Optimizer::AdamW(AdamW::new(params, self.betas, self.weight_decay)?),
            recipe::Optimizer::Rmsprop => Optimizer::Rmsprop(Rmsprop::new(params, self.weight_decay)?),
        })
    }
}

fn assert_close(what: &str, ours: &[f32], theirs: &[f32], least: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!((ours - theirs).abs() <= 1e-6 * theirs.abs() + least, "{what}: {ours} against {theirs}");
    }
}

/// Not clipped, but scaled.
fn scaled(values: &Tensor, scale: f64) -> Result<Gradient<'_>> {
    Ok(Gradient { scale, ..Gradient::clipped(values, 0.0)? })
}

fn compare_with_torch() -> Result<()> {
    let fixture = fixture();
    for run in &fixture.runs {
        let what = format!("{:?} decay {} clip {}", run.optimizer, run.weight_decay, run.max_norm);
        let params = Tensor::new(fixture.start.as_slice(), &Device::Cpu)?;
        let view = params.narrow(0, 2, 4)?.reshape((2, 2))?;
        let mut optimizer = run.optimizer(&params)?;
        for (step, grads) in run.steps.iter().zip(&fixture.grads) {
            let grads = Tensor::new(grads.as_slice(), &Device::Cpu)?;
            let gradient = Gradient::clipped(&grads, run.max_norm)?;
            let norm = gradient.norm;
            assert!((norm / step.norm - 1.0).abs() < 1e-6, "{what}: norm {norm} against {}", step.norm);
            optimizer.step(&params, gradient, run.lr)?;
            assert_close(&what, &params.to_vec1()?, &step.params, 1e-8);
            assert_close("a view of the parameters", &view.flatten_all()?.to_vec1()?, &step.params[2..6], 1e-8);
        }
        let (steps, state) = optimizer.state();
        assert_eq!(
            (steps, state.len()),
            (fixture.grads.len() as u64, run.state.iter().filter(|(_, v)| !v.is_empty()).count())
        );
        for (name, tensor) in state {
            assert_close(&name, &tensor.to_vec1()?, &run.state[&name], 1e-14);
        }
    }
    Ok(())
}

#[test]
fn steps_equal_torch() -> Result<()> {
    compare_with_torch()
}

#[test]
fn the_plain_tensor_form_equals_torch() -> Result<()> {
    elementwise::PLAIN.set(true);
    compare_with_torch()
}

#[test]
fn rates_equal_transformers() {
    for case in fixture().schedules {
        for (step, theirs) in case.rates.iter().enumerate() {
            let ours = rate(step, case.total, case.warmup, case.peak, case.kind);
            assert!((ours - theirs).abs() < 1e-20, "{:?} step {step} of {}: {ours} {theirs}", case.kind, case.total);
        }
    }
}

#[test]
fn a_saved_optimizer_goes_on_bit_for_bit() -> Result<()> {
    let fixture = fixture();
    let folder = tempfile::tempdir().expect("a folder");
    for run in &fixture.runs {
        let grads: Vec<Tensor> =
            fixture.grads.iter().map(|g| Ok(Tensor::new(g.as_slice(), &Device::Cpu)?)).collect::<Result<_>>()?;
        let params = Tensor::new(fixture.start.as_slice(), &Device::Cpu)?;
        let mut whole = run.optimizer(&params)?;
        for grads in &grads[..2] {
            whole.step(&params, scaled(grads, 1.0)?, run.lr)?;
        }
        let file = folder.path().join("optimizer.safetensors");
        whole.save(&file)?;
        let resumed_params = params.copy()?;
        let mut resumed = run.optimizer(&resumed_params)?;
        resumed.load(&file)?;
        for grads in &grads[2..] {
            whole.step(&params, scaled(grads, 1.0)?, run.lr)?;
            resumed.step(&resumed_params, scaled(grads, 1.0)?, run.lr)?;
        }
        assert_eq!(params.to_vec1::<f32>()?, resumed_params.to_vec1::<f32>()?);
        assert_eq!(resumed.state().0, whole.state().0);
    }
    Ok(())
}

#[test]
fn a_state_of_another_optimizer_or_size_is_refused() -> Result<()> {
    let params = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu);
    let state = |optimizer: &Optimizer| optimizer.state().1.into_iter().collect::<HashMap<_, _>>();
    let mut adamw = Optimizer::AdamW(AdamW::new(&params(3)?, [0.9, 0.999], 0.0)?);
    let rmsprop = Optimizer::Rmsprop(Rmsprop::new(&params(3)?, 0.0)?);
    let longer = Optimizer::AdamW(AdamW::new(&params(4)?, [0.9, 0.999], 0.0)?);
    let error = adamw.load_state(1, state(&rmsprop)).expect_err("another optimizer");
    assert!(error.to_string().contains("exp_avg"), "{error}");
    let error = adamw.load_state(1, state(&longer)).expect_err("another size");
    assert!(error.to_string().contains("[4]"), "{error}");
    Ok(())
}

#[test]
fn many_threads_give_the_same_bits() -> Result<()> {
    let n = 100_003;
    let grads: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1013) as f32 / 500.0 - 1.0).collect();
    let run = |threads: usize| -> Result<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let (params, grads) =
                (Tensor::ones(n, DType::F32, &Device::Cpu)?, Tensor::new(grads.as_slice(), &Device::Cpu)?);
            let mut optimizer = AdamW::new(&params, [0.9, 0.999], 0.01)?;
            for _ in 0..3 {
                optimizer.step(&params, scaled(&grads, 0.5)?, 1e-3)?;
            }
            Ok(params.to_vec1()?)
        })
    };
    assert_eq!(run(1)?, run(3)?);
    Ok(())
}

#[test]
fn an_update_that_would_not_be_finite_changes_nothing() -> Result<()> {
    let start = [0.5f32, -0.25, 1.0];
    // what is at fault: the gradient, its square, the rate, the rate times the decay
    for (grads, lr, decay) in [
        ([0.1, f32::NAN, 0.1], 1e-3, 0.0),
        ([0.1, f32::INFINITY, 0.1], 1e-3, 0.0),
        ([0.1, 1e30, 0.1], 1e-3, 0.0),
        ([0.1, 0.1, 0.1], 1e300, 0.0),
        ([0.1, 0.1, 0.1], 1e38, 1e10),
    ] {
        for adamw in [true, false] {
            let params = Tensor::new(&start, &Device::Cpu)?;
            let mut optimizer = match adamw {
                true => Optimizer::AdamW(AdamW::new(&params, [0.9, 0.999], decay)?),
                false => Optimizer::Rmsprop(Rmsprop::new(&params, decay)?),
            };
            let first = Tensor::new(&[0.1f32, 0.2, -0.3], &Device::Cpu)?;
            assert!(optimizer.step(&params, scaled(&first, 1.0)?, 1e-3)?);
            let values = |optimizer: &Optimizer| -> Result<Vec<Vec<f32>>> {
                let (_, moments) = optimizer.state();
                Ok(moments.iter().map(|(_, moment)| moment.to_vec1()).collect::<candle_core::Result<_>>()?)
            };
            let before = (params.to_vec1::<f32>()?, values(&optimizer)?);
            let applied = optimizer.step(&params, scaled(&Tensor::new(&grads, &Device::Cpu)?, 1.0)?, lr)?;
            let after = (params.to_vec1::<f32>()?, values(&optimizer)?);
            assert!(!applied, "adamw {adamw}, {grads:?}, rate {lr}");
            assert_eq!((before, optimizer.state().0), (after, 1), "adamw {adamw}, {grads:?}, rate {lr}");
        }
    }
    Ok(())
}

#[test]
fn moments_that_are_not_finite_are_neither_saved_nor_loaded() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("optimizer.safetensors");
    let params = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
    let mut optimizer = Optimizer::AdamW(AdamW::new(&params, [0.9, 0.999], 0.0)?);
    optimizer.save(&path)?;
    let whole = std::fs::read(&path).expect("the file");
    let mut bad = whole.clone();
    let last = bad.len() - 4;
    bad[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bad).expect("written");
    let said = optimizer.load(&path).expect_err("not finite").to_string();
    assert!(said.contains("\"exp_avg_sq\" is not finite"), "{said}");

    let nan = Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?;
    let state = HashMap::from([("exp_avg".to_string(), nan.clone()), ("exp_avg_sq".to_string(), nan)]);
    optimizer.load_state(1, state)?;
    let said = optimizer.save(&path).expect_err("not finite").to_string();
    assert!(said.contains("exp_avg is not finite and is not saved"), "{said}");
    Ok(())
}

mod on_gpu;
