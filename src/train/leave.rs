//! The end of a run: the adapter, samples, the report, the summary.

use std::{path::Path, time::Instant};

use super::{
    adapters, folder,
    run::{Count, Run},
    samples::{self, Drawn},
};
use crate::{
    Error, Result,
    engine::plan::Mib,
    export::Training,
    report::{
        Curves, Figures, MemoryMeter, Page, Phase, Summary, metrics_file,
        summary::{HeldOut, Made},
    },
    store,
};

/// Samples shown on the terminal.
const SHOWN: usize = 3;

/// In what the plan's promise was broken by a peak, all in bytes. `whole`: of a run from its first step to its last.
fn broken(peak: u64, predicted: u64, budget: u64, whole: bool) -> Option<String> {
    if peak > budget {
        return Some(format!("the peak was {}, above the budget of {}", Mib::up(peak), Mib(budget)));
    }
    let comparable = whole || peak > predicted;
    let off = comparable && predicted.abs_diff(peak) > predicted / 10;
    off.then(|| format!("the peak was {}, {} were predicted", Mib(peak), Mib(predicted)))
}

impl Run<'_> {
    /// Leaves the run's folder complete and says what came of it.
    pub(super) fn leave(
        &mut self,
        before: Option<HeldOut>,
        after: Option<HeldOut>,
        count: &Count,
        started: Instant,
    ) -> Result<Summary> {
        let output = &self.recipe.run.output;
        let adapter = output.join(folder::ADAPTER);
        let whole = store::Folder::create_atomic(&adapter)?;
        let training = Training { recipe: self.recipe, steps: Some(self.total_steps() as u64) };
        adapters::to_folder(&self.config, &self.adapter)?.write(whole.path(), Some(training))?;
        whole.finish()?;
        let drawn = self.draw()?;
        self.write_page(drawn.as_ref())?;

        let peak_bytes = self.memory.peak();
        // what a part of a run holds may be less than was predicted
        let whole = count.from_start && count.steps > 0;
        if let Some(broken) = peak_bytes.and_then(|peak| broken(peak, self.plan.peak(), self.budget, whole)) {
            self.progress.note(&format!("warning: {broken}; please report this"));
        }

        let made = |what: &str, name: &str| Made { what: what.into(), path: output.join(name).display().to_string() };
        let summary = Summary {
            steps: count.steps,
            pairs: count.pairs,
            tokens: count.tokens,
            train_seconds: count.time.as_secs_f64(),
            seconds: started.elapsed().as_secs_f64(),
            on_device: self.host.is_some(),
            peak_bytes,
            predicted_bytes: peak_bytes.map(|_| self.plan.peak()),
            budget_bytes: Some(self.budget).filter(|budget| *budget < u64::MAX),
            host_peak_bytes: self.host.as_ref().and_then(MemoryMeter::peak),
            before,
            after,
            samples: drawn.as_ref().map(Drawn::figures),
            files: vec![
                made("adapter", folder::ADAPTER),
                made("metrics", folder::METRICS),
                made("report", folder::REPORT),
            ],
            next: self.next(),
        };
        let text =
            serde_json::to_string_pretty(&summary).map_err(|error| Error::run(format!("no summary: {error}")))?;
        store::write_text(&output.join(folder::SUMMARY), &(text + "\n"))?;
        Ok(summary)
    }

    /// The run's curves and samples on a page.
    fn write_page(&self, drawn: Option<&Drawn>) -> Result<()> {
        let output = &self.recipe.run.output;
        let note = match drawn.and_then(|drawn| drawn.positive) {
            Some([before, after]) => {
                format!(
                    "Positive: {:.1} % of the base's samples, {:.1} % of the tuned model's.",
                    100.0 * before,
                    100.0 * after
                )
            }
            None => String::new(),
        };
        let page = Page {
            title: &output.display().to_string(),
            facts: &[("base", self.base.name.clone()), ("pairs", self.rows.train.len().to_string())],
            curves: Curves::of(metrics_file::rows(&output.join(folder::METRICS))?)?,
            samples: drawn.map_or(&[], |drawn| &drawn.samples[..drawn.samples.len().min(50)]),
            samples_note: &note,
        };
        page.write(&output.join(folder::REPORT))
    }

    /// The command that merges the adapter; a quantised base merges into a type that has to be named.
    fn next(&self) -> String {
        let quote = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
        let output = &self.recipe.run.output;
        let plain = |c: char| c.is_alphanumeric() || "/._-".contains(c) || (cfg!(windows) && r"\:".contains(c));
        let typed = |path: &Path| match path.to_string_lossy().chars().all(plain) {
            true => path.display().to_string(),
            false => quote(path),
        };
        let dtype = if self.base.folder.quantised().is_empty() { "" } else { " --dtype bf16" };
        format!("dpo-lora export {} --to merged {}{dtype}", typed(output), typed(&output.join("merged")))
    }

    /// Draws the recipe's samples and shows a few; none where it names no prompts.
    fn draw(&self) -> Result<Option<Drawn>> {
        let samples = &self.recipe.samples;
        if samples.prompts.is_empty() {
            return Ok(None);
        }
        let mut stage = self.progress.start(Phase::Sampling, 0, samples.count as u64);
        let (poll, at_once) = (|| self.signals.stopped(), self.plan.at_once);
        let drawn = samples::draw(&self.base, &self.adapter, samples, self.recipe.train.seed, at_once, &poll, |done| {
            stage.update(done, Figures::default());
        });
        let drawn = drawn.map_err(|error| match error {
            Error::Stopped(signal) => {
                self.progress.note("stopped while sampling; training is done and saved, --resume does the rest");
                Error::Stopped(signal)
            }
            error => error,
        })?;
        stage.finish();
        let apart = drawn.samples.len().div_ceil(SHOWN).max(1);
        for sample in drawn.samples.iter().step_by(apart) {
            let text = |text: &str| text.trim().replace('\n', " ");
            self.progress.note(&format!(
                "\n  prompt  {}\n  base    {}\n  tuned   {}",
                text(&sample.prompt),
                text(&sample.base),
                text(&sample.tuned)
            ));
        }
        Ok(Some(drawn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_above_the_budget_or_far_from_the_prediction_is_told() {
        const MIB: u64 = 1 << 20;
        let told =
            |peak: u64, predicted: u64, budget: u64, whole| broken(peak * MIB, predicted * MIB, budget * MIB, whole);
        assert_eq!(told(290, 288, 290, true), None);
        assert_eq!(told(291, 288, 290, false).as_deref(), Some("the peak was 291 MiB, above the budget of 290 MiB"));
        assert_eq!(told(200, 288, 290, true).as_deref(), Some("the peak was 200 MiB, 288 MiB were predicted"));
        assert_eq!(told(200, 288, 290, false), None);
        assert_eq!(told(400, 288, 500, false).as_deref(), Some("the peak was 400 MiB, 288 MiB were predicted"));
    }
}
