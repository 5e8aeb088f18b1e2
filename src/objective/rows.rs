//! The rows of `metrics.jsonl`: TRL's names in an order that never changes.

use serde_json::{Map, Value};

use super::metrics::Means;

/// One optimizer step's row of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainRow {
    /// Optimizer steps taken, this one included.
    pub step: u64,
    /// Passes over the rows, this step included.
    pub epoch: f64,
    /// Averages over the step's pairs, taken before its update.
    pub means: Means,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The rate that this step used.
    pub learning_rate: f64,
    /// Tokens since the run began, as TRL counts them.
    pub num_tokens: u64,
    /// Positions that this step worked on: prompt, chosen and rejected answer once each.
    pub tokens: u64,
    /// Wall time of this step.
    pub seconds: f64,
    /// Highest anonymous (CPU) or device memory so far, where it can be measured.
    pub peak_bytes: Option<u64>,
}

impl TrainRow {
    /// The row as a JSON object, keys always in this order.
    pub fn to_json(&self) -> Value {
        let mut row = head(self.step, self.epoch);
        row.extend(self.means.named().map(|(name, value)| (name.to_string(), value.into())));
        row.insert("grad_norm".into(), self.grad_norm.into());
        row.insert("learning_rate".into(), self.learning_rate.into());
        row.insert("num_tokens".into(), self.num_tokens.into());
        row.insert("tokens".into(), self.tokens.into());
        row.insert("seconds".into(), self.seconds.into());
        row.insert("peak_bytes".into(), self.peak_bytes.into());
        row.into()
    }
}

/// The row of a step that was left out because a number was not finite.
#[derive(Debug, Clone, PartialEq)]
pub struct SkippedRow {
    /// Steps taken, this one included.
    pub step: u64,
    /// Passes over the rows, this step included.
    pub epoch: f64,
    /// What was not finite.
    pub why: String,
    /// `file:line` of the row, or of all rows of the step where it cannot be told of which.
    pub rows: Vec<String>,
    /// Tokens trained on since the run began, as TRL counts them: none of this step's.
    pub num_tokens: u64,
}

impl SkippedRow {
    /// The row as a JSON object, keys always in this order.
    pub fn to_json(&self) -> Value {
        let mut row = head(self.step, self.epoch);
        row.insert("skipped".into(), true.into());
        row.insert("why".into(), self.why.clone().into());
        row.insert("rows".into(), self.rows.clone().into());
        row.insert("num_tokens".into(), self.num_tokens.into());
        row.into()
    }
}

/// One evaluation's row of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalRow {
    /// Optimizer steps taken before it.
    pub step: u64,
    /// Passes over the training rows before it.
    pub epoch: f64,
    /// Averages over the held-out pairs.
    pub means: Means,
    /// Tokens trained on since the run began, as TRL counts them.
    pub num_tokens: u64,
    /// Wall time of the evaluation: `eval_runtime`, the Hugging Face Trainer's name.
    pub seconds: f64,
}

impl EvalRow {
    /// The row as a JSON object with `eval_` names, keys always in this order.
    pub fn to_json(&self) -> Value {
        let mut row = head(self.step, self.epoch);
        row.extend(self.means.named().map(|(name, value)| (format!("eval_{name}"), value.into())));
        row.insert("eval_num_tokens".into(), self.num_tokens.into());
        row.insert("eval_pairs".into(), self.means.pairs.into());
        row.insert("eval_runtime".into(), self.seconds.into());
        row.into()
    }
}

fn head(step: u64, epoch: f64) -> Map<String, Value> {
    Map::from_iter([("step".to_string(), step.into()), ("epoch".to_string(), epoch.into())])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means() -> Means {
        Means {
            pairs: 8,
            loss: 0.625,
            rewards_chosen: -0.5,
            rewards_rejected: -0.75,
            accuracy: 0.5,
            margin: 0.25,
            logps_chosen: -126.5,
            logps_rejected: -127.25,
            logits_chosen: 4.5,
            logits_rejected: 5.5,
            entropy: 2.0,
            mean_token_accuracy: 0.375,
            num_tokens: 834,
        }
    }

    #[test]
    fn a_step_is_one_line_in_a_stable_order() {
        let row = TrainRow {
            step: 3,
            epoch: 0.5,
            means: means(),
            grad_norm: 2.5,
            learning_rate: 5e-6,
            num_tokens: 932,
            tokens: 430,
            seconds: 1.25,
            peak_bytes: None,
        };
        let expected = concat!(
            r#"{"step":3,"epoch":0.5,"loss":0.625,"rewards/chosen":-0.5,"rewards/rejected":-0.75,"#,
            r#""rewards/accuracies":0.5,"rewards/margins":0.25,"logps/chosen":-126.5,"logps/rejected":-127.25,"#,
            r#""logits/chosen":4.5,"logits/rejected":5.5,"entropy":2.0,"mean_token_accuracy":0.375,"#,
            r#""grad_norm":2.5,"learning_rate":5e-6,"num_tokens":932,"tokens":430,"seconds":1.25,"peak_bytes":null}"#
        );
        assert_eq!(row.to_json().to_string(), expected);
    }

    #[test]
    fn an_evaluation_has_eval_names() {
        let line = EvalRow { step: 3, epoch: 0.5, means: means(), num_tokens: 932, seconds: 2.0 }.to_json().to_string();
        assert!(line.starts_with(r#"{"step":3,"epoch":0.5,"eval_loss":0.625,"eval_rewards/chosen":-0.5,"#), "{line}");
        assert!(line.ends_with(r#""eval_num_tokens":932,"eval_pairs":8,"eval_runtime":2.0}"#), "{line}");
    }
}
