//! Ctrl-C and `kill` as a flag that the loop polls between steps, so that a stopped run is a saved run.
//!
//! The first SIGINT or SIGTERM sets the flag; a second one of either ends the process at once with 128 + its number
//! (130 or 143), for the person who will not wait. Both signals exist on Windows too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::{Error, Result};

/// The signal that was caught first, if any.
#[derive(Debug, Clone)]
pub struct Signals {
    /// 0: none yet.
    caught: Arc<AtomicUsize>,
}

impl Signals {
    /// Catches SIGINT and SIGTERM from now on, for the life of the process. Call it once.
    pub fn install() -> Result<Self> {
        let caught = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        let failed = |error| Error::run(format!("signals cannot be caught: {error}"));
        for signal in [SIGINT, SIGTERM] {
            // Actions run in the order of registration: the exit looks at the flag before this signal sets it.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&again)).map_err(failed)?;
            flag::register(signal, Arc::clone(&again)).map_err(failed)?;
            flag::register_usize(signal, Arc::clone(&caught), signal as usize).map_err(failed)?;
        }
        Ok(Self { caught })
    }

    /// [`Error::Stopped`] once a signal was caught: for long work to end at its next whole piece.
    pub fn stopped(&self) -> Result<()> {
        self.stop_requested().map_or(Ok(()), |signal| Err(Error::Stopped(signal)))
    }

    /// The signal (2 or 15) that asked the run to stop: finish the step, save, and end with [`Error::Stopped`].
    pub fn stop_requested(&self) -> Option<i32> {
        match self.caught.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the child that raises the signals: they would end the whole test program.
    const CHILD: &str = "DPO_LORA_TEST_SIGNALS";

    #[test]
    fn the_first_signal_is_polled_and_the_second_ends_the_process() -> Result<()> {
        if let Ok(signal) = std::env::var(CHILD) {
            let signal: i32 = signal.parse().expect("a number");
            let signals = Signals::install()?;
            assert_eq!(signals.stop_requested(), None);
            signal_hook::low_level::raise(SIGTERM).expect("raised");
            assert_eq!(signals.stop_requested(), Some(SIGTERM));
            signal_hook::low_level::raise(signal).expect("raised");
            unreachable!("the second signal ends the process");
        }
        let program = std::env::current_exe().expect("this test program");
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
            let output = Command::new(&program)
                .args(["--exact", "train::signals::tests::the_first_signal_is_polled_and_the_second_ends_the_process"])
                .env(CHILD, signal.to_string())
                .output()
                .expect("the child runs");
            assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(())
    }
}
