//! Keeps the pool's threads awake while a step's many short parallel loops follow one another.
//!
//! A thread that finds nothing to do falls asleep within some tens of microseconds, and waking it takes as long again:
//! as long as many a loop itself. Between the loops of a step the others therefore go on looking for work.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

/// Looks for work in vain after which a thread takes naps instead: whoever works is at something long, as at a disk.
const LOOKS: u32 = 4096;
/// A nap.
const NAP: Duration = Duration::from_micros(50);

/// Whether threads are kept awake. For one at a time: two that waited for work on top of each other's would wait for good.
static KEPT: AtomicBool = AtomicBool::new(false);

/// Does `work` within rayon's pool; meanwhile its other threads stay awake, unless they do for somebody else already.
pub fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if KEPT.swap(true, Ordering::AcqRel) {
        return rayon::scope(|_| work());
    }
    let _kept = Set(&KEPT, false);
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let here = rayon::current_thread_index();
        let done = &done;
        scope.spawn_broadcast(move |_, thread| {
            // the one that works must not wait for its own end
            if Some(thread.index()) != here {
                look_for_work(done);
            }
        });
        // also where the work panics: the scope waits for the others
        let _end = Set(done, true);
        work()
    })
}

/// Sets a flag when it goes.
struct Set<'a>(&'a AtomicBool, bool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::Release);
    }
}

fn look_for_work(done: &AtomicBool) {
    let mut looks = 0;
    while !done.load(Ordering::Acquire) {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => looks = 0,
            _ if looks < LOOKS => {
                looks += 1;
                thread::yield_now();
            }
            _ => thread::sleep(NAP),
        }
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_done_and_the_others_come_back() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let sum = || awake(|| (0..100).map(|n| (0..n).into_par_iter().sum::<u64>()).sum::<u64>());
        for _ in 0..20 {
            assert_eq!(pool.install(sum), (0..100).map(|n: u64| n * n.saturating_sub(1) / 2).sum::<u64>());
        }
        // within itself, and on more threads at once than there are
        let nested = pool.install(|| (0..8).into_par_iter().map(|_| awake(sum)).collect::<Vec<_>>());
        assert_eq!(nested, vec![sum(); 8]);
    }

    #[test]
    fn a_panic_comes_through() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let panics = || pool.install(|| awake(|| panic!("of the work")));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).is_err());
        assert_eq!(pool.install(|| awake(|| 7)), 7);
    }
}
