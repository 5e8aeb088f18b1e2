//! Token scores and their slope on a GPU.

use candle_core::{Result, Tensor};

use super::launch::{Launch, THREADS, room, run};

/// Numbers that the kernel gives a position.
const SCORE: usize = 5;

/// What the head says of one token, from a row of logits.
pub struct Scored {
    /// Log-probability of the target.
    pub logp: f32,
    /// Entropy of the row's distribution.
    pub entropy: f32,
    /// Mean of the row.
    pub mean_logit: f32,
    /// Whether the target is the first of the largest.
    pub likeliest: bool,
    /// Logarithm of the row's sum of exponentials.
    pub lse: f32,
}

/// Scores `targets` at `logits[positions, vocabulary]`.
pub fn scores(logits: &Tensor, targets: &[u32]) -> Result<Vec<Scored>> {
    let ((positions, vocabulary), scores) = (logits.dims2()?, room((logits.dim(0)?, SCORE), logits)?);
    let targets = Tensor::new(targets, logits.device())?;
    let launch = Launch { kernel: "head_scores", groups: [positions, 1, 1], words: &[vocabulary as u32] };
    run(&launch, &[logits, &targets], &[&scores])?;
    let of = |row: Vec<f32>| Scored {
        logp: row[0],
        entropy: row[1],
        mean_logit: row[2],
        likeliest: row[3] > 0.0,
        lse: row[4],
    };
    Ok(scores.to_vec2::<f32>()?.into_iter().map(of).collect())
}

/// `onehot(target) − softmax(logits)`, in the place of the logits.
pub fn slope(logits: Tensor, targets: &[u32], lse: &[f32]) -> Result<Tensor> {
    let (positions, vocabulary) = logits.dims2()?;
    let (targets, lse) = (Tensor::new(targets, logits.device())?, Tensor::new(lse, logits.device())?);
    let groups = [vocabulary.div_ceil(THREADS), positions, 1];
    run(&Launch { kernel: "head_slope", groups, words: &[vocabulary as u32] }, &[&targets, &lse], &[&logits])?;
    Ok(logits)
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};

    use super::{super::host::on, *};
    use crate::kernels::oracle::{random, worst};

    #[test]
    fn equal_the_log_softmax_in_f64() -> Result<()> {
        for (positions, vocabulary) in [(1, 1), (3, 100), (5, 256), (7, 1111), (2, 5000)] {
            let logits = (random((positions, vocabulary), 1) * 12.0)?;
            let mut targets: Vec<u32> = (0..positions as u32).map(|i| i * 71 % vocabulary as u32).collect();
            targets[0] = logits.argmax(1)?.to_vec1::<u32>()?[0];
            let wide = logits.to_dtype(DType::F64)?;
            let logps = candle_nn::ops::log_softmax(&wide, D::Minus1)?;
            let (rows, wide_rows) = (logps.to_vec2::<f64>()?, wide.to_vec2::<f64>()?);
            let onehot: Vec<f64> = (0..positions * vocabulary)
                .map(|at| f64::from(u8::from(targets[at / vocabulary] as usize == at % vocabulary)))
                .collect();
            let expected = (Tensor::from_vec(onehot, logits.shape(), logits.device())? - logps.exp()?)?;
            on([&logits], |[there]| {
                let scores = scores(there, &targets)?;
                for (i, score) in scores.iter().enumerate() {
                    let (row, target) = (&rows[i], targets[i] as usize);
                    let entropy = -row.iter().map(|logp| logp.exp() * logp).sum::<f64>();
                    let mean = wide_rows[i].iter().sum::<f64>() / vocabulary as f64;
                    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    assert!((f64::from(score.logp) - row[target]).abs() < 5e-6, "{} {}", score.logp, row[target]);
                    assert!((f64::from(score.entropy) - entropy).abs() < 1e-5, "{} {entropy}", score.entropy);
                    assert!((f64::from(score.mean_logit) - mean).abs() < 5e-6);
                    assert!((f64::from(score.lse) - (wide_rows[i][target] - row[target])).abs() < 5e-6);
                    assert_eq!(score.likeliest, row[target] == largest);
                }
                assert!(scores[0].likeliest);
                let lse: Vec<f32> = scores.iter().map(|score| score.lse).collect();
                assert!(worst(&slope(there.copy()?, &targets, &lse)?, &expected) < 5e-6);
                Ok(())
            })?;
        }
        Ok(())
    }

    #[test]
    fn of_equal_logits_the_first_is_the_likeliest() -> Result<()> {
        let mut row = vec![0f32; 700];
        (row[3], row[300], row[601]) = (2.0, 2.0, 2.0);
        let logits = Tensor::from_vec([row.clone(), row].concat(), (2, 700), &candle_core::Device::Cpu)?;
        on([&logits], |[there]| {
            let likeliest: Vec<bool> = scores(there, &[3, 300])?.iter().map(|score| score.likeliest).collect();
            assert_eq!(likeliest, [true, false]);
            Ok(())
        })
    }
}
