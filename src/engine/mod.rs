//! The schedule: which layer, which tokens, what is kept and what is recomputed.
//!
//! [`pack`] lays pairs out as one run of tokens, [`schedule`] says what is held where, [`pass`] goes through the layers and
//! back, [`saved`] is what waits between the two, [`generate`] samples.

pub mod generate;
pub mod pack;
pub mod pass;
pub mod saved;
pub mod schedule;
