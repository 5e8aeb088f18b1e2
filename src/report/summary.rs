//! The end of a run in one look: what it took, what changed, where things are, what to type next.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::units;

/// A finished run. Printed as text by [`fmt::Display`], as one JSON object by `serde`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Optimizer steps taken by this process.
    pub steps: u64,
    /// Pairs trained on by this process.
    pub pairs: u64,
    /// Positions worked on in training: prompt, chosen and rejected answer of a pair once each.
    pub tokens: u64,
    /// Wall time of the training steps, the reference's log-probs included where a step computes them; without loading,
    /// evaluation and samples.
    pub train_seconds: f64,
    /// Wall time of the whole run.
    pub seconds: f64,
    /// Whether the next two figures are of a device's memory.
    pub on_device: bool,
    /// Peak of the device's memory, or anonymous memory on the CPU, in bytes, where it can be measured.
    pub peak_bytes: Option<u64>,
    /// The peak that the plan predicted, in bytes; none where it cannot be compared.
    pub predicted_bytes: Option<u64>,
    /// The budget that the plan kept to, in bytes; none where nothing limits it.
    pub budget_bytes: Option<u64>,
    /// Peak anonymous memory of the host in bytes, where the others are a device's and it can be measured.
    pub host_peak_bytes: Option<u64>,
    /// Held-out pairs before training; none where nothing is held out.
    pub before: Option<HeldOut>,
    /// The same after training.
    pub after: Option<HeldOut>,
    /// What the samples say in figures; none where none were drawn.
    pub samples: Option<SampleFigures>,
    /// What was made and where it is, e.g. `("adapter", "runs/hh/adapter")`.
    pub files: Vec<Made>,
    /// The command to type next.
    pub next: String,
}

/// Averages over the held-out pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOut {
    /// Pairs averaged over.
    pub pairs: usize,
    /// Mean loss.
    pub loss: f64,
    /// Share of pairs whose chosen reward is the larger one; a tie counts one half.
    pub accuracy: f64,
    /// Mean reward margin.
    pub margin: f64,
}

/// What base and tuned model wrote, in figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SampleFigures {
    /// Samples of each model.
    pub samples: usize,
    /// Share of positive ones, base and tuned; none without labels.
    pub positive: Option<[f64; 2]>,
    /// Estimated KL divergence of the tuned model from the base, in nats a sample; none where the samples' temperature
    /// is not 1.
    pub kl: Option<f64>,
}

/// Something that the run left behind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Made {
    /// What it is.
    pub what: String,
    /// Where it is, as a person would type it.
    pub path: String,
}

impl fmt::Display for Summary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.train_seconds.max(1e-9);
        writeln!(
            out,
            "Trained {} steps on {} pairs in {} ({:.2} pairs/s, {:.0} tokens/s); the whole run took {}.",
            self.steps,
            self.pairs,
            seconds(self.train_seconds),
            self.pairs as f64 / time,
            self.tokens as f64 / time,
            seconds(self.seconds),
        )?;
        write!(out, "Peak {} memory: ", if self.on_device { "device" } else { "anonymous" })?;
        match (self.peak_bytes, self.predicted_bytes) {
            (Some(peak), Some(predicted)) => {
                write!(out, "{} ({} predicted)", units::bytes(peak), units::bytes(predicted))?;
            }
            (Some(peak), None) => write!(out, "{}", units::bytes(peak))?,
            (None, _) => write!(out, "not measured on this system")?,
        }
        match self.host_peak_bytes {
            Some(host) => writeln!(out, "; {} of the host's, anonymous.", units::bytes(host))?,
            None => writeln!(out, ".")?,
        }
        if let (Some(before), Some(after)) = (&self.before, &self.after) {
            writeln!(out, "\n{:<26}{:>10}{:>10}", format!("Held out ({} pairs)", after.pairs), "before", "after")?;
            writeln!(out, "  {:<24}{:>10.4}{:>10.4}", "loss", before.loss, after.loss)?;
            writeln!(out, "  {:<24}{:>10.3}{:>10.3}", "reward accuracy", before.accuracy, after.accuracy)?;
            writeln!(out, "  {:<24}{:>10.4}{:>10.4}", "reward margin", before.margin, after.margin)?;
        }
        if let Some(SampleFigures { samples, positive, kl }) = &self.samples
            && (positive.is_some() || kl.is_some())
        {
            writeln!(out, "\n{:<26}{:>10}{:>10}", format!("Samples ({samples} of each)"), "base", "tuned")?;
            if let Some([before, after]) = positive {
                writeln!(out, "  {:<24}{:>9.1}%{:>9.1}%", "positive", 100.0 * before, 100.0 * after)?;
            }
            if let Some(kl) = kl {
                writeln!(out, "  {:<24}{:>10}{kl:>10.2}", "KL to the base, nats", "")?;
            }
        }
        writeln!(out)?;
        let width = self.files.iter().map(|made| made.what.len()).max().unwrap_or(0);
        for made in &self.files {
            writeln!(out, "{:<width$}  {}", made.what, made.path)?;
        }
        write!(out, "\nNext: {}", self.next)
    }
}

/// A duration from seconds that were measured; anything else (never seen) reads as 0.
fn seconds(value: f64) -> String {
    units::duration(Duration::try_from_secs_f64(value).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        let made = |what: &str, path: &str| Made { what: what.into(), path: path.into() };
        Summary {
            steps: 64,
            pairs: 1024,
            tokens: 220_160,
            train_seconds: 185.0,
            seconds: 201.5,
            on_device: false,
            peak_bytes: Some(312 << 20),
            predicted_bytes: Some(320 << 20),
            budget_bytes: Some(330 << 20),
            host_peak_bytes: None,
            before: Some(HeldOut { pairs: 200, loss: std::f64::consts::LN_2, accuracy: 0.5, margin: 0.0 }),
            after: Some(HeldOut { pairs: 200, loss: 0.512, accuracy: 0.715, margin: 0.4321 }),
            samples: Some(SampleFigures { samples: 100, positive: Some([0.5, 0.97]), kl: Some(3.25) }),
            files: vec![made("adapter", "runs/hh/adapter"), made("report", "runs/hh/report.html")],
            next: "dpo-lora generate base --adapter runs/hh/adapter --compare".into(),
        }
    }

    #[test]
    fn the_text_says_what_changed_and_what_to_type() {
        let expected = "\
Trained 64 steps on 1024 pairs in 3 min 05 s (5.54 pairs/s, 1190 tokens/s); the whole run took 3 min 21 s.
Peak anonymous memory: 312 MiB (320 MiB predicted).

Held out (200 pairs)          before     after
  loss                        0.6931    0.5120
  reward accuracy              0.500     0.715
  reward margin               0.0000    0.4321

Samples (100 of each)           base     tuned
  positive                     50.0%     97.0%
  KL to the base, nats                    3.25

adapter  runs/hh/adapter
report   runs/hh/report.html

Next: dpo-lora generate base --adapter runs/hh/adapter --compare";
        assert_eq!(summary().to_string(), expected);
    }

    #[test]
    fn without_held_out_pairs_or_a_measurement_it_says_less() {
        let text = Summary { before: None, after: None, samples: None, peak_bytes: None, ..summary() }.to_string();
        assert!(!text.contains("Held out") && text.contains("not measured"), "{text}");
    }

    #[test]
    fn on_a_device_its_memory_and_the_host_s_are_told_apart() {
        let text = Summary { on_device: true, host_peak_bytes: Some(90 << 20), ..summary() }.to_string();
        assert!(
            text.contains("Peak device memory: 312 MiB (320 MiB predicted); 90 MiB of the host's, anonymous.\n"),
            "{text}"
        );
    }

    #[test]
    fn the_json_form_is_one_object() {
        let json = serde_json::to_value(summary()).expect("plain data");
        assert_eq!(json["after"]["accuracy"], 0.715);
        assert_eq!(json["files"][1]["path"], "runs/hh/report.html");
    }
}
