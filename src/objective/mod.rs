//! From hidden states to log-probs, losses, their derivatives and metrics; the reference's cache.
//!
//! [`logps`] scores answers from hidden states; [`losses`] are pure functions of a pair's four summed log-probs;
//! [`metrics`] averages what TRL logs and [`rows`] names it; [`reference_cache`] keeps the reference's two sums a row
//! on disk.

pub mod logps;
pub mod losses;
pub mod metrics;
pub mod reference_cache;
pub mod rows;

pub use losses::{LossGrad, PairLogps, loss};
pub use metrics::{AnswerSums, Means, Metrics};
pub use reference_cache::ReferenceCache;
pub use rows::{EvalRow, TrainRow};
