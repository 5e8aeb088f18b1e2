//! Measured peak of this process's anonymous resident memory: what the run really took, the mapped base left out.
//!
//! On Linux it is `RssAnon` of `/proc/self/status`, read by a thread every `INTERVAL` and wherever the run calls
//! [`MemoryMeter::sample`]. Other systems have no counter that is both safe to read and leaves mapped files out: there
//! nothing is reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two readings by the thread. A reading takes about 30 µs, so this costs under 1 % of a core.
const INTERVAL: Duration = Duration::from_millis(5);

/// Keeps the highest reading while it lives.
#[derive(Debug)]
pub struct MemoryMeter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Reads the counter, in bytes.
    read: Box<dyn Fn() -> Option<u64> + Send + Sync>,
    /// Highest reading in bytes; 0: none yet.
    peak: AtomicU64,
    ended: AtomicBool,
}

impl MemoryMeter {
    /// Starts to measure this process's anonymous memory.
    pub fn start() -> Self {
        Self::of(anonymous_bytes)
    }

    /// Starts to measure whatever `read` says, in bytes and from any thread; none where it cannot say.
    pub fn of(read: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        let shared = Shared { read: Box::new(read), peak: AtomicU64::new(0), ended: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        let mut meter = Self { shared: Arc::clone(&shared), thread: None };
        if meter.sample().is_some() {
            let name = "memory-meter".to_string();
            meter.thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || {
                    while !shared.ended.load(Ordering::Relaxed) {
                        std::thread::park_timeout(INTERVAL);
                        shared.sample();
                    }
                })
                // Without the thread the explicit samples remain.
                .ok();
        }
        meter
    }

    /// Reads the counter now and returns it in bytes; none where it cannot be measured. Call it where memory is
    /// expected to be highest: the thread may miss a short peak.
    pub fn sample(&self) -> Option<u64> {
        self.shared.sample()
    }

    /// The highest reading so far, in bytes; none where it cannot be measured.
    pub fn peak(&self) -> Option<u64> {
        match self.shared.peak.load(Ordering::Relaxed) {
            0 => None,
            peak => Some(peak),
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "a peak of {} bytes", self.peak.load(Ordering::Relaxed))
    }
}

impl Drop for MemoryMeter {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread only reads a counter: if it died there is nothing to tell.
            thread.join().ok();
        }
    }
}

impl Shared {
    fn sample(&self) -> Option<u64> {
        let bytes = (self.read)()?;
        self.peak.fetch_max(bytes, Ordering::Relaxed);
        Some(bytes)
    }
}

/// Anonymous resident memory of this process, in bytes.
#[cfg(target_os = "linux")]
fn anonymous_bytes() -> Option<u64> {
    rss_anon(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Not measured here.
#[cfg(not(target_os = "linux"))]
fn anonymous_bytes() -> Option<u64> {
    None
}

/// The `RssAnon` line of a status file, in bytes.
#[cfg(any(target_os = "linux", test))]
fn rss_anon(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_or_nothing_is_said() {
        assert_eq!(rss_anon("VmRSS:\t   900 kB\nRssAnon:\t     312 kB\nRssFile:\t 588 kB\n"), Some(312 * 1024));
        assert_eq!(rss_anon("VmRSS:\t   900 kB\n"), None);
        assert_eq!(rss_anon("RssAnon:\tmuch\n"), None);
    }
}
