//! A run of the binary that is stopped by a signal at a place that a test chooses.

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::tiny::{Tiny, stderr};

/// Longest wait for a run to get where a test wants it.
const PATIENCE: Duration = Duration::from_secs(300);

/// A run under way.
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts the binary with these arguments in the folder; what it says is kept.
    pub fn start(tiny: &Tiny, arguments: &[String]) -> Self {
        let mut command = tiny.command(arguments);
        Self { child: command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap() }
    }

    /// Waits until `there` holds, sends the signal, and waits for the end; none where the run was done before.
    pub fn stop(mut self, signal: &str, there: impl Fn() -> bool) -> Option<Output> {
        let began = Instant::now();
        while !there() {
            assert!(began.elapsed() < PATIENCE, "the run does not get there");
            if self.child.try_wait().unwrap().is_some() {
                let output = self.child.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", stderr(&output));
                return None;
            }
            sleep(Duration::from_micros(200));
        }
        self.signal(signal);
        Some(self.child.wait_with_output().unwrap()).filter(|output| !output.status.success())
    }

    /// Waits until stderr holds `part`, sends the signal, and waits for the end.
    pub fn stop_when_said(mut self, signal: &str, part: &str) -> Output {
        let mut said = Vec::new();
        let mut stderr = self.child.stderr.take().unwrap();
        while !String::from_utf8_lossy(&said).contains(part) {
            let mut byte = [0];
            assert_eq!(stderr.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
        self.signal(signal);
        stderr.read_to_end(&mut said).unwrap();
        Output { stderr: said, ..self.child.wait_with_output().unwrap() }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}
