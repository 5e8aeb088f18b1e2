//! Where a step's time goes: wall time by part, counted around the entries of the kernels.
//!
//! Only with the feature `profile`; without it a [`Timed`] is nothing. `benches/profile.rs` reads the counters.

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Products with frozen matrices, but for the head.
    Products,
    /// Products with the matrices of an adapter.
    Lora,
    /// Attention.
    Attention,
    /// Norms, gates, positions, dropout.
    Elementwise,
    /// The head's products and log-probs.
    Head,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Products, Self::Lora, Self::Attention, Self::Elementwise, Self::Head];
}

/// While it lives, time goes to a part; within the time of another part nothing is counted twice.
#[must_use = "time is counted while it lives"]
pub struct Timed {
    #[cfg(feature = "profile")]
    counted: Option<(Part, std::time::Instant)>,
}

#[cfg(not(feature = "profile"))]
impl Timed {
    /// Begins to count.
    #[inline(always)]
    pub fn start(_: Part) -> Self {
        Self {}
    }
}

#[cfg(feature = "profile")]
mod counters {
    use std::{
        cell::Cell,
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        time::{Duration, Instant},
    };

    use super::{Part, Timed};

    static NANOSECONDS: [AtomicU64; Part::ALL.len()] = [const { AtomicU64::new(0) }; Part::ALL.len()];

    thread_local! {
        static COUNTING: Cell<bool> = const { Cell::new(false) };
    }

    impl Timed {
        /// Begins to count.
        pub fn start(part: Part) -> Self {
            Self { counted: (!COUNTING.replace(true)).then(|| (part, Instant::now())) }
        }
    }

    impl Drop for Timed {
        fn drop(&mut self) {
            if let Some((part, began)) = self.counted {
                COUNTING.set(false);
                NANOSECONDS[part as usize].fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
            }
        }
    }

    /// The time of each part, in the order of [`Part::ALL`], since this was last called.
    pub fn take() -> [Duration; Part::ALL.len()] {
        Part::ALL.map(|part| Duration::from_nanos(NANOSECONDS[part as usize].swap(0, Relaxed)))
    }
}

#[cfg(feature = "profile")]
pub use counters::take;
