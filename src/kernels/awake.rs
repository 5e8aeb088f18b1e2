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

/// Does `work` within rayon's pool; meanwhile its other threads stay awake.
pub fn awake<T: Send>(work: impl FnOnce() -> T + Send) -> T {
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
        let _end = End(done);
        work()
    })
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
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
