//! From log-probs to losses, their derivatives and metrics; the reference's cache.
//!
//! [`losses`] are pure functions of a pair's four summed log-probs; [`metrics`] averages what TRL logs;
//! [`reference_cache`] keeps the reference's two sums a row on disk.

pub mod losses;
pub mod metrics;
pub mod reference_cache;

pub use losses::{LossGrad, PairLogps, loss};
pub use metrics::{AnswerSums, Means, Metrics};
pub use reference_cache::ReferenceCache;
