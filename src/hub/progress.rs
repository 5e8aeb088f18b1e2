//! What a person sees of a download: a bar on a terminal, plain lines elsewhere; always on stderr.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Where a download tells how far it is.
pub struct Progress(Out);

enum Out {
    Bars,
    Lines(Mutex<Box<dyn Write + Send>>),
}

/// A plain log hears of a long download this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// Bars on stderr if it is a terminal, else lines there.
    pub fn stderr() -> Self {
        match std::io::stderr().is_terminal() {
            true => Self(Out::Bars),
            false => Self::lines(std::io::stderr()),
        }
    }

    /// Lines to `out`.
    pub fn lines(out: impl Write + Send + 'static) -> Self {
        Self(Out::Lines(Mutex::new(Box::new(out))))
    }

    /// One line of its own.
    pub(super) fn note(&self, text: &str) {
        match &self.0 {
            Out::Bars => drop(writeln!(std::io::stderr(), "{text}")),
            // a log that nobody reads any more must not stop the download
            Out::Lines(out) => drop(writeln!(out.lock().unwrap_or_else(|e| e.into_inner()), "{text}")),
        }
    }

    /// Begins a file of `size` bytes.
    pub(super) fn begin(&self, file: &str, size: Option<u64>) -> Transfer<'_> {
        let bar = match self.0 {
            Out::Bars => Some(bar(file, size)),
            Out::Lines(_) => {
                let size = size.map(|s| format!(" ({})", HumanBytes(s))).unwrap_or_default();
                self.note(&format!("downloading {file}{size}"));
                None
            }
        };
        Transfer { progress: self, file: file.to_string(), size, bar, spoke: Instant::now() }
    }
}

/// A file on its way.
pub(super) struct Transfer<'a> {
    progress: &'a Progress,
    file: String,
    size: Option<u64>,
    bar: Option<ProgressBar>,
    spoke: Instant,
}

impl Transfer<'_> {
    /// So many bytes of the file are here.
    pub fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        } else if self.spoke.elapsed() >= LINE_EVERY {
            self.spoke = Instant::now();
            let size = self.size.map(|s| format!(" of {}", HumanBytes(s))).unwrap_or_default();
            self.progress.note(&format!("  {}: {}{size}", self.file, HumanBytes(bytes)));
        }
    }

    /// A line beside the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.progress.note(text)),
            None => self.progress.note(text),
        }
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

fn bar(file: &str, size: Option<u64>) -> ProgressBar {
    let template = match size {
        Some(_) => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        None => "{msg} {spinner} {bytes} {bytes_per_sec}",
    };
    let bar = size.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_message(file.to_string())
}
