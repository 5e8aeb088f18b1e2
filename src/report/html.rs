//! `report.html`: the run's curves and samples on one self-contained page, with what the curves mean.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::chart::{Series, escape, line_chart, put};
use crate::{Result, store};

const STYLE: &str = include_str!("report.css");
const EXPLANATION: &str = include_str!("explanation.html");

/// A line of a chart: what it is called, its class in the style, and its name in `metrics.jsonl`.
type Line = (&'static str, &'static str, &'static str);

/// What is drawn: charts and their lines.
const CHARTS: [(&str, &[Line]); 4] = [
    ("Loss", &[("train", "a", "loss"), ("held out", "b", "eval_loss")]),
    (
        "Rewards",
        &[
            ("chosen", "a", "rewards/chosen"),
            ("rejected", "c", "rewards/rejected"),
            ("chosen, held out", "b", "eval_rewards/chosen"),
            ("rejected, held out", "d", "eval_rewards/rejected"),
        ],
    ),
    ("Reward margin", &[("train", "a", "rewards/margins"), ("held out", "b", "eval_rewards/margins")]),
    ("Reward accuracy", &[("train", "a", "rewards/accuracies"), ("held out", "b", "eval_rewards/accuracies")]),
];

/// What the page shows.
#[derive(Debug, Clone, Default)]
pub struct Page<'a> {
    /// The run's name.
    pub title: &'a str,
    /// Facts under the title, e.g. `("base", "…")`.
    pub facts: &'a [(&'a str, String)],
    /// What is drawn.
    pub curves: Curves,
    /// What base and tuned model wrote.
    pub samples: &'a [Sample],
    /// A sentence above the samples, e.g. the share of positive ones; may be empty.
    pub samples_note: &'a str,
}

/// The figures of `metrics.jsonl` that are drawn, each as `(step, value)` by the step.
#[derive(Debug, Clone, Default)]
pub struct Curves(BTreeMap<&'static str, Vec<(f64, f64)>>);

impl Curves {
    /// Those of `rows`, of which none is held.
    ///
    /// # Errors
    /// The first of the rows'.
    pub fn of(rows: impl Iterator<Item = Result<Value>>) -> Result<Self> {
        let mut curves = Self::default();
        for row in rows {
            let row = row?;
            for (_, _, name) in CHARTS.iter().flat_map(|(_, lines)| *lines) {
                if let Some(point) = row["step"].as_f64().zip(row[name].as_f64()) {
                    curves.0.entry(name).or_default().push(point);
                }
            }
        }
        Ok(curves)
    }
}

/// One prompt with what base and tuned model wrote after it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// The base's answer.
    pub base: String,
    /// The tuned model's answer.
    pub tuned: String,
}

impl Page<'_> {
    /// Writes the page to `path`.
    pub fn write(&self, path: &Path) -> Result<()> {
        store::write_text(path, &self.render())
    }

    /// The page as HTML.
    pub fn render(&self) -> String {
        let mut html = String::new();
        let (out, title) = (&mut html, escape(self.title));
        put(out, format_args!("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"));
        put(out, format_args!("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"));
        put(out, format_args!("<title>{title}</title>\n<style>\n{STYLE}</style></head><body>\n<h1>{title}</h1>\n<dl>"));
        for (name, value) in self.facts {
            put(out, format_args!("<dt>{}</dt><dd>{}</dd>", escape(name), escape(value)));
        }
        put(out, format_args!("</dl>\n<h2>Curves</h2>\n<div class=\"charts\">\n"));
        put(out, format_args!("{}</div>\n{}{EXPLANATION}", self.charts(), self.chosen_reward()));
        if !self.samples.is_empty() {
            put(out, format_args!("<h2>Samples</h2>\n<p>{}</p>\n", escape(self.samples_note)));
            put(out, format_args!("<table><tr><th>prompt</th><th>base</th><th>tuned</th></tr>\n"));
            for sample in self.samples {
                let [prompt, base, tuned] = [&sample.prompt, &sample.base, &sample.tuned].map(|text| escape(text));
                put(out, format_args!("<tr><td>{prompt}</td><td>{base}</td><td>{tuned}</td></tr>\n"));
            }
            put(out, format_args!("</table>\n"));
        }
        put(out, format_args!("</body></html>\n"));
        html
    }

    fn charts(&self) -> String {
        let series = |&(name, class, key): &Line| {
            // an evaluation is a point that is marked, a step is not
            Series { name, class, marked: key.starts_with("eval_"), points: self.curve(key) }
        };
        let drawn: String = CHARTS
            .iter()
            .filter_map(|(title, lines)| line_chart(title, "optimizer step", lines.iter().map(series).collect()))
            .collect();
        if drawn.is_empty() { "<p>No step was logged.</p>\n".into() } else { drawn }
    }

    /// What became of the chosen reward in this run.
    fn chosen_reward(&self) -> String {
        let last = |key| self.curve(key).last().map(|point| point.1);
        let held_out = last("eval_rewards/chosen").zip(last("eval_rewards/rejected"));
        let Some((chosen, rejected)) = held_out.or_else(|| last("rewards/chosen").zip(last("rewards/rejected"))) else {
            return String::new();
        };
        let verdict = match (chosen < 0.0, chosen > rejected) {
            (true, true) => "The chosen reward fell, the rejected one further: the usual picture, see below.",
            (false, true) => "The chosen reward rose and lies above the rejected one.",
            (_, false) => "The chosen reward does not lie above the rejected one: nothing was learned yet, see below.",
        };
        format!(
            "<p><strong>In this run</strong> rewards ended at {chosen:+.3} (chosen) and {rejected:+.3} (rejected). {verdict}</p>\n"
        )
    }

    fn curve(&self, name: &str) -> Vec<(f64, f64)> {
        self.curves.0.get(name).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn page<'a>(rows: &[Value], samples: &'a [Sample]) -> Page<'a> {
        let curves = Curves::of(rows.iter().cloned().map(Ok)).unwrap();
        Page { title: "runs/<hh>", facts: &[], curves, samples, samples_note: "" }
    }

    #[test]
    fn the_page_stands_alone_and_holds_the_curves() {
        let rows = [
            json!({"step": 0, "eval_loss": 0.69, "eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0}),
            json!({"step": 1, "loss": 0.7, "rewards/chosen": 0.0, "rewards/rejected": 0.1, "rewards/margins": -0.1, "rewards/accuracies": 0.5}),
            json!({"step": 2, "loss": 0.6, "rewards/chosen": -0.2, "rewards/rejected": -0.4, "rewards/margins": 0.2, "rewards/accuracies": 1.0}),
            json!({"step": 2, "eval_loss": 0.61, "eval_rewards/chosen": -0.25, "eval_rewards/rejected": -0.5}),
        ];
        let html = page(&rows, &[]).render();
        assert_eq!(html.matches("<svg").count(), 4);
        assert_eq!(html.matches("<polyline").count(), 8);
        assert!(html.contains("ended at -0.250 (chosen) and -0.500 (rejected). The chosen reward fell"));
        assert!(html.contains("is it broken?"));
        for outside in ["http://", "https://", "<script", "src=", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn text_from_models_cannot_break_out() {
        let samples = [Sample {
            prompt: "</td><script>alert(1)</script>".into(),
            base: "a & b".into(),
            tuned: "\"quoted\"".into(),
        }];
        let html = page(&[], &samples).render();
        assert!(html.contains("<td>&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;</td><td>a &amp; b</td>"));
        assert!(html.contains("<h1>runs/&lt;hh&gt;</h1>") && html.contains("No step was logged."));
        assert!(!html.contains("<script"));
    }
}
