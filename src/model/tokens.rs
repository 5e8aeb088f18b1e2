//! A batch as the model sees it: one run of tokens without padding, cut into segments that share prompts.

use std::ops::Range;

use super::rotary::Angles;
use crate::kernels::attention::Span;

/// Tokens of several pairs in one row, and who may look at whom.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Where each token stands in its sequence.
    pub positions: Vec<usize>,
    /// The rotary angles there, for each of the model's sets of frequencies.
    pub angles: Vec<Angles>,
    /// Segments: which keys each run of queries sees.
    pub spans: Vec<Span>,
    /// Runs of spans that share no keys with one another.
    pub groups: Vec<Range<usize>>,
}
