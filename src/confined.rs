//! Work on what strangers wrote, in a thread of its own with bounded memory, stack and time.
//!
//! The libraries that render templates and read tokenizers offer no bound on memory. [`Allocator`] gives one from
//! below: a confined thread draws on an allowance, and where it is used up the request is *not answered*: the thread
//! waits in the allocator for good, and whoever started it goes on with an error. (A failed request would end the
//! process, and unwinding out of an allocator is undefined.) A thread that takes too long is left behind likewise. So
//! a broken bound costs a sleeping or a busy thread until the process ends, which an error of this kind brings about.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// What confined work may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes that it may hold at a time; kept where the program's allocator is [`Allocator`].
    pub memory: usize,
    /// Bytes of address space for its stack, used only as far as they are touched.
    pub stack: usize,
    /// By the clock, while the process runs.
    pub time: Duration,
}

/// Why confined work gave nothing.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It panicked.
    Panic,
    /// It asked for more memory than it may hold.
    Memory,
    /// It took longer than it may.
    Time,
    /// There is no thread for it.
    NoThread(std::io::Error),
}

/// An allocator, with an allowance for confined threads; for a program's `#[global_allocator]`.
pub struct Allocator<Inner = System>(Inner);

impl Allocator {
    /// The system's.
    pub const SYSTEM: Self = Self(System);
}

impl<Inner> Allocator<Inner> {
    /// Another one.
    pub const fn over(inner: Inner) -> Self {
        Self(inner)
    }
}

/// Where a thread is told that its work is over.
struct Alarm {
    state: AtomicU8,
    waiting: Thread,
}

const RUNNING: u8 = 0;
const DONE: u8 = 1;
const STARVED: u8 = 2;

thread_local! {
    /// Bytes that this thread may still take. Neither of the two has a destructor or is made by an allocation, so the
    /// allocator may use them at any time.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    /// Whom to tell where they do not suffice; null: this thread is not confined.
    static ALARM: Cell<*const Alarm> = const { Cell::new(std::ptr::null()) };
    /// Whether a panic of this thread is expected, and its message for nobody.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Takes `bytes` off this thread's allowance; does not return where they are not left.
fn take(bytes: usize) {
    let alarm = ALARM.get();
    if alarm.is_null() {
        return;
    }
    let left = LEFT.get();
    if bytes <= left {
        return LEFT.set(left - bytes);
    }
    // SAFETY: not null, so `run` set it on this thread and has not unset it; its closure, which still runs below
    // this call, holds the `Arc` that the alarm lies in.
    let alarm = unsafe { &*alarm };
    alarm.state.store(STARVED, Ordering::Release);
    alarm.waiting.unpark();
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn give(bytes: usize) {
    if !ALARM.get().is_null() {
        LEFT.set(LEFT.get().saturating_add(bytes));
    }
}

// SAFETY: every call goes to the inner allocator with the arguments it came with; what is done before it touches
// thread-locals only, and allocates nothing.
unsafe impl<Inner: GlobalAlloc> GlobalAlloc for Allocator<Inner> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size.saturating_sub(layout.size()));
        give(layout.size().saturating_sub(size));
        // SAFETY: the caller's promise is handed on.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}

/// What counts of the time between two looks at the clock, at most: beyond it the process was stopped (Ctrl-Z).
const LOOK: Duration = Duration::from_secs(1);

/// Runs `work` within `limits`. What it is given and what it returns may be of any size.
pub(crate) fn run<T: Send + 'static>(
    limits: Limits,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::result::Result<T, Broken> {
    let alarm = Arc::new(Alarm { state: AtomicU8::new(RUNNING), waiting: thread::current() });
    let result = Arc::new(Mutex::new(None));
    let (mut left, mut looked) = (limits.time, Instant::now());
    let spawned = thread::Builder::new().stack_size(limits.stack).spawn({
        let (alarm, result) = (alarm.clone(), result.clone());
        move || {
            LEFT.set(limits.memory);
            ALARM.set(Arc::as_ptr(&alarm));
            let outcome = quietly(work);
            ALARM.set(std::ptr::null());
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            alarm.state.store(DONE, Ordering::Release);
            alarm.waiting.unpark();
        }
    });
    let thread = spawned.map_err(Broken::NoThread)?;
    loop {
        match alarm.state.load(Ordering::Acquire) {
            STARVED => return Err(Broken::Memory),
            RUNNING => {}
            _ => {
                // Its stack is given back before the next one is asked for.
                let _ = thread.join();
                let outcome = result.lock().unwrap_or_else(PoisonError::into_inner).take();
                return outcome.and_then(Result::ok).ok_or(Broken::Panic);
            }
        }
        left = left.saturating_sub(looked.elapsed().min(LOOK));
        if left.is_zero() {
            return Err(Broken::Time);
        }
        looked = Instant::now();
        thread::park_timeout(left.min(LOOK));
    }
}

/// `catch_unwind` without the panic's message on stderr, for libraries that panic on bad files.
pub(crate) fn quietly<T>(work: impl FnOnce() -> T) -> thread::Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator::SYSTEM;

    const LIMITS: Limits = Limits { memory: 1 << 20, stack: 1 << 20, time: Duration::from_secs(60) };

    #[test]
    fn what_is_freed_may_be_taken_again() {
        let held = run(LIMITS, || (0..100).map(|_| vec![1u8; 900 << 10].len()).sum::<usize>());
        assert_eq!(held.unwrap(), 100 * (900 << 10));
    }

    #[test]
    fn more_than_the_allowance_is_not_given() {
        assert!(matches!(run(LIMITS, || vec![1u8; 2 << 20].len()), Err(Broken::Memory)));
        let grow = || {
            let mut held = Vec::new();
            loop {
                held.push(vec![1u8; 1000]);
            }
        };
        assert!(matches!(run::<usize>(LIMITS, grow), Err(Broken::Memory)));
        // and this thread is none the worse
        assert_eq!(vec![1u8; 4 << 20].len(), 4 << 20);
    }

    #[test]
    fn a_panic_and_a_long_wait_are_told() {
        assert!(matches!(run::<()>(LIMITS, || panic!("as it should")), Err(Broken::Panic)));
        let wait = || thread::sleep(Duration::from_secs(3600));
        assert!(matches!(run(Limits { time: Duration::from_millis(20), ..LIMITS }, wait), Err(Broken::Time)));
    }
}
