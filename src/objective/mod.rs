//! From hidden states to log-probs, losses, their derivatives and metrics; the reference's cache.

pub mod logps;
