//! Preference losses as pure functions of four log-probs a pair, with their derivatives.
//!
//! With `Δ = (chosen − ref_chosen) − (rejected − ref_rejected)`, `x = β·Δ` and `ε = label_smoothing`:
//!
//! | loss | formula | source |
//! | --- | --- | --- |
//! | `sigmoid` | `−(1−ε)·log σ(x) − ε·log σ(−x)` | DPO, equation 7 of Rafailov et al. 2023; with ε, cDPO (Mitchell 2023) |
//! | `robust` | `(−(1−ε)·log σ(x) + ε·log σ(−x)) / (1−2ε)` | Chowdhury et al. 2024; ε below ½ |
//! | `hinge` | `max(0, 1 − x)` | SLiC, Zhao et al. 2023 |
//! | `ipo` | `(δ − 1/(2β))²`, `δ` = Δ with each answer's part divided by its tokens | TRL's reading of IPO |
//! | `ipo_sum` | `(Δ − 1/(2β))²` | equation 17 of Azar et al. 2023 |
//!
//! TRL from 1.0 on ignores `label_smoothing` for `sigmoid`; here it is cDPO. `hinge` and both IPOs have no ε.

use crate::recipe::{Loss, Objective};

/// Summed log-probs of a pair's answers under policy and reference (natural logarithm), and the answers' lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogps {
    /// `log π(chosen | prompt)`.
    pub chosen: f64,
    /// `log π(rejected | prompt)`.
    pub rejected: f64,
    /// `log π_ref(chosen | prompt)`.
    pub ref_chosen: f64,
    /// `log π_ref(rejected | prompt)`.
    pub ref_rejected: f64,
    /// Tokens of the chosen answer, EOS included; at least one.
    pub chosen_tokens: usize,
    /// Tokens of the rejected answer, EOS included; at least one.
    pub rejected_tokens: usize,
}

impl PairLogps {
    /// `log π/π_ref` of the chosen answer.
    pub fn chosen_logratio(&self) -> f64 {
        self.chosen - self.ref_chosen
    }

    /// `log π/π_ref` of the rejected answer.
    pub fn rejected_logratio(&self) -> f64 {
        self.rejected - self.ref_rejected
    }
}

/// A pair's loss and its derivatives with respect to the policy's two summed log-probs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossGrad {
    /// The loss.
    pub loss: f64,
    /// `∂loss / ∂chosen`.
    pub d_chosen: f64,
    /// `∂loss / ∂rejected`.
    pub d_rejected: f64,
}

/// The objective's loss of one pair. A batch's loss is the mean over its pairs.
pub fn loss(objective: &Objective, logps: &PairLogps) -> LossGrad {
    let (beta, epsilon) = (objective.beta, objective.label_smoothing);
    let delta = logps.chosen_logratio() - logps.rejected_logratio();
    let x = beta * delta;
    // `d` is the derivative by Δ, which rises with the chosen log-prob as it falls with the rejected one.
    let of_delta = |loss, d| LossGrad { loss, d_chosen: d, d_rejected: -d };
    match objective.loss {
        // −(1−ε)·log σ(x) − ε·log σ(−x), as softplus(x) − softplus(−x) = x: exactly ln 2 at x = 0 for every ε.
        Loss::Sigmoid => of_delta(softplus(-x) + epsilon * x, beta * (epsilon - sigmoid(-x))),
        Loss::Robust => {
            let flipped = epsilon / (1.0 - 2.0 * epsilon);
            of_delta(softplus(-x) - flipped * x, -beta * (sigmoid(-x) + flipped))
        }
        Loss::Hinge => {
            let active = if x < 1.0 { 1.0 } else { 0.0 };
            of_delta((1.0 - x).max(0.0), -beta * active)
        }
        Loss::Ipo => {
            let (chosen, rejected) = (logps.chosen_tokens.max(1) as f64, logps.rejected_tokens.max(1) as f64);
            let mean_delta = logps.chosen_logratio() / chosen - logps.rejected_logratio() / rejected;
            let error = mean_delta - 0.5 / beta;
            LossGrad { loss: error * error, d_chosen: 2.0 * error / chosen, d_rejected: -2.0 * error / rejected }
        }
        Loss::IpoSum => {
            let error = delta - 0.5 / beta;
            of_delta(error * error, 2.0 * error)
        }
    }
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + e^−x)` without overflow.
fn sigmoid(x: f64) -> f64 {
    let small = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Reference;

    const LOSSES: [Loss; 5] = [Loss::Sigmoid, Loss::Robust, Loss::Hinge, Loss::Ipo, Loss::IpoSum];

    fn objective(loss: Loss, beta: f64, label_smoothing: f64) -> Objective {
        Objective { loss, beta, label_smoothing, reference: Reference::Start }
    }

    fn pair(chosen: f64, rejected: f64) -> PairLogps {
        PairLogps { chosen, rejected, ref_chosen: -40.0, ref_rejected: -50.0, chosen_tokens: 7, rejected_tokens: 12 }
    }

    #[test]
    fn values_equal_trl() {
        #[derive(serde::Deserialize)]
        struct Fixture {
            beta: f64,
            pairs: Vec<(f64, f64, f64, f64, usize, usize)>,
            losses: Vec<Case>,
        }
        #[derive(serde::Deserialize)]
        struct Case {
            loss: Loss,
            label_smoothing: f64,
            value: f64,
        }
        let fixture: Fixture =
            serde_json::from_str(include_str!("../../tests/fixtures/losses.json")).expect("the fixture");
        assert_eq!(fixture.losses.len(), 7);
        for case in fixture.losses {
            let objective = objective(case.loss, fixture.beta, case.label_smoothing);
            let mean = fixture
                .pairs
                .iter()
                .map(|&(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)| {
                    let logps =
                        PairLogps { chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens };
                    loss(&objective, &logps).loss
                })
                .sum::<f64>()
                / fixture.pairs.len() as f64;
            let what = format!("{:?} with smoothing {}", case.loss, case.label_smoothing);
            assert!((mean - case.value).abs() < 1e-5, "{what}: {mean} against {}", case.value);
        }
    }

    #[test]
    fn derivatives_equal_central_differences() {
        let step = 1e-4;
        for (kind, smoothing) in LOSSES.into_iter().flat_map(|loss| [(loss, 0.0), (loss, 0.1)]) {
            let objective = objective(kind, 0.3, smoothing);
            for (chosen, rejected) in [(-40.0, -50.0), (-38.0, -51.0), (-44.0, -49.0), (-20.0, -80.0), (-90.0, -45.0)] {
                let at = |chosen, rejected| loss(&objective, &pair(chosen, rejected)).loss;
                let ours = loss(&objective, &pair(chosen, rejected));
                let chosen_slope = (at(chosen + step, rejected) - at(chosen - step, rejected)) / (2.0 * step);
                let rejected_slope = (at(chosen, rejected + step) - at(chosen, rejected - step)) / (2.0 * step);
                let what = format!("{kind:?} smoothing {smoothing} at {chosen} {rejected}");
                assert!((ours.d_chosen - chosen_slope).abs() < 1e-7, "{what}: {} {chosen_slope}", ours.d_chosen);
                assert!(
                    (ours.d_rejected - rejected_slope).abs() < 1e-7,
                    "{what}: {} {rejected_slope}",
                    ours.d_rejected
                );
            }
        }
    }

    #[test]
    fn at_zero_margin_the_loss_is_exactly_ln_2() {
        for smoothing in [0.0, 0.1, 0.37] {
            for kind in [Loss::Sigmoid, Loss::Robust] {
                let at_start = loss(&objective(kind, 0.1, smoothing), &pair(-40.0, -50.0));
                assert_eq!(at_start.loss.to_bits(), std::f64::consts::LN_2.to_bits(), "{kind:?} {smoothing}");
            }
        }
    }

    #[test]
    fn huge_margins_stay_finite() {
        for kind in LOSSES {
            for chosen in [-1e6, 1e6] {
                let far = loss(&objective(kind, 1.0, 0.1), &pair(chosen, -50.0));
                assert!(far.loss.is_finite() && far.d_chosen.is_finite() && far.d_rejected.is_finite(), "{far:?}");
            }
        }
        let lost = loss(&objective(Loss::Sigmoid, 1.0, 0.0), &pair(-1040.0, -50.0));
        assert_eq!((lost.loss, lost.d_chosen), (1000.0, -1.0));
    }
}
