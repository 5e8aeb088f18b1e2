//! The schedule: which layer, which tokens, what is kept and what is recomputed.
//!
//! [`pack`] lays pairs out as one run of tokens, [`schedule`] says what is held where, [`pass`] goes through the layers
//! and back, [`saved`] is what waits between the two, [`generate`] samples. [`plan`] chooses the schedule by what
//! [`demand`] says that each would hold, [`ahead`] holds the host one layer before a card.

pub mod ahead;
pub mod demand;
pub mod generate;
pub mod pack;
pub mod pass;
pub mod plan;
pub mod saved;
pub mod schedule;

/// Computes on a thread of the pool: a caller outside of it would fall asleep and be woken for every loop, and would
/// keep buffers beside the workers' own.
pub fn within_pool<R: Send>(compute: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| compute())
}
