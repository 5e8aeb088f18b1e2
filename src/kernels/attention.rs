//! Causal attention over segments that share prompts, forward and backward, without a score matrix in memory.
//!
//! A [`Span`] is a run of queries that sees a prefix of keys whole (the shared prompt) and its own keys causally. A
//! block of queries at a time meets the keys that one of its queries sees, piece by piece, so the scores held are
//! `block × piece`; the backward pass computes them again from the logarithm of each row's sum (Dao et al. 2022). Both
//! ways there are tasks for blocks of queries, not for heads alone: few heads keep all cores busy.

mod blocks;
mod cpu;
mod plain;

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::{
    compute::Compute,
    host::{floats, matrix},
    profile::{Part, Timed},
};
pub use cpu::scratch;

/// A run of queries and the keys that it sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Rows of keys that every query sees (but for the window): the shared prompt.
    pub prefix: Range<usize>,
    /// Rows of keys seen causally; the last query sees them all.
    pub own: Range<usize>,
}

/// The shape of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub n: usize,
    /// Key and value heads; each serves `n / kv` query heads.
    pub kv: usize,
    /// Coordinates a head.
    pub dim: usize,
    /// What scores are multiplied with.
    pub scale: f64,
    /// Positions back that a query sees, itself included; none: all.
    pub window: Option<usize>,
    /// What scaled scores stay below, softly; none: they are not capped.
    pub cap: Option<f64>,
    /// What the products' sides are where a device multiplies them on its matrix unit; the CPU's are f32.
    pub compute: Compute,
}

impl Span {
    /// How many keys, prefix first, query `i` of the span can see: those `first..end` of prefix and own joined.
    fn visible(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.prefix.len() + self.own.len() - (self.queries.len() - 1 - i);
        window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The keys, counted in the same way, that some query of `block` sees.
    fn met(&self, block: &Range<usize>, window: Option<usize>) -> Range<usize> {
        self.visible(block.start, window).start..self.visible(block.end - 1, window).end
    }
}

/// What the forward pass gives: the mixed values `[queries, n · dim]`, and for every query and head the logarithm of
/// the sum of its exponentiated scores `[queries, n]`, which the backward pass needs.
pub struct Attended {
    /// Mixed values.
    pub values: Tensor,
    /// Logarithms of sums.
    pub lse: Tensor,
}

/// Attention of `q[queries, n · dim]` over `k`, `v` `[keys, kv · dim]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], heads: Heads) -> Result<Attended> {
    check(q, k, v, spans, heads)?;
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(q) && super::gpu::attention::takes(heads) {
        return super::gpu::attention::attention(q, k, v, spans, heads);
    }
    if !q.device().is_cpu() {
        return plain::attention(q, k, v, spans, heads);
    }
    let _timed = Timed::start(Part::Attention);
    let rows = q.dim(0)?;
    let (q, k, v) = (floats(q)?, floats(k)?, floats(v)?);
    let (values, lse) = cpu::Side { q: &q, k: &k, v: &v, heads }.forward(rows, spans);
    Ok(Attended { values: matrix(values, rows, heads.width())?, lse: matrix(lse, rows, heads.n)? })
}

/// The gradients `(dq, dk, dv)` from the gradient `d_values` of the mixed values.
///
/// `groups` cuts the spans into runs that share no keys, so that runs can be worked on at once. Keys that spans of a
/// group share are the whole prefix, or own keys, of each.
pub fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    out: &Attended,
    d_values: &Tensor,
    spans: &[Span],
    groups: &[Range<usize>],
    heads: Heads,
) -> Result<[Tensor; 3]> {
    check(q, k, v, spans, heads)?;
    #[cfg(any(feature = "cuda", feature = "metal"))]
    if super::gpu::serves(q) && super::gpu::attention::takes(heads) {
        return super::gpu::attention::attention_backward([q, k, v], out, d_values, spans, heads);
    }
    if !q.device().is_cpu() {
        return plain::attention_backward([q, k, v], out, d_values, spans, heads);
    }
    let _timed = Timed::start(Part::Attention);
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let (q, k, v) = (floats(q)?, floats(k)?, floats(v)?);
    let (values, lse, d_values) = (floats(&out.values)?, floats(&out.lse)?, floats(d_values)?);
    let side = cpu::Side { q: &q, k: &k, v: &v, heads };
    let [dq, dk, dv] = side.backward([queries, keys], [&values, &lse, &d_values], spans, groups);
    Ok([matrix(dq, queries, heads.width())?, matrix(dk, keys, heads.kv_width())?, matrix(dv, keys, heads.kv_width())?])
}

impl Heads {
    fn width(&self) -> usize {
        self.n * self.dim
    }

    fn kv_width(&self) -> usize {
        self.kv * self.dim
    }

    fn group(&self) -> usize {
        self.n / self.kv
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], heads: Heads) -> Result<()> {
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let fits = |span: &Span| {
        span.queries.end <= queries
            && span.prefix.end <= keys
            && span.own.end <= keys
            && !span.queries.is_empty()
            && span.own.len() >= span.queries.len()
    };
    if q.dim(1)? != heads.width() || k.dim(1)? != heads.kv_width() || v.dims() != k.dims() || !spans.iter().all(fits) {
        bail!("attention: q {:?}, k {:?}, v {:?}, {heads:?}, {spans:?}", q.shape(), k.shape(), v.shape());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
