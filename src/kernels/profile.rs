//! Where a step's time goes: wall time by part, counted around the entries of the kernels.
//!
//! Only with the feature `profile`; without it a [`Timed`] is nothing. `benches/profile.rs` and
//! `benches/gpu/time_by_part.rs` read the counters.

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
    /// Waiting for matrices on their way to a device.
    Waiting,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Products, Self::Lora, Self::Attention, Self::Elementwise, Self::Head, Self::Waiting];
}

/// While it lives, time goes to a part; within the time of another part nothing is counted twice.
#[must_use = "time is counted while it lives"]
pub struct Timed {
    #[cfg(feature = "profile")]
    counted: Option<(Part, std::time::Instant)>,
    /// Whether the time is taken from the part around it.
    #[cfg(feature = "profile")]
    instead: bool,
}

#[cfg(not(feature = "profile"))]
impl Timed {
    /// Begins to count.
    #[inline(always)]
    pub fn start(_: Part) -> Self {
        Self {}
    }

    /// Begins to count for this part what the part around it would get.
    #[inline(always)]
    pub fn instead(_: Part) -> Self {
        Self {}
    }
}

#[cfg(feature = "profile")]
mod counters {
    use std::{
        cell::Cell,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering::Relaxed},
        },
        time::{Duration, Instant},
    };

    use candle_core::Device;

    use super::{Part, Timed};

    static NANOSECONDS: [AtomicU64; Part::ALL.len()] = [const { AtomicU64::new(0) }; Part::ALL.len()];

    /// The device whose work is waited for at the border of every part.
    static WATCHED: OnceLock<Device> = OnceLock::new();

    thread_local! {
        static COUNTING: Cell<bool> = const { Cell::new(false) };
        /// Nanoseconds that belong to other parts than the one that is counted.
        static TAKEN: Cell<u64> = const { Cell::new(0) };
    }

    /// Waits at every border of a part for what `device` has to do: its queue would give a part's time to a later one.
    /// Works once a process.
    pub fn watch(device: &Device) {
        WATCHED.set(device.clone()).ok();
    }

    fn settle() {
        if let Some(device) = WATCHED.get() {
            // a device that fails says so at the next operation
            device.synchronize().ok();
        }
    }

    impl Timed {
        /// Begins to count.
        pub fn start(part: Part) -> Self {
            let counted = (!COUNTING.replace(true)).then(|| {
                settle();
                TAKEN.set(0);
                (part, Instant::now())
            });
            Self { counted, instead: false }
        }

        /// Begins to count for this part what the part around it would get.
        pub fn instead(part: Part) -> Self {
            settle();
            Self { counted: Some((part, Instant::now())), instead: true }
        }
    }

    impl Drop for Timed {
        fn drop(&mut self) {
            let Some((part, began)) = self.counted else { return };
            settle();
            let mut time = began.elapsed().as_nanos() as u64;
            if self.instead {
                TAKEN.set(TAKEN.get() + time);
            } else {
                COUNTING.set(false);
                time -= TAKEN.get().min(time);
            }
            NANOSECONDS[part as usize].fetch_add(time, Relaxed);
        }
    }

    /// The time of each part, in the order of [`Part::ALL`], since this was last called.
    pub fn take() -> [Duration; Part::ALL.len()] {
        Part::ALL.map(|part| Duration::from_nanos(NANOSECONDS[part as usize].swap(0, Relaxed)))
    }
}

#[cfg(feature = "profile")]
pub use counters::{take, watch};
