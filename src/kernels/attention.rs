//! Causal attention over segments that share prompts, forward and backward, without a score matrix in memory.
//!
//! A [`Span`] is a run of queries that sees a prefix of keys whole (the shared prompt) and its own keys causally. A
//! block of queries at a time meets all its keys, so the scores held are `block × keys`; the backward pass computes them
//! again from the logarithm of each row's sum (Dao et al. 2022).

mod plain;

use std::ops::Range;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    gate::exp,
    gemm::{Dense, Lhs, Out, Threads, gemm},
    host::{dot, floats, matrix},
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
}

impl Span {
    /// How many keys, prefix first, query `i` of the span can see: those `first..end` of prefix and own joined.
    fn visible(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.prefix.len() + self.own.len() - (self.queries.len() - 1 - i);
        window.map_or(0, |window| end.saturating_sub(window))..end
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
    if !q.device().is_cpu() {
        return plain::attention(q, k, v, spans, heads);
    }
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
        let keys = span.prefix.len() + span.own.len();
        let mut scores = vec![0f32; block.len() * keys];
        side.scores(span, block.clone(), head, &mut scores);
        for (i, row) in block.clone().zip(scores.chunks_exact_mut(keys)) {
            let seen = span.visible(i, heads.window);
            let log_sum = softmax(row, seen);
            // SAFETY: spans do not share queries, and this task alone has this block and head.
            unsafe { *lse.add((span.queries.start + i) * heads.n + head) = log_sum };
        }
        let first = (span.queries.start + block.start) * heads.width() + head * heads.dim;
        let len = (block.len() - 1) * heads.width() + heads.dim;
        // SAFETY: in bounds since the block's rows are; only columns of this head are written, by this task alone.
        let mixed = unsafe { std::slice::from_raw_parts_mut(values.add(first), len) };
        side.mix(span, block.len(), &scores, side.v, head, mixed);
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
    if !q.device().is_cpu() {
        return plain::attention_backward([q, k, v], out, d_values, spans, heads);
    }
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let (q, k, v) = (floats(q)?, floats(k)?, floats(v)?);
    let (values, lse, d_values) = (floats(&out.values)?, floats(&out.lse)?, floats(d_values)?);
    let side = Side { q: &q, k: &k, v: &v, heads };
    let (mut dq, mut dk) = (vec![0f32; queries * heads.width()], vec![0f32; keys * heads.kv_width()]);
    let mut dv = vec![0f32; keys * heads.kv_width()];
    let grads = Grads { dq: Shared(dq.as_mut_ptr()), dk: Shared(dk.as_mut_ptr()), dv: Shared(dv.as_mut_ptr()) };
    let tasks: Vec<_> = groups.iter().flat_map(|group| (0..heads.kv).map(move |kv| (group.clone(), kv))).collect();
    tasks.into_par_iter().for_each(|(group, kv)| {
        for span in &spans[group] {
            for head in kv * heads.group()..(kv + 1) * heads.group() {
                for block in span.blocks() {
                    side.block_backward(span, block, head, [&values, &lse, &d_values], &grads);
                }
            }
        }
    });
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
    /// Raw scores `[block, prefix + own]`, scaled.
    fn scores(&self, span: &Span, block: Range<usize>, head: usize, scores: &mut [f32]) {
        let first = (span.queries.start + block.start) * self.heads.width() + head * self.heads.dim;
        self.against(span, &self.q[first..], block.len(), self.k, head, self.heads.scale as f32, scores);
    }

    /// `scores[rows, prefix + own] = alpha · left · keysᵀ` for the key head that serves `head`.
    #[allow(clippy::too_many_arguments)]
    fn against(
        &self,
        span: &Span,
        left: &[f32],
        rows: usize,
        keys: &[f32],
        head: usize,
        alpha: f32,
        scores: &mut [f32],
    ) {
        let heads = &self.heads;
        let left = Lhs { data: left, row: heads.width(), col: 1 };
        let all = span.prefix.len() + span.own.len();
        for (part, at) in [(&span.prefix, 0), (&span.own, span.prefix.len())] {
            if part.is_empty() {
                continue;
            }
            let keys = Dense { data: &keys[self.key(part.start, head)..], row: 1, col: heads.kv_width() };
            let out = Out { data: &mut scores[at..], ld: all, add: false };
            gemm([rows, part.len(), heads.dim], alpha, left, &keys, out, Threads::One);
        }
    }

    /// `out[rows, dim] = weights[rows, prefix + own] · values`, `out` being a head's columns of wider rows.
    fn mix(&self, span: &Span, rows: usize, weights: &[f32], values: &[f32], head: usize, out: &mut [f32]) {
        let heads = &self.heads;
        let all = span.prefix.len() + span.own.len();
        let mut add = false;
        for (part, at) in [(&span.prefix, 0), (&span.own, span.prefix.len())] {
            if part.is_empty() {
                continue;
            }
            let left = Lhs { data: &weights[at..], row: all, col: 1 };
            let right = Dense { data: &values[self.key(part.start, head)..], row: heads.kv_width(), col: 1 };
            let out = Out { data: &mut *out, ld: heads.width(), add };
            gemm([rows, heads.dim, part.len()], 1.0, left, &right, out, Threads::One);
            add = true;
        }
    }

    /// Where the key or value of `row` starts, in the head that serves query head `head`.
    fn key(&self, row: usize, head: usize) -> usize {
        row * self.heads.kv_width() + head / self.heads.group() * self.heads.dim
    }

    /// One block of queries of one head: writes its `dq`, adds to `dk` and `dv`.
    ///
    /// With `P = exp(S − lse)`, `D = Σ values · d_values` a row: `dS = P · (d_values · Vᵀ − D)`.
    fn block_backward(
        &self,
        span: &Span,
        block: Range<usize>,
        head: usize,
        [values, lse, d_values]: [&[f32]; 3],
        grads: &Grads,
    ) {
        let heads = &self.heads;
        let (rows, all) = (block.len(), span.prefix.len() + span.own.len());
        let first = (span.queries.start + block.start) * heads.width() + head * heads.dim;
        let mut weights = vec![0f32; rows * all];
        self.scores(span, block.clone(), head, &mut weights);
        let mut d_scores = vec![0f32; rows * all];
        self.against(span, &d_values[first..], rows, self.v, head, 1.0, &mut d_scores);
        for (r, i) in block.clone().enumerate() {
            let seen = span.visible(i, heads.window);
            let (weights, d_scores) = (&mut weights[r * all..][..all], &mut d_scores[r * all..][..all]);
            let lse = lse[(span.queries.start + i) * heads.n + head];
            let at = first + r * heads.width();
            let delta = dot(&values[at..at + heads.dim], &d_values[at..at + heads.dim]);
            for (j, (weight, d_score)) in weights.iter_mut().zip(d_scores).enumerate() {
                *weight = if seen.contains(&j) { exp(*weight - lse) } else { 0.0 };
                *d_score = *weight * (*d_score - delta);
            }
        }
        let scale = heads.scale as f32;
        for d_score in &mut d_scores {
            *d_score *= scale;
        }
        let len = (rows - 1) * heads.width() + heads.dim;
        // SAFETY: in bounds since the block's rows are; a block of a head belongs to one task.
        let dq = unsafe { std::slice::from_raw_parts_mut(grads.dq.get().add(first), len) };
        self.mix(span, rows, &d_scores, self.k, head, dq);
        for (part, at) in [(&span.prefix, 0), (&span.own, span.prefix.len())] {
            if part.is_empty() {
                continue;
            }
            let len = (part.len() - 1) * heads.kv_width() + heads.dim;
            for (left, right, grad) in
                [(&d_scores, &self.q[first..], grads.dk), (&weights, &d_values[first..], grads.dv)]
            {
                // SAFETY: in bounds since the keys are; a task has this key head's columns of its group's keys to itself.
                let grad = unsafe { std::slice::from_raw_parts_mut(grad.get().add(self.key(part.start, head)), len) };
                let left = Lhs { data: &left[at..], row: 1, col: all };
                let right = Dense { data: right, row: heads.width(), col: 1 };
                let out = Out { data: grad, ld: heads.kv_width(), add: true };
                gemm([part.len(), heads.dim, rows], 1.0, left, &right, out, Threads::One);
            }
        }
    }
}

/// Softmax of the seen scores in place, 0 elsewhere; returns the logarithm of the sum.
fn softmax(row: &mut [f32], seen: Range<usize>) -> f32 {
    let max = row[seen.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    for score in &mut row[seen.clone()] {
        *score = exp(*score - max);
    }
    let sum: f32 = row[seen.clone()].iter().sum();
    let inverse = 1.0 / sum;
    for weight in &mut row[seen] {
        *weight *= inverse;
    }
    max + sum.ln()
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
mod tests {
    use candle_core::{D, Device};

    use super::*;
    use crate::kernels::oracle::{gradients_hold, random};

    fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < tolerance, "differ by {difference}");
    }

    #[test]
    fn kernel_equals_plain_tensors_forward_and_backward() {
        // two pairs: prompt, chosen, rejected each; the second with a prompt of one token and an answer of one
        let spans = [(0..70, 0..0), (70..130, 0..70), (130..133, 0..70), (133..134, 0..0), (134..135, 133..134)]
            .map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
        let groups = [0..3, 3..5];
        for (n, kv, window) in [(4, 2, None), (3, 3, Some(5)), (6, 1, Some(64))] {
            let heads = Heads { n, kv, dim: 8, scale: 0.35, window };
            let random = |width: usize| Tensor::randn(0f32, 1.0, (135, width), &Device::Cpu).unwrap();
            let (q, k, v, d) = (random(n * 8), random(kv * 8), random(kv * 8), random(n * 8));
            let ours = attention(&q, &k, &v, &spans, heads).unwrap();
            let theirs = plain::attention(&q, &k, &v, &spans, heads).unwrap();
            close(&ours.values, &theirs.values, 2e-6);
            close(&ours.lse, &theirs.lse, 2e-6);
            let ours = attention_backward([&q, &k, &v], &ours, &d, &spans, &groups, heads).unwrap();
            let theirs = plain::attention_backward([&q, &k, &v], &theirs, &d, &spans, heads).unwrap();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                close(ours, theirs, 2e-5);
            }
        }
    }

    #[test]
    fn backward_holds() {
        // a prompt of 5 and two answers, a prompt of 1 and an answer
        let spans = [(0..5, 0..0), (5..9, 0..5), (9..10, 0..5), (10..11, 0..0), (11..14, 10..11)]
            .map(|(own, prefix)| Span { queries: own.clone(), prefix, own });
        let position = [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 0, 1, 2, 3usize];
        for (n, kv, window) in [(4, 2, None), (2, 2, Some(3))] {
            let heads = Heads { n, kv, dim: 4, scale: 0.5, window };
            let hidden = |(i, j): (usize, usize)| {
                let span = spans.iter().find(|span| span.own.contains(&i)).unwrap();
                let seen = span.prefix.contains(&j) || (span.own.contains(&j) && j <= i);
                if seen && window.is_none_or(|window| position[i] - position[j] < window) { 0.0 } else { -1e30 }
            };
            let mask: Vec<f64> = (0..14 * 14).map(|at| hidden((at / 14, at % 14))).collect();
            let mask = Tensor::from_vec(mask, (1, 14, 14), &Device::Cpu).unwrap();
            let form = |[q, k, v]: [&Tensor; 3]| {
                let by_head = |x: &Tensor, n: usize| x.reshape((14, n, 4))?.transpose(0, 1)?.contiguous();
                let serving = Tensor::from_iter((0..n as u32).map(|h| h * kv as u32 / n as u32), &Device::Cpu)?;
                let repeat = |x: Tensor| x.index_select(&serving, 0);
                let (q, k, v) = (by_head(q, n)?, repeat(by_head(k, kv)?)?, repeat(by_head(v, kv)?)?);
                let scores = (q.matmul(&k.t()?.contiguous()?)? * 0.5)?.broadcast_add(&mask)?;
                let values = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
                values.transpose(0, 1)?.contiguous()?.reshape((14, n * 4))
            };
            let (q, k, v) = (random((14, n * 4), 1), random((14, kv * 4), 2), random((14, kv * 4), 3));
            let dy = random((14, n * 4), 4);
            let attended = attention(&q, &k, &v, &spans, heads).unwrap();
            let [dq, dk, dv] = attention_backward([&q, &k, &v], &attended, &dy, &spans, &[0..3, 3..5], heads).unwrap();
            gradients_hold([&dq, &dk, &dv], [&q, &k, &v], &dy, form, 2e-6).unwrap();
        }
    }
}
