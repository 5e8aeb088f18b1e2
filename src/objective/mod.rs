//! From log-probs to losses, their derivatives and metrics; the reference's cache.
