//! A batch as the model sees it: one run of tokens without padding, cut into segments that share prompts.

use std::ops::Range;

use candle_core::Tensor;

use crate::kernels::attention::Span;

/// Tokens of several pairs in one row, and who may look at whom.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Cosines of the rotary angles, `[tokens, head_dim / 2]`.
    pub cos: Tensor,
    /// Sines of the same.
    pub sin: Tensor,
    /// Segments: which keys each run of queries sees.
    pub spans: Vec<Span>,
    /// Runs of spans that share no keys with one another.
    pub groups: Vec<Range<usize>>,
}
