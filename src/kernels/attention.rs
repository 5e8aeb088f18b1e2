//! Causal attention over segments that share prompts, forward and backward, without a score matrix in memory.
//!
//! A [`Span`] is a run of queries that sees a prefix of keys whole (the shared prompt) and its own keys causally. A
//! block of queries at a time meets the keys that one of its queries sees, so the scores held are `block × keys`; the
//! backward pass computes them again from the logarithm of each row's sum (Dao et al. 2022). Every head is a task of its
//! own, both ways: few key heads keep all cores busy.

mod plain;

use std::{cell::RefCell, ops::Range};

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    compute::Compute,
    gate::exp,
    gemm::{Dense, Lhs, Out, Threads, gemm},
    host::{dot, floats, matrix},
    profile::{Part, Timed},
    simd::multiversion,
    soft_cap::{capped, slope_at},
};

/// Queries that meet their keys at once.
const QUERIES: usize = 48;

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

    /// Where keys counted in that way lie: rows of the prefix and of own, each with its first one's place among `met`.
    fn parts(&self, met: &Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> + use<> {
        let cut = self.prefix.len();
        let in_prefix = met.start.min(cut)..met.end.min(cut);
        let in_own = met.start.max(cut)..met.end.max(cut);
        let prefix = self.prefix.start + in_prefix.start..self.prefix.start + in_prefix.end;
        let own = self.own.start + in_own.start - cut..self.own.start + in_own.end - cut;
        let parts = [(prefix, 0), (own, in_own.start - met.start)];
        parts.into_iter().filter(|(rows, _)| !rows.is_empty())
    }

    /// Blocks of queries, as offsets into the span.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.queries.len();
        (0..n).step_by(QUERIES).map(move |start| start..n.min(start + QUERIES))
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
    let side = Side { q: &q, k: &k, v: &v, heads };
    let (mut values, mut lse) = (vec![0f32; rows * heads.n * heads.dim], vec![0f32; rows * heads.n]);
    let out = (Shared(values.as_mut_ptr()), Shared(lse.as_mut_ptr()));
    let tasks: Vec<_> = spans
        .iter()
        .flat_map(|span| span.blocks().flat_map(move |block| (0..heads.n).map(move |head| (span, block.clone(), head))))
        .collect();
    tasks.into_par_iter().for_each(|(span, block, head)| {
        let (values, lse) = (out.0.get(), out.1.get());
        let met = span.met(&block, heads.window);
        with_scores(block.len() * met.len(), |scores| {
            side.scores(span, &block, &met, head, scores);
            for (i, row) in block.clone().zip(scores.chunks_exact_mut(met.len())) {
                let seen = span.visible(i, heads.window);
                let log_sum = softmax(row, seen.start - met.start, seen.end - met.start);
                // SAFETY: spans do not share queries, and this task alone has this block and head.
                unsafe { *lse.add((span.queries.start + i) * heads.n + head) = log_sum };
            }
            let first = (span.queries.start + block.start) * heads.width() + head * heads.dim;
            let len = (block.len() - 1) * heads.width() + heads.dim;
            // SAFETY: in bounds since the block's rows are; only columns of this head are written, by this task alone.
            unsafe { side.mix(span, &met, block.len(), scores, side.v, head, (values.add(first), len)) };
        });
    });
    Ok(Attended { values: matrix(values, rows, heads.width())?, lse: matrix(lse, rows, heads.n)? })
}

/// f32 numbers that a thread holds while it works on queries that see so many keys: scores, their gradients, and either
/// packed for a product.
pub fn scores(keys: usize, backward: bool) -> usize {
    QUERIES * keys * if backward { 3 } else { 2 }
}

/// The gradients `(dq, dk, dv)` from the gradient `d_values` of the mixed values.
///
/// `groups` cuts the spans into runs that share no keys, so that runs can be worked on at once.
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
    let side = Side { q: &q, k: &k, v: &v, heads };
    // a query head's share of dk and dv is its own, and the shares are added in the order of the heads: which thread came
    // first does not show
    let [mut dq, mut dk, mut dv] = [queries, keys, keys].map(|rows| vec![0f32; rows * heads.width()]);
    let grads = Grads { dq: Shared(dq.as_mut_ptr()), dk: Shared(dk.as_mut_ptr()), dv: Shared(dv.as_mut_ptr()) };
    let tasks: Vec<_> = groups.iter().flat_map(|group| (0..heads.n).map(move |head| (group.clone(), head))).collect();
    tasks.into_par_iter().with_max_len(1).for_each(|(group, head)| {
        for span in &spans[group] {
            for block in span.blocks() {
                side.block_backward(span, block, head, [&values, &lse, &d_values], &grads);
            }
        }
    });
    let [dk, dv] = [dk, dv].map(|shares| match heads.group() {
        1 => shares,
        group => {
            let mut sums = vec![0f32; keys * heads.kv_width()];
            let rows = sums.par_chunks_mut(ROWS * heads.kv_width()).zip(shares.par_chunks(ROWS * heads.width()));
            rows.for_each(|(sums, shares)| add_shares(shares, group, heads.dim, sums));
            sums
        }
    });
    Ok([matrix(dq, queries, heads.width())?, matrix(dk, keys, heads.kv_width())?, matrix(dv, keys, heads.kv_width())?])
}

/// Rows of shares that a task adds at once.
const ROWS: usize = 16;

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

/// A buffer that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: tasks write disjoint elements; each use says why.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Gradients `[rows, n · dim]`, of queries and of each query head's share in keys and values.
struct Grads {
    dq: Shared,
    dk: Shared,
    dv: Shared,
}

/// The three inputs as slices.
struct Side<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    heads: Heads,
}

impl Side<'_> {
    /// Scores `[block, met]`, scaled and capped.
    fn scores(&self, span: &Span, block: &Range<usize>, met: &Range<usize>, head: usize, scores: &mut [f32]) {
        let first = (span.queries.start + block.start) * self.heads.width() + head * self.heads.dim;
        self.against(span, met, &self.q[first..], block.len(), self.k, head, self.heads.scale as f32, scores);
        if let Some(cap) = self.heads.cap {
            scores.iter_mut().for_each(|score| *score = capped(*score, cap as f32));
        }
    }

    /// `scores[rows, met] = alpha · left · keysᵀ` for the key head that serves `head`.
    #[allow(clippy::too_many_arguments)]
    fn against(
        &self,
        span: &Span,
        met: &Range<usize>,
        left: &[f32],
        rows: usize,
        keys: &[f32],
        head: usize,
        alpha: f32,
        scores: &mut [f32],
    ) {
        let heads = &self.heads;
        let left = Lhs { data: left, row: heads.width(), col: 1 };
        for (part, at) in span.parts(met) {
            let keys = Dense { data: &keys[self.key(part.start, head)..], row: 1, col: heads.kv_width() };
            let out = Out::new(&mut scores[at..], met.len(), false);
            gemm([rows, part.len(), heads.dim], alpha, left, &keys, out, Threads::One);
        }
    }

    /// `out[rows, dim] = weights[rows, met] · values`, `out` being a head's columns of wider rows: where they start, and
    /// the floats from there to the end of the last one.
    ///
    /// # Safety
    /// Nothing else touches these columns meanwhile.
    #[allow(clippy::too_many_arguments)]
    unsafe fn mix(
        &self,
        span: &Span,
        met: &Range<usize>,
        rows: usize,
        weights: &[f32],
        values: &[f32],
        head: usize,
        (out, len): (*mut f32, usize),
    ) {
        let heads = &self.heads;
        for (i, (part, at)) in span.parts(met).enumerate() {
            let left = Lhs { data: &weights[at..], row: met.len(), col: 1 };
            let right = Dense { data: &values[self.key(part.start, head)..], row: heads.kv_width(), col: 1 };
            // SAFETY: the caller vouches for the columns.
            let out = unsafe { Out::columns(out, len, heads.width(), i > 0) };
            gemm([rows, heads.dim, part.len()], 1.0, left, &right, out, Threads::One);
        }
    }

    /// Where the key or value of `row` starts, in the head that serves query head `head`.
    fn key(&self, row: usize, head: usize) -> usize {
        row * self.heads.kv_width() + head / self.heads.group() * self.heads.dim
    }

    /// One block of queries of one head: writes its `dq`, adds to its shares of `dk` and `dv`.
    ///
    /// With `P = exp(S − lse)`, `D = Σ values · d_values` a row: `dS = P · (d_values · Vᵀ − D)`, times the cap's derivative
    /// where scores are capped.
    fn block_backward(
        &self,
        span: &Span,
        block: Range<usize>,
        head: usize,
        [values, lse, d_values]: [&[f32]; 3],
        grads: &Grads,
    ) {
        let heads = &self.heads;
        let met = span.met(&block, heads.window);
        let (rows, all) = (block.len(), met.len());
        let first = (span.queries.start + block.start) * heads.width() + head * heads.dim;
        with_scores(2 * rows * all, |scores| {
            let (weights, d_scores) = scores.split_at_mut(rows * all);
            self.scores(span, &block, &met, head, weights);
            let slopes_of_cap: Option<Vec<f32>> =
                heads.cap.map(|cap| weights.iter().map(|score| slope_at(*score, cap as f32)).collect());
            self.against(span, &met, &d_values[first..], rows, self.v, head, 1.0, d_scores);
            let both = weights.chunks_exact_mut(all).zip(d_scores.chunks_exact_mut(all));
            for ((r, i), (weights, d_scores)) in block.clone().enumerate().zip(both) {
                let seen = span.visible(i, heads.window);
                let lse = lse[(span.queries.start + i) * heads.n + head];
                let at = first + r * heads.width();
                let delta = dot(&values[at..at + heads.dim], &d_values[at..at + heads.dim]);
                let (start, end) = (seen.start - met.start, seen.end - met.start);
                slopes(weights, d_scores, start, end, lse, delta, heads.scale as f32);
            }
            for (d_score, slope) in d_scores.iter_mut().zip(slopes_of_cap.iter().flatten()) {
                *d_score *= slope;
            }
            let len = (rows - 1) * heads.width() + heads.dim;
            // SAFETY: in bounds since the block's rows are; a block of a head belongs to one task.
            unsafe { self.mix(span, &met, rows, d_scores, self.k, head, (grads.dq.get().add(first), len)) };
            for (part, at) in span.parts(&met) {
                let to = part.start * heads.width() + head * heads.dim;
                let len = (part.len() - 1) * heads.width() + heads.dim;
                for (left, right, grad) in
                    [(&*d_scores, &self.q[first..], grads.dk), (&*weights, &d_values[first..], grads.dv)]
                {
                    // SAFETY: in bounds since the keys are; a task has its head's columns of its group's keys to itself.
                    let out = unsafe { Out::columns(grad.get().add(to), len, heads.width(), true) };
                    let left = Lhs { data: &left[at..], row: 1, col: all };
                    let right = Dense { data: right, row: heads.width(), col: 1 };
                    gemm([part.len(), heads.dim, rows], 1.0, left, &right, out, Threads::One);
                }
            }
        });
    }
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Gives `work` scratch of `n` floats, whatever they hold.
fn with_scores(n: usize, work: impl FnOnce(&mut [f32])) {
    SCORES.with_borrow_mut(|scores| {
        if scores.len() < n {
            scores.resize(n, 0.0);
        }
        work(&mut scores[..n]);
    });
}

/// Sums and maxima of a row that run side by side.
const LANES: usize = 16;

multiversion! {
    /// Softmax of the scores `start..end` in place, 0 elsewhere; returns the logarithm of the sum.
    fn softmax(row: &mut [f32], start: usize, end: usize) -> f32 {
        row[..start].fill(0.0);
        row[end..].fill(0.0);
        let row = &mut row[start..end];
        let mut max = [f32::NEG_INFINITY; LANES];
        let larger = |max: &mut f32, score: f32| *max = if score > *max { score } else { *max };
        let (groups, rest) = row.as_chunks::<LANES>();
        for group in groups {
            max.iter_mut().zip(group).for_each(|(max, score)| larger(max, *score));
        }
        max.iter_mut().zip(rest).for_each(|(max, score)| larger(max, *score));
        let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0f32; LANES];
        let (groups, rest) = row.as_chunks_mut::<LANES>();
        for group in groups {
            for (sum, score) in sums.iter_mut().zip(group) {
                *score = exp(*score - max);
                *sum += *score;
            }
        }
        for (sum, score) in sums.iter_mut().zip(rest) {
            *score = exp(*score - max);
            *sum += *score;
        }
        let sum: f32 = sums.iter().sum();
        let inverse = 1.0 / sum;
        for weight in row {
            *weight *= inverse;
        }
        max + sum.ln()
    }

    /// Scores become weights, and slopes by the weights become slopes by the raw scores; both 0 but for `start..end`.
    fn slopes(
        weights: &mut [f32],
        d_scores: &mut [f32],
        start: usize,
        end: usize,
        lse: f32,
        delta: f32,
        scale: f32,
    ) {
        for row in [&mut *weights, &mut *d_scores] {
            row[..start].fill(0.0);
            row[end..].fill(0.0);
        }
        for (weight, d_score) in weights[start..end].iter_mut().zip(&mut d_scores[start..end]) {
            *weight = exp(*weight - lse);
            *d_score = *weight * (*d_score - delta) * scale;
        }
    }

    /// Adds the shares of the query heads, `[rows, kv, group, dim]`, up in their key heads, `[rows, kv, dim]`.
    fn add_shares(shares: &[f32], group: usize, dim: usize, sums: &mut [f32]) {
        for (sums, shares) in sums.chunks_exact_mut(dim).zip(shares.chunks_exact(group * dim)) {
            for share in shares.chunks_exact(dim) {
                for (sum, share) in sums.iter_mut().zip(share) {
                    *sum += share;
                }
            }
        }
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
