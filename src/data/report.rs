//! What became of the rows: how many were read, used and refused, and how long they are.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::TokenizedPair;
use super::format::{Refusal, Shape};

/// How many places of a refusal are named.
const PLACES: usize = 5;

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// The files, in the order read.
    pub files: Vec<FileReport>,
    /// Rows read.
    pub rows: usize,
    /// Rows that became pairs.
    pub used: usize,
    /// Rows that did not, by reason.
    pub refused: BTreeMap<Refusal, Refused>,
    /// Pairs whose prompt was cut to fit `max_length`.
    pub truncated: usize,
    /// Pairs where the last tokens of the prompt alone merge with the answer's first, or the template writes the
    /// prompt otherwise before an answer: those tokens count as answer.
    pub seam_merges: usize,
    /// Answers without any token that ends a generation: the model does not learn to stop from them.
    pub answers_without_end: usize,
    /// Tokens of the pairs.
    pub tokens: Lengths,
}

/// One file's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// How its rows were read; nothing where it holds none.
    pub shape: Option<Shape>,
    /// Rows read from it.
    pub rows: usize,
}

/// The rows refused for one reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Refused {
    /// How many.
    pub count: usize,
    /// The first few, as `file:line`.
    pub places: Vec<String>,
}

/// Lengths in tokens over all pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shared prompt.
    pub prompt: Stats,
    /// The preferred answer.
    pub chosen: Stats,
    /// The other answer.
    pub rejected: Stats,
    /// What is computed: the prompt once and both answers.
    pub total: Stats,
    /// What `max_length` bounds: the prompt and the longer answer.
    pub longest: Stats,
}

/// One length over all pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stats {
    /// All together.
    pub sum: usize,
    /// On average.
    pub mean: f64,
    /// Half are at most this long.
    pub median: usize,
    /// 95 % are at most this long.
    pub p95: usize,
    /// The longest.
    pub max: usize,
}

impl Stats {
    /// Of these lengths; quantiles are the nearest rank.
    fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let Some(&max) = lengths.last() else { return Self::default() };
        let rank = |percent: usize| lengths[(lengths.len() * percent).div_ceil(100) - 1];
        let sum = lengths.iter().sum();
        Self { sum, mean: sum as f64 / lengths.len() as f64, median: rank(50), p95: rank(95), max }
    }
}

impl Lengths {
    /// Of these pairs.
    pub(super) fn of(pairs: &[TokenizedPair]) -> Self {
        let stats = |length: fn(&TokenizedPair) -> usize| Stats::of(pairs.iter().map(length).collect());
        Self {
            prompt: stats(|pair| pair.prompt.len()),
            chosen: stats(|pair| pair.chosen.len()),
            rejected: stats(|pair| pair.rejected.len()),
            total: stats(|pair| pair.prompt.len() + pair.chosen.len() + pair.rejected.len()),
            longest: stats(|pair| pair.prompt.len() + pair.chosen.len().max(pair.rejected.len())),
        }
    }
}

impl Report {
    /// Counts a refused row that stands at `place`.
    pub(super) fn refuse(&mut self, refusal: Refusal, place: impl FnOnce() -> String) {
        let refused = self.refused.entry(refusal).or_default();
        refused.count += 1;
        if refused.places.len() < PLACES {
            refused.places.push(place());
        }
    }

    /// One line: what a run says of its rows before it begins.
    pub fn summary(&self) -> String {
        let mut parts = vec![format!("{} rows read, {} used", self.rows, self.used)];
        for (refusal, refused) in &self.refused {
            let places = refused.places.join(", ");
            let more = if refused.count > refused.places.len() { ", …" } else { "" };
            parts.push(format!("{} refused ({}: {places}{more})", refused.count, refusal.describe()));
        }
        if self.truncated > 0 {
            parts.push(format!("{} prompts cut", self.truncated));
        }
        if self.seam_merges > 0 {
            parts.push(format!("{} seams merged", self.seam_merges));
        }
        if self.answers_without_end > 0 {
            parts.push(format!("{} answers without an end", self.answers_without_end));
        }
        parts.join(", ")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for file in &self.files {
            let shape = match file.shape {
                Some(Shape::Text) => "prompt, chosen, rejected as text",
                Some(Shape::ImplicitText) => "chosen, rejected as text, prompt in common",
                Some(Shape::Messages) => "prompt, chosen, rejected as messages",
                Some(Shape::ImplicitMessages) => "chosen, rejected as messages, prompt in common",
                Some(Shape::Hh) => "HH dialogues",
                None => "empty",
            };
            writeln!(f, "{}  {} rows  ({shape})", file.path.display(), file.rows)?;
        }
        writeln!(f)?;
        writeln!(f, "rows read               {:>9}", self.rows)?;
        writeln!(f, "used                    {:>9}", self.used)?;
        for (refusal, refused) in &self.refused {
            let more = if refused.count > refused.places.len() { ", …" } else { "" };
            writeln!(f, "refused                 {:>9}  {}", refused.count, refusal.describe())?;
            writeln!(f, "                                   at {}{more}", refused.places.join(", "))?;
        }
        writeln!(f, "prompts cut             {:>9}", self.truncated)?;
        writeln!(f, "seams merged            {:>9}", self.seam_merges)?;
        writeln!(f, "answers without an end  {:>9}", self.answers_without_end)?;
        writeln!(f)?;
        writeln!(f, "tokens              mean   median      p95      max        sum")?;
        let lengths = &self.tokens;
        for (name, stats) in [
            ("prompt", lengths.prompt),
            ("chosen", lengths.chosen),
            ("rejected", lengths.rejected),
            ("computed", lengths.total),
            ("max_length", lengths.longest),
        ] {
            let Stats { sum, mean, median, p95, max } = stats;
            writeln!(f, "{name:<12} {mean:>11.1} {median:>8} {p95:>8} {max:>8} {sum:>10}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_nearest_rank() {
        assert_eq!(
            Stats::of((1..=100).rev().collect()),
            Stats { sum: 5050, mean: 50.5, median: 50, p95: 95, max: 100 }
        );
        assert_eq!(Stats::of(vec![7]), Stats { sum: 7, mean: 7.0, median: 7, p95: 7, max: 7 });
        assert_eq!(Stats::of(vec![]), Stats::default());
    }

    #[test]
    fn refusals_are_counted_and_the_first_places_named() {
        let mut report = Report { rows: 8, used: 1, ..Report::default() };
        (1..8).for_each(|line| report.refuse(Refusal::TooLong, || format!("a.jsonl:{line}")));
        let summary = report.summary();
        assert_eq!(
            summary,
            "8 rows read, 1 used, 7 refused (over max_length: a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5, …)"
        );
    }

    #[test]
    fn what_a_model_would_learn_otherwise_is_said() {
        let report = Report { rows: 2, used: 2, seam_merges: 1, answers_without_end: 3, ..Report::default() };
        assert_eq!(report.summary(), "2 rows read, 2 used, 1 seams merged, 3 answers without an end");
    }
}
