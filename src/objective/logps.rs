//! Log-probs of given tokens from hidden states, without the logits of more than a few positions at once.
//!
//! The derivative of a token's log-prob by its hidden state, `(onehot − softmax) · W`, is taken on the way forward, so
//! the backward pass is a scaling of rows and no logits are kept or computed twice.

use candle_core::{CpuStorage, D, DType, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;

#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::kernels::gpu;
use crate::{
    kernels::{
        host::{floats, operand_mut},
        profile::{Part, Timed},
        simd::multiversion,
        special::exp,
    },
    model::head::Head,
};

/// What the head says of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Its log-probability, in nats.
    pub logp: f32,
    /// The entropy of the distribution that it was drawn from, in nats.
    pub entropy: f32,
    /// The mean of all logits there.
    pub mean_logit: f32,
    /// Whether it is the likeliest token there.
    pub likeliest: bool,
}

/// Scores `targets` at the hidden states `h[positions, hidden]`; with `gradient` also `∂logp/∂h[positions, hidden]`.
/// The logits of `positions` positions exist at once: 128 × 49,152 f32 are 24 MiB.
pub fn score(
    head: &Head,
    h: &Tensor,
    targets: &[u32],
    positions: usize,
    gradient: bool,
) -> Result<(Vec<TokenScore>, Option<Tensor>)> {
    let _timed = Timed::start(Part::Head);
    let mut scores = Vec::with_capacity(targets.len());
    let d_h = gradient.then(|| h.zeros_like()).transpose()?;
    for (chunk, targets) in targets.chunks(positions).enumerate() {
        let first = chunk * positions;
        let logits = head.logits(&h.narrow(0, first, targets.len())?)?;
        let (chunk_scores, lse) = match logits.device().is_cpu() {
            true => rows(&logits, targets)?,
            #[cfg(any(feature = "cuda", feature = "metal"))]
            false if gpu::serves(&logits) => gpu_rows(&logits, targets)?,
            false => plain_rows(&logits, targets)?,
        };
        scores.extend(chunk_scores);
        if let Some(d_h) = &d_h {
            let through_cap = head.cap_slope(&logits)?;
            let slope = slope(logits, targets, lse)?;
            head.add_backward(&d_h.narrow(0, first, targets.len())?, slope, through_cap)?;
        }
    }
    Ok((scores, d_h))
}

/// Scores a chunk; beside it the logarithm of each row's sum of exponentials.
fn rows(logits: &Tensor, targets: &[u32]) -> Result<(Vec<TokenScore>, Vec<f32>)> {
    let vocabulary = logits.dim(1)?;
    let logits = floats(logits)?;
    let score = |(row, &target): (&[f32], &u32)| {
        let max = maximum(row);
        let Sums { exp: sum, exp_times_logit, logit } = sums(row, max);
        let lse = max + sum.ln() as f32;
        let score = TokenScore {
            logp: row[target as usize] - lse,
            entropy: lse - (exp_times_logit / sum) as f32,
            mean_logit: (logit / vocabulary as f64) as f32,
            likeliest: row.iter().position(|logit| *logit == max) == Some(target as usize),
        };
        (score, lse)
    };
    Ok(logits.par_chunks_exact(vocabulary).zip(targets).map(score).unzip())
}

#[cfg(any(feature = "cuda", feature = "metal"))]
fn gpu_rows(logits: &Tensor, targets: &[u32]) -> Result<(Vec<TokenScore>, Vec<f32>)> {
    let of = |row: gpu::head::Scored| {
        let gpu::head::Scored { logp, entropy, mean_logit, likeliest, lse } = row;
        (TokenScore { logp, entropy, mean_logit, likeliest }, lse)
    };
    Ok(gpu::head::scores(logits, targets)?.into_iter().map(of).unzip())
}

fn plain_rows(logits: &Tensor, targets: &[u32]) -> Result<(Vec<TokenScore>, Vec<f32>)> {
    let lse = logits.log_sum_exp(D::Minus1)?;
    let softmax = logits.broadcast_sub(&lse.unsqueeze(1)?)?.exp()?;
    let expected = (softmax * logits)?.sum(D::Minus1)?.to_vec1::<f32>()?;
    let target =
        logits.gather(&Tensor::new(targets, logits.device())?.unsqueeze(1)?, 1)?.squeeze(1)?.to_vec1::<f32>()?;
    let (mean, argmax) = (logits.mean(D::Minus1)?.to_vec1::<f32>()?, logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
    let lse = lse.to_vec1::<f32>()?;
    let scores = (0..targets.len()).map(|i| TokenScore {
        logp: target[i] - lse[i],
        entropy: lse[i] - expected[i],
        mean_logit: mean[i],
        likeliest: argmax[i] == targets[i],
    });
    Ok((scores.collect(), lse))
}

/// `onehot(target) − softmax(logits)`, in the place of the logits.
fn slope(logits: Tensor, targets: &[u32], lse: Vec<f32>) -> Result<Tensor> {
    if logits.device().is_cpu() {
        logits.inplace_op1(&Slope { targets, lse })?;
        return Ok(logits);
    }
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if gpu::serves(&logits) {
        return gpu::head::slope(logits, targets, &lse);
    }
    plain_slope(&logits, targets, &lse)
}

fn plain_slope(logits: &Tensor, targets: &[u32], lse: &[f32]) -> Result<Tensor> {
    let lse = Tensor::new(lse, logits.device())?.unsqueeze(1)?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let ones = Tensor::ones(targets.shape(), DType::F32, logits.device())?;
    logits.broadcast_sub(&lse)?.exp()?.neg()?.scatter_add(&targets, &ones, 1)
}

struct Slope<'a> {
    targets: &'a [u32],
    lse: Vec<f32>,
}

impl InplaceOp1 for Slope<'_> {
    fn name(&self) -> &'static str {
        "logp-slope"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let vocabulary = layout.shape().dims2()?.1;
        let rows = operand_mut(logits, layout)?.par_chunks_exact_mut(vocabulary);
        rows.zip(self.targets).zip(&self.lse).for_each(|((row, &target), &lse)| {
            minus_softmax(row, lse);
            row[target as usize] += 1.0;
        });
        Ok(())
    }
}

/// Sums over a row of logits.
struct Sums {
    /// Σ exp(logit − max).
    exp: f64,
    /// Σ exp(logit − max) · logit.
    exp_times_logit: f64,
    /// Σ logit.
    logit: f64,
}

/// Sums and maxima that run side by side, so that a row's loop vectorises.
const LANES: usize = 16;

multiversion! {
    fn maximum(row: &[f32]) -> f32 {
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (groups, rest) = row.as_chunks::<LANES>();
        for group in groups {
            for (lane, logit) in lanes.iter_mut().zip(group) {
                *lane = larger(*logit, *lane);
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, logit| larger(*logit, max))
    }

    fn minus_softmax(row: &mut [f32], lse: f32) {
        for logit in row {
            *logit = -exp(*logit - lse);
        }
    }

    /// In f32 over blocks that vectorise, in f64 over the blocks.
    fn sums(row: &[f32], max: f32) -> Sums {
        let mut total = Sums { exp: 0.0, exp_times_logit: 0.0, logit: 0.0 };
        for block in row.chunks(32 * LANES) {
            let (mut exps, mut products, mut logits) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
            let (groups, rest) = block.as_chunks::<LANES>();
            for group in groups {
                for lane in 0..LANES {
                    let e = exp(group[lane] - max);
                    exps[lane] += e;
                    products[lane] += e * group[lane];
                    logits[lane] += group[lane];
                }
            }
            for logit in rest {
                let e = exp(logit - max);
                exps[0] += e;
                products[0] += e * logit;
                logits[0] += logit;
            }
            let sum = |lanes: [f32; LANES]| f64::from(lanes.iter().sum::<f32>());
            total.exp += sum(exps);
            total.exp_times_logit += sum(products);
            total.logit += sum(logits);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::oracle::{gradients_hold, random, worst},
        weights::matrix::FrozenMatrix,
    };

    const CHUNK: usize = 128;
    const VOCABULARY: usize = 1100;
    const HIDDEN: usize = 24;

    /// A head, hidden states for one position more than a chunk takes, and targets, the first of them the likeliest.
    fn inputs() -> (Tensor, Tensor, Vec<u32>) {
        let (w, h) = ((random((VOCABULARY, HIDDEN), 1) * 2.0).unwrap(), random((CHUNK + 1, HIDDEN), 2));
        let mut targets: Vec<u32> = (0..CHUNK as u32 + 1).map(|i| i * 7 % VOCABULARY as u32).collect();
        targets[0] = h.matmul(&w.t().unwrap()).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
        (w, h, targets)
    }

    #[test]
    fn scores_equal_the_log_softmax_in_f64() -> Result<()> {
        let (w, h, targets) = inputs();
        let (scores, _) = score(&Head::plain(FrozenMatrix::of(&w)), &h, &targets, CHUNK, false)?;
        let logits = h.to_dtype(DType::F64)?.matmul(&w.to_dtype(DType::F64)?.t()?)?.to_vec2::<f64>()?;
        assert_eq!(scores.len(), targets.len());
        for ((score, logits), &target) in scores.iter().zip(&logits).zip(&targets) {
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
            let entropy: f64 = logits.iter().map(|logit| (logit - lse).exp() * (lse - logit)).sum();
            let mean = logits.iter().sum::<f64>() / VOCABULARY as f64;
            assert!((f64::from(score.logp) - (logits[target as usize] - lse)).abs() < 1e-5, "{score:?}");
            assert!((f64::from(score.entropy) - entropy).abs() < 1e-5, "{score:?} {entropy}");
            assert!((f64::from(score.mean_logit) - mean).abs() < 5e-6, "{score:?} {mean}");
            assert_eq!(score.likeliest, logits[target as usize] == max);
        }
        assert!(scores[0].likeliest && !scores[1].likeliest);
        Ok(())
    }

    #[test]
    fn a_score_does_not_depend_on_the_others() -> Result<()> {
        let (w, h, targets) = inputs();
        let head = Head::plain(FrozenMatrix::of(&w));
        let (all, d_all) = score(&head, &h, &targets, CHUNK, true)?;
        for i in [0, 5, CHUNK - 1, CHUNK] {
            let (one, d_one) = score(&head, &h.narrow(0, i, 1)?, &targets[i..=i], CHUNK, true)?;
            assert_eq!(one[0], all[i]);
            assert_eq!(worst(&d_one.unwrap(), &d_all.as_ref().unwrap().narrow(0, i, 1)?), 0.0);
        }
        Ok(())
    }

    #[test]
    fn the_slope_holds() -> Result<()> {
        let (w, h, targets) = inputs();
        let (_, slope) = score(&Head::plain(FrozenMatrix::of(&w)), &h, &targets, CHUNK, true)?;
        let form = |[h]: [&Tensor; 1]| {
            let logits = h.matmul(&w.to_dtype(h.dtype())?.t()?)?;
            let logps = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
            logps.gather(&Tensor::new(targets.as_slice(), h.device())?.unsqueeze(1)?, 1)
        };
        let ones = random((CHUNK + 1, 1), 3).ones_like()?;
        gradients_hold([&slope.unwrap()], [&h], &ones, form, 1e-6)
    }

    #[test]
    fn kernel_equals_plain_tensors() -> Result<()> {
        let (w, h, targets) = inputs();
        let logits = h.matmul(&w.t()?)?;
        let ((ours, lse), (theirs, plain_lse)) = (rows(&logits, &targets)?, plain_rows(&logits, &targets)?);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let close = |a: f32, b: f32| (a - b).abs() < 2e-5;
            assert!(close(ours.logp, theirs.logp) && close(ours.entropy, theirs.entropy), "{ours:?} {theirs:?}");
            assert!(close(ours.mean_logit, theirs.mean_logit) && ours.likeliest == theirs.likeliest);
        }
        assert!(lse.iter().zip(&plain_lse).all(|(a, b)| (a - b).abs() < 2e-5));
        let theirs = plain_slope(&logits, &targets, &lse)?;
        assert!(worst(&slope(logits, &targets, lse)?, &theirs) < 1e-6);
        Ok(())
    }
}
