//! The schedule: which layer, which tokens, what is kept and what is recomputed.
