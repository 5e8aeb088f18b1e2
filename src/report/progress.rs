//! What the run is doing now, on stderr: a bar on a terminal, plain lines elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units;

/// Least time between two plain lines of a stage, so that a log of a long run stays readable.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
/// How often a bar redraws by itself: long steps must not look like a hang.
const TICK: Duration = Duration::from_millis(200);

/// The parts of a run that take time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Optimizer steps.
    Training,
    /// Held-out pairs.
    Evaluation,
    /// Samples of base and tuned model.
    Sampling,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Evaluation => "evaluation",
            Self::Sampling => "sampling",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Training => "steps",
            Self::Evaluation => "pairs",
            Self::Sampling => "samples",
        }
    }
}

/// Figures shown beside the count; what is not known is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Figures {
    /// Mean loss.
    pub loss: Option<f64>,
    /// Reward accuracy, 0 to 1.
    pub accuracy: Option<f64>,
    /// Reward margin.
    pub margin: Option<f64>,
    /// Pairs worked on since the stage began, for the speed.
    pub pairs: Option<u64>,
}

/// Where progress goes. Stages may lie within one another, as an evaluation within training.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Bars on the terminal behind stderr.
    Bars {
        /// Draws the stages under way one below the other.
        bars: MultiProgress,
        /// Whether colours are wanted.
        colour: bool,
    },
    /// Plain lines on stderr.
    Lines,
}

impl Progress {
    /// A bar where stderr is a terminal that can move its cursor, else plain lines. `NO_COLOR` is honoured.
    pub fn stderr() -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if std::io::stderr().is_terminal() && !dumb {
            let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            Self::Bars { bars, colour: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
        } else {
            Self::Lines
        }
    }

    /// Says something between or beside the stages.
    pub fn note(&self, text: &str) {
        match self {
            // A terminal that is gone is no reason to stop a run.
            Self::Bars { bars, .. } => drop(bars.println(text)),
            Self::Lines => line(&mut std::io::stderr(), text),
        }
    }

    /// Begins a stage that has `done` of its `total` behind it (more than 0 in a resumed run).
    pub fn start(&self, phase: Phase, done: u64, total: u64) -> Stage {
        match self {
            Self::Bars { bars, colour } => {
                let bar = bars.add(ProgressBar::new(total)).with_position(done).with_prefix(phase.name());
                bar.set_style(style(*colour));
                bar.enable_steady_tick(TICK);
                Stage::new(phase, done, total, Out::Bar(bar))
            }
            Self::Lines => Stage::new(phase, done, total, Out::Lines(Box::new(std::io::stderr()))),
        }
    }
}

/// One phase under way. Dropped without [`Stage::finish`], as by an error, it leaves no bar behind.
pub struct Stage {
    phase: Phase,
    first: u64,
    done: u64,
    total: u64,
    figures: Figures,
    started: Instant,
    printed: Option<Instant>,
    out: Out,
}

enum Out {
    Bar(ProgressBar),
    Lines(Box<dyn Write + Send>),
}

impl Stage {
    fn new(phase: Phase, done: u64, total: u64, out: Out) -> Self {
        let started = Instant::now();
        Self { phase, first: done, done, total, figures: Figures::default(), started, printed: None, out }
    }

    /// `done` of the total is behind us.
    pub fn update(&mut self, done: u64, figures: Figures) {
        (self.done, self.figures) = (done, figures);
        let detail = self.detail(self.started.elapsed());
        match &mut self.out {
            Out::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(detail);
            }
            Out::Lines(out) => {
                if self.printed.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
                    self.printed = Some(Instant::now());
                    line(out, &format!("{} {done}/{} {}{detail}", self.phase.name(), self.total, self.phase.unit()));
                }
            }
        }
    }

    /// Ends the stage with one line that says how long it took.
    pub fn finish(mut self) {
        let elapsed = self.started.elapsed();
        let figures = describe(&self.figures, elapsed);
        let (count, unit) = (self.done - self.first.min(self.done), self.phase.unit());
        let text = format!("{}: {count} {unit} in {}{figures}", self.phase.name(), units::duration(elapsed));
        match &mut self.out {
            Out::Bar(bar) => {
                bar.println(text);
                bar.finish_and_clear();
            }
            Out::Lines(out) => line(out, &text),
        }
    }

    /// The figures and the time left, after `elapsed`.
    fn detail(&self, elapsed: Duration) -> String {
        let mut text = describe(&self.figures, elapsed);
        let (taken, left) = (self.done.saturating_sub(self.first), self.total.saturating_sub(self.done));
        if taken > 0 && left > 0 {
            let left = Duration::try_from_secs_f64(elapsed.as_secs_f64() * left as f64 / taken as f64);
            let left = units::duration(left.unwrap_or(Duration::MAX));
            write!(text, " · {left} left").expect("a string takes all that is written");
        }
        text
    }
}

/// ` · loss 0.6931 · accuracy 0.56 · …`, what is not known left out.
fn describe(figures: &Figures, elapsed: Duration) -> String {
    let speed = figures.pairs.map(|pairs| pairs as f64 / elapsed.as_secs_f64().max(1e-9));
    [
        figures.loss.map(|loss| format!(" · loss {loss:.4}")),
        figures.accuracy.map(|accuracy| format!(" · accuracy {accuracy:.2}")),
        figures.margin.map(|margin| format!(" · margin {margin:+.3}")),
        speed.map(|speed| format!(" · {speed:.2} pairs/s")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Progress that nobody can read (a closed stderr) is no reason to stop the run.
fn line(out: &mut dyn Write, text: &str) {
    writeln!(out, "{text}").ok();
}

fn style(colour: bool) -> ProgressStyle {
    let template = if colour {
        "{spinner:.cyan} {prefix:.bold} {bar:24.cyan/blue} {pos}/{len}{msg}"
    } else {
        "{spinner} {prefix} {bar:24} {pos}/{len}{msg}"
    };
    ProgressStyle::with_template(template).expect("the template is a constant that a test draws").progress_chars("━╸─")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("one thread").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn figures(pairs: u64) -> Figures {
        Figures { loss: Some(0.69312), accuracy: Some(0.5), margin: Some(0.0123), pairs: Some(pairs) }
    }

    #[test]
    fn plain_lines_are_few_and_the_last_one_sums_up() {
        let out = Shared::default();
        let mut stage = Stage::new(Phase::Training, 2, 6, Out::Lines(Box::new(out.clone())));
        for step in 3..=6 {
            stage.update(step, figures(16 * (step - 2)));
        }
        stage.finish();
        let text = String::from_utf8(out.0.lock().expect("one thread").clone()).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("training 3/6 steps · loss 0.6931 · accuracy 0.50 · margin +0.012 · "), "{text}");
        assert!(lines[1].starts_with("training: 4 steps in 0.0 s · loss 0.6931"), "{text}");
    }

    #[test]
    fn speed_and_time_left_count_from_where_the_stage_began() {
        let mut stage = Stage::new(Phase::Training, 10, 40, Out::Lines(Box::new(std::io::sink())));
        stage.update(20, figures(160));
        let detail = stage.detail(Duration::from_secs(60));
        assert!(detail.ends_with(" · 2.67 pairs/s · 2 min 00 s left"), "{detail}");
        stage.update(40, Figures::default());
        assert_eq!(stage.detail(Duration::from_secs(60)), "");
    }

    #[test]
    fn bars_can_be_drawn_in_every_phase_and_within_one_another() {
        for colour in [true, false] {
            let progress =
                Progress::Bars { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), colour };
            let outer = progress.start(Phase::Training, 0, 2);
            for phase in [Phase::Training, Phase::Evaluation, Phase::Sampling] {
                let mut stage = progress.start(phase, 0, 2);
                stage.update(1, figures(1));
                progress.note("a note");
                stage.finish();
            }
            outer.finish();
        }
    }
}
