//! The rate of a large square bf16 product on a device, in TFLOP/s: the peak against which a step is held.
//!
//! ```text
//! cargo run --release --features cuda --example matrix-peak -- cuda:0 8192
//! ```

use std::{process::ExitCode, time::Instant};

use candle_core::{DType, Device, Result, Tensor};
use dpo_lora::{report::Progress, train::device};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [name, size] => match (device::choose(name, &Progress::stderr()), size.parse()) {
            (Ok(device), Ok(size)) => measure(&device, size).map_err(|error| error.to_string()),
            (Err(error), _) => Err(error.to_string()),
            (_, Err(_)) => Err(format!("{size} is no number of rows")),
        },
        _ => Err("expected: DEVICE SIZE".to_string()),
    };
    match outcome {
        Ok(tflops) => {
            println!("{{\"tflops\": {tflops:.3}, \"size\": {}}}", arguments[1]);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("matrix-peak: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The best of five rounds; a round is many products and one wait.
fn measure(device: &Device, size: usize) -> Result<f64> {
    // candle's CPU has no bf16 product of note: there the rate is that of f32
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let side = || Tensor::rand(-1f32, 1f32, (size, size), device)?.to_dtype(dtype);
    let (a, b) = (side()?, side()?);
    let products = if device.is_cpu() { 1 } else { 20 };
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        device.synchronize()?;
        let began = Instant::now();
        for _ in 0..products {
            a.matmul(&b)?;
        }
        device.synchronize()?;
        best = best.min(began.elapsed().as_secs_f64() / products as f64);
    }
    Ok(2.0 * (size as f64).powi(3) / best / 1e12)
}
