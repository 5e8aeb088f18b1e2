//! What is logged: TRL's metric names with TRL's meaning (`DPOTrainer._compute_loss`, TRL 1.16).
//!
//! | name | average |
//! | --- | --- |
//! | `loss`, `rewards/*`, `logps/*` | mean over the batch's pairs; a reward is `β·log π/π_ref` of an answer, an accuracy is 1 where the chosen reward is larger and one half where the two are equal, a log-prob is the answer's sum |
//! | `logits/chosen`, `logits/rejected` | over all tokens of the batch's chosen (rejected) answers: the logits' mean over the vocabulary at the position that predicts the token |
//! | `entropy` | over all answer tokens of the batch, in nats |
//! | `mean_token_accuracy` | over the chosen answers' tokens: the share that is the model's likeliest token |
//! | `num_tokens` | trained on since the run began, the prompt counted for both answers, as TRL's batches hold it twice |
//!
//! TRL counts a tie as lost; it happens until the first step with a rate above 0, while policy and reference are one
//! model, and a model that cannot tell is right half of the time.
//!
//! TRL forms these per micro-batch and averages the micro-batches' values; the batch here is the whole optimizer step
//! (or the whole evaluation), which is the same where TRL's step is one micro-batch, and weighs tokens evenly where it
//! is not.

use std::cmp::Ordering;

use super::losses::PairLogps;

/// Sums over one answer's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AnswerSums {
    /// Of the logits' mean over the vocabulary.
    pub mean_logits: f64,
    /// Of the predictive distribution's entropy, in nats.
    pub entropy: f64,
    /// Tokens that are the model's likeliest.
    pub correct: usize,
}

/// A mean that grows with each number: the mean of equal numbers is that number to the last bit, which `sum / n` is
/// not. Policy and reference being one model at first, the first loss is exactly ln 2 however many pairs there are.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    numbers: usize,
    value: f64,
}

impl Mean {
    fn add(&mut self, number: f64) {
        self.numbers += 1;
        self.value += (number - self.value) / self.numbers as f64;
    }
}

/// Sums and means over the pairs of a step or of an evaluation.
#[derive(Debug, Clone)]
pub struct Metrics {
    beta: f64,
    pairs: usize,
    loss: Mean,
    rewards_chosen: Mean,
    rewards_rejected: Mean,
    wins: f64,
    logps_chosen: Mean,
    logps_rejected: Mean,
    chosen: AnswerSums,
    rejected: AnswerSums,
    chosen_tokens: usize,
    rejected_tokens: usize,
    prompt_tokens: usize,
}

impl Metrics {
    /// No pairs yet; `beta` scales the rewards.
    pub fn new(beta: f64) -> Self {
        Self {
            beta,
            pairs: 0,
            loss: Mean::default(),
            rewards_chosen: Mean::default(),
            rewards_rejected: Mean::default(),
            wins: 0.0,
            logps_chosen: Mean::default(),
            logps_rejected: Mean::default(),
            chosen: AnswerSums::default(),
            rejected: AnswerSums::default(),
            chosen_tokens: 0,
            rejected_tokens: 0,
            prompt_tokens: 0,
        }
    }

    /// Adds one pair: its log-probs, its loss, the tokens of its prompt and its answers' sums.
    pub fn add(
        &mut self,
        logps: &PairLogps,
        loss: f64,
        prompt_tokens: usize,
        chosen: &AnswerSums,
        rejected: &AnswerSums,
    ) {
        let chosen_reward = self.beta * logps.chosen_logratio();
        let rejected_reward = self.beta * logps.rejected_logratio();
        self.pairs += 1;
        self.loss.add(loss);
        self.rewards_chosen.add(chosen_reward);
        self.rewards_rejected.add(rejected_reward);
        self.wins += match chosen_reward.partial_cmp(&rejected_reward) {
            Some(Ordering::Greater) => 1.0,
            Some(Ordering::Equal) => 0.5,
            _ => 0.0,
        };
        self.logps_chosen.add(logps.chosen);
        self.logps_rejected.add(logps.rejected);
        self.chosen.add(chosen);
        self.rejected.add(rejected);
        self.chosen_tokens += logps.chosen_tokens;
        self.rejected_tokens += logps.rejected_tokens;
        self.prompt_tokens += prompt_tokens;
    }

    /// The averages; none before the first pair.
    pub fn mean(&self) -> Option<Means> {
        if self.pairs == 0 {
            return None;
        }
        let (chosen_tokens, rejected_tokens) = (self.chosen_tokens as f64, self.rejected_tokens as f64);
        Some(Means {
            pairs: self.pairs,
            loss: self.loss.value,
            rewards_chosen: self.rewards_chosen.value,
            rewards_rejected: self.rewards_rejected.value,
            accuracy: self.wins / self.pairs as f64,
            margin: self.rewards_chosen.value - self.rewards_rejected.value,
            logps_chosen: self.logps_chosen.value,
            logps_rejected: self.logps_rejected.value,
            logits_chosen: self.chosen.mean_logits / chosen_tokens,
            logits_rejected: self.rejected.mean_logits / rejected_tokens,
            entropy: (self.chosen.entropy + self.rejected.entropy) / (chosen_tokens + rejected_tokens),
            mean_token_accuracy: self.chosen.correct as f64 / chosen_tokens,
            num_tokens: (2 * self.prompt_tokens + self.chosen_tokens + self.rejected_tokens) as u64,
        })
    }
}

impl AnswerSums {
    fn add(&mut self, other: &Self) {
        self.mean_logits += other.mean_logits;
        self.entropy += other.entropy;
        self.correct += other.correct;
    }
}

/// Averages over a step's or an evaluation's pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Means {
    /// Pairs averaged over.
    pub pairs: usize,
    /// `loss`
    pub loss: f64,
    /// `rewards/chosen`
    pub rewards_chosen: f64,
    /// `rewards/rejected`
    pub rewards_rejected: f64,
    /// `rewards/accuracies`
    pub accuracy: f64,
    /// `rewards/margins`
    pub margin: f64,
    /// `logps/chosen`
    pub logps_chosen: f64,
    /// `logps/rejected`
    pub logps_rejected: f64,
    /// `logits/chosen`
    pub logits_chosen: f64,
    /// `logits/rejected`
    pub logits_rejected: f64,
    /// `entropy`
    pub entropy: f64,
    /// `mean_token_accuracy`
    pub mean_token_accuracy: f64,
    /// Tokens of these pairs as TRL counts them; the logged `num_tokens` is the run's total.
    pub num_tokens: u64,
}

impl Means {
    /// The averages under TRL's names, in the order in which they are logged.
    pub fn named(&self) -> [(&'static str, f64); 11] {
        [
            ("loss", self.loss),
            ("rewards/chosen", self.rewards_chosen),
            ("rewards/rejected", self.rewards_rejected),
            ("rewards/accuracies", self.accuracy),
            ("rewards/margins", self.margin),
            ("logps/chosen", self.logps_chosen),
            ("logps/rejected", self.logps_rejected),
            ("logits/chosen", self.logits_chosen),
            ("logits/rejected", self.logits_rejected),
            ("entropy", self.entropy),
            ("mean_token_accuracy", self.mean_token_accuracy),
        ]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;
    use crate::objective::losses::loss;
    use crate::recipe::{Loss, Objective, Reference};

    #[derive(serde::Deserialize)]
    struct Fixture {
        beta: f64,
        prompt_tokens: usize,
        pairs: Vec<(f64, f64, f64, f64, usize, usize)>,
        mean_logits: Vec<f64>,
        entropy: Vec<f64>,
        correct: Vec<usize>,
        metrics: Map<String, Value>,
    }

    fn fixture_metrics() -> (Metrics, Map<String, Value>) {
        let fixture: Fixture =
            serde_json::from_str(include_str!("../../tests/fixtures/losses.json")).expect("the fixture");
        let objective =
            Objective { loss: Loss::Sigmoid, beta: fixture.beta, label_smoothing: 0.0, reference: Reference::Start };
        let mut metrics = Metrics::new(fixture.beta);
        // As TRL's batch: all chosen answers, then all rejected ones.
        let sums = |row: usize| AnswerSums {
            mean_logits: fixture.mean_logits[row],
            entropy: fixture.entropy[row],
            correct: fixture.correct[row],
        };
        for (row, &(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)) in
            fixture.pairs.iter().enumerate()
        {
            let logps = PairLogps { chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens };
            let loss = loss(&objective, &logps).loss;
            metrics.add(&logps, loss, fixture.prompt_tokens, &sums(row), &sums(row + fixture.pairs.len()));
        }
        (metrics, fixture.metrics)
    }

    #[test]
    fn averages_equal_trl() {
        let (metrics, trl) = fixture_metrics();
        let means = metrics.mean().expect("pairs");
        assert_eq!(trl["num_tokens"].as_u64(), Some(means.num_tokens));
        assert_eq!(trl.len(), means.named().len() + 1);
        for (name, ours) in means.named() {
            let theirs = trl[name].as_f64().expect("a number");
            assert!((ours - theirs).abs() < 1e-5, "{name}: {ours} against {theirs}");
        }
    }

    #[test]
    fn no_pairs_no_averages_and_a_tie_is_half_a_win() {
        let mut metrics = Metrics::new(0.1);
        assert_eq!(metrics.mean(), None);
        let tie = PairLogps {
            chosen: -3.0,
            rejected: -4.0,
            ref_chosen: -3.0,
            ref_rejected: -4.0,
            chosen_tokens: 1,
            rejected_tokens: 1,
        };
        metrics.add(&tie, std::f64::consts::LN_2, 2, &AnswerSums::default(), &AnswerSums::default());
        let means = metrics.mean().expect("a pair");
        assert_eq!((means.accuracy, means.margin, means.num_tokens), (0.5, 0.0, 6));
    }

    #[test]
    fn the_mean_of_equal_numbers_is_that_number() {
        let tie = PairLogps {
            chosen: -0.1,
            rejected: -1.0 / 3.0,
            ref_chosen: -0.1,
            ref_rejected: -1.0 / 3.0,
            chosen_tokens: 1,
            rejected_tokens: 1,
        };
        let mut sums_that_round = 0;
        for pairs in 1..=500 {
            let mut metrics = Metrics::new(0.1);
            for _ in 0..pairs {
                metrics.add(&tie, std::f64::consts::LN_2, 2, &AnswerSums::default(), &AnswerSums::default());
            }
            let means = metrics.mean().expect("pairs");
            assert_eq!((means.loss, means.margin, means.accuracy), (std::f64::consts::LN_2, 0.0, 0.5), "{pairs}");
            assert_eq!((means.logps_chosen, means.logps_rejected), (-0.1, -1.0 / 3.0), "{pairs}");
            let sum: f64 = std::iter::repeat_n(std::f64::consts::LN_2, pairs).sum();
            sums_that_round += usize::from(sum / pairs as f64 != std::f64::consts::LN_2);
        }
        assert!(sums_that_round > 100, "{sums_that_round}: a plain sum would have done");
    }
}
