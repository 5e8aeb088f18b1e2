//! The schedule: which layer, which tokens, what is kept and what is recomputed.
//!
//! [`pack`] lays pairs out as one run of tokens, [`pass`] goes through the layers and back, [`generate`] samples.

pub mod generate;
pub mod pack;
pub mod pass;
pub mod schedule;
