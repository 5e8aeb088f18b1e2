//! Steps that are left out: a number that is not finite reaches neither the optimizer nor a checkpoint.

use super::{rows::Rows, run::Run};
use crate::{Error, Result, objective::rows::SkippedRow};

/// Steps left out in a row after which a run ends: by then it is no single row that is at fault.
pub(super) const IN_A_ROW: u64 = 3;

/// Rows that a message names at most.
const NAMED: usize = 8;

impl Run<'_> {
    /// Leaves out the step that `error` came of, or passes on an error of another kind. The adapter and the optimizer
    /// are as they were before it; it counts as a step all the same, since rates and rows go by the step.
    ///
    /// # Errors
    /// After [`IN_A_ROW`] of them [`Error::Run`], or [`Error::Input`] where a file from outside is at fault. What was
    /// learned before is saved then, so that a resumed run goes on behind these steps.
    pub(super) fn skip(&mut self, step: usize, error: Error) -> Result<()> {
        let Error::NotFinite { why, rows, outside } = error else { return Err(error) };
        let done = step + 1;
        let rows: Vec<String> = rows.iter().map(|row| self.rows.place(*row, false)).collect();
        let place = shortened(&rows);
        self.progress.note(&format!("step {done} is left out: {place}: {why}"));
        let (step, epoch, num_tokens) = (done as u64, self.epoch(done), self.num_tokens);
        self.metrics.append(&SkippedRow { step, epoch, why: why.clone(), rows, num_tokens }.to_json())?;
        self.skipped += 1;
        if self.skipped < IN_A_ROW {
            return Ok(());
        }
        if done as u64 > self.skipped {
            self.skipped = 0;
            self.save(done)?;
        }
        let message = format!("{IN_A_ROW} steps in a row were left out; of the last: {place}: {why}");
        Err(if outside { Error::input(message) } else { Error::run(message) })
    }
}

/// Names the held-out row that an error in an evaluation came of.
pub(super) fn named(error: Error, rows: &Rows) -> Error {
    let Error::NotFinite { why, rows: of, outside } = error else { return error };
    let places: Vec<String> = of.iter().map(|row| rows.place(*row, true)).collect();
    let message = format!("{}: {why}", shortened(&places));
    if outside { Error::input(message) } else { Error::run(message) }
}

fn shortened(rows: &[String]) -> String {
    let named = rows.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match rows.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}
