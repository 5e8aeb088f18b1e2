//! Ctrl-C and `kill` as a flag that a run polls on its way, so that a stopped run is a saved run.
//!
//! While a run loads there is nothing to save: SIGINT, SIGTERM or, where there is one, SIGHUP ends the process at once
//! with 128 + its number (130, 143, 129). From [`Signals::hold`] on the first one sets the flag, and after a SIGINT or
//! SIGTERM the next one ends the process at once, for the person who will not wait. Under `nohup` a SIGHUP stays
//! ignored. Windows has the first two.

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
    /// Whether the next signal ends the process.
    at_once: Arc<AtomicBool>,
}

impl Signals {
    /// Catches the signals from now on, for the life of the process, and lets them end it. Once is enough.
    pub fn install() -> Result<Self> {
        let caught = Arc::new(AtomicUsize::new(0));
        let at_once = Arc::new(AtomicBool::new(true));
        let failed = |error| Error::run(format!("signals cannot be caught: {error}"));
        for signal in [SIGINT, SIGTERM].into_iter().chain(hangup()) {
            // Actions run in the order of registration: the exit looks at the flag before this signal sets it.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&at_once)).map_err(failed)?;
            // shells pass a hangup on beside the system's own: two of them are one person's wish
            if Some(signal) != hangup() {
                flag::register(signal, Arc::clone(&at_once)).map_err(failed)?;
            }
            flag::register_usize(signal, Arc::clone(&caught), signal as usize).map_err(failed)?;
        }
        Ok(Self { caught, at_once })
    }

    /// From now on there is something to save: the first signal is polled, and the one after a SIGINT or SIGTERM ends
    /// the process.
    pub fn hold(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// [`Error::Stopped`] once a signal was caught: for long work to end at its next whole piece.
    pub fn stopped(&self) -> Result<()> {
        #[cfg(debug_assertions)]
        polls::poll();
        self.stop_requested().map_or(Ok(()), |signal| Err(Error::Stopped(signal)))
    }

    /// The signal (1, 2 or 15) that asked the run to stop: finish the step, save, and end with [`Error::Stopped`].
    pub fn stop_requested(&self) -> Option<i32> {
        match self.caught.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }
}

/// SIGHUP, a terminal that goes away, unless who started the process had it ignored.
#[cfg(unix)]
fn hangup() -> Option<i32> {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the present one into `action`, which is read where it
    // succeeded.
    let ignored = unsafe {
        libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    };
    (!ignored).then_some(libc::SIGHUP)
}

#[cfg(not(unix))]
fn hangup() -> Option<i32> {
    None
}

/// A signal on demand, as one of the run's looks at [`Signals::stopped`] begins. Only in builds with debug assertions.
#[cfg(debug_assertions)]
pub mod polls {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static AT: AtomicUsize = AtomicUsize::new(usize::MAX);
    static COUNT: AtomicUsize = AtomicUsize::new(0);

    /// SIGTERM comes as look number `at` of this process, counted from 0, begins.
    pub fn plan(at: usize) {
        AT.store(at, Ordering::SeqCst);
    }

    /// How many looks there were.
    pub fn count() -> usize {
        COUNT.load(Ordering::SeqCst)
    }

    pub(super) fn poll() {
        if COUNT.fetch_add(1, Ordering::SeqCst) == AT.load(Ordering::SeqCst) {
            signal_hook::low_level::raise(signal_hook::consts::SIGTERM).expect("raised");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the child that raises the signals: they would end the whole test program.
    const CHILD: &str = "DPO_LORA_TEST_SIGNALS";
    /// Set where the child has something to save.
    const HELD: &str = "DPO_LORA_TEST_SIGNALS_HELD";

    /// As a terminal's end reaches a program that a shell runs in it.
    #[cfg(unix)]
    #[test]
    fn two_hangups_leave_time_to_save() -> Result<()> {
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: nothing else in this process looks at the signal; who runs the tests may have it ignored.
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
            let signals = Signals::install()?;
            signals.hold();
            for _ in 0..2 {
                signal_hook::low_level::raise(libc::SIGHUP).expect("raised");
                assert_eq!(signals.stop_requested(), Some(libc::SIGHUP));
            }
            return Ok(());
        }
        let mut child = Command::new(std::env::current_exe().expect("this test program"));
        child.args(["--exact", "train::signals::tests::two_hangups_leave_time_to_save"]).env(CHILD, "1");
        let output = child.output().expect("the child runs");
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
        Ok(())
    }

    #[test]
    fn the_first_signal_is_polled_once_held_and_the_next_ends_the_process() -> Result<()> {
        if let Ok(signal) = std::env::var(CHILD) {
            let signal: i32 = signal.parse().expect("a number");
            let signals = Signals::install()?;
            if std::env::var_os(HELD).is_some() {
                signals.hold();
                assert_eq!(signals.stop_requested(), None);
                signal_hook::low_level::raise(SIGTERM).expect("raised");
                assert_eq!(signals.stop_requested(), Some(SIGTERM));
            }
            signal_hook::low_level::raise(signal).expect("raised");
            unreachable!("this signal ends the process");
        }
        let program = std::env::current_exe().expect("this test program");
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
            for held in [true, false] {
                let mut child = Command::new(&program);
                let test = "the_first_signal_is_polled_once_held_and_the_next_ends_the_process";
                child.args(["--exact", &format!("train::signals::tests::{test}")]).env(CHILD, signal.to_string());
                if held {
                    child.env(HELD, "1");
                }
                let output = child.output().expect("the child runs");
                assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stdout));
            }
        }
        Ok(())
    }
}
