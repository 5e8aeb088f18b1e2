//! Attention on the CPU's cores.
//!
//! A block of queries fills the columns of a panel (`kernels/loose.rs`). Keys times that panel are scores
//! `[key, query]`, which are a panel themselves, as the product with the values wants it. So nothing is packed but the
//! queries, a query's maximum and sum are lanes of a vector, and of a long row only a piece is held, which stays in the
//! near caches: what is summed up so far is scaled where a later piece holds a larger score (Milakov and Gimelshein
//! 2018).

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    Heads, Span,
    blocks::{Block, KEYS, Piece, Task},
};
use crate::kernels::{
    gemm::{Lhs, Out},
    host::dot,
    loose::{columns, product},
    pack::{Floats, transpose},
    simd::{Cache, fetch_at, multiversion},
    soft_cap::{capped, slope_at},
    special::exp,
    words::{Words, bits},
};

/// f32 numbers that a thread holds while it works on heads of so many coordinates.
pub fn scratch(dim: usize, backward: bool) -> usize {
    if backward { backward_sizes(dim).iter().sum() } else { forward_sizes(dim).iter().sum() }
}

/// A block's rows, queries as columns, scores, mixed values, maxima, sums.
fn forward_sizes(dim: usize) -> [usize; 6] {
    let block = columns();
    [dim * block, dim * block, KEYS * block, dim * block, block, block]
}

/// A block's rows; queries as columns and in panels; gradients of values in the same ways; weights, slopes, gradients
/// of queries; logarithms of sums, and sums of values by their gradients.
fn backward_sizes(dim: usize) -> [usize; 10] {
    let block = columns();
    let (whole, panels) = (dim * block, dim.next_multiple_of(block) * block);
    [whole, whole, panels, whole, panels, KEYS * block, KEYS * block, whole, block, block]
}

thread_local! {
    static SCRATCH: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// Gives `work` scratch of so many floats each, whatever they hold.
fn with_scratch<const N: usize>(sizes: [usize; N], work: impl FnOnce([&mut [f32]; N])) {
    SCRATCH.with_borrow_mut(|words| {
        let mut rest = words.floats(sizes.iter().sum());
        work(sizes.map(|size| rest.split_off_mut(..size).expect("as large as all together")));
    });
}

/// A buffer that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub struct Shared(pub *mut f32);

// SAFETY: tasks write disjoint elements; each use says why.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Gradients `[rows, n · dim]`, of queries, and of keys and values in `n / kv` shares each.
pub struct Grads {
    pub dq: Shared,
    pub dk: Shared,
    pub dv: Shared,
}

/// The three inputs as slices, whose rows the spans name.
pub struct Side<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub heads: Heads,
}

impl Side<'_> {
    /// The mixed values `[rows, n · dim]` and the logarithms of sums `[rows, n]`.
    pub fn forward(&self, rows: usize, spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
        let heads = &self.heads;
        let (mut values, mut lse) = (vec![0f32; rows * heads.width()], vec![0f32; rows * heads.n]);
        let out = [&mut values, &mut lse].map(|buffer| Shared(buffer.as_mut_ptr()));
        let blocks: Vec<_> =
            spans.iter().flat_map(|span| (0..heads.kv).flat_map(move |kv| Block::all(span, kv, *heads))).collect();
        // SAFETY: spans do not share queries, so that each query's head is one task's; the buffers hold their rows.
        blocks.into_par_iter().for_each(|block| unsafe { self.attend(&block, &out) });
        (values, lse)
    }

    /// The gradients of queries `[queries, n · dim]` and of keys and values `[keys, kv · dim]`.
    pub fn backward(
        &self,
        [queries, keys]: [usize; 2],
        attended: [&[f32]; 3],
        spans: &[Span],
        groups: &[Range<usize>],
    ) -> [Vec<f32>; 3] {
        let heads = &self.heads;
        // each share of dk and dv is summed in one order, and shares are added in theirs: neither which thread came
        // first nor how many there are shows
        let [mut dq, mut dk, mut dv] = [queries, keys, keys].map(|rows| vec![0f32; rows * heads.width()]);
        let [of_q, of_k, of_v] = [&mut dq, &mut dk, &mut dv].map(|buffer| Shared(buffer.as_mut_ptr()));
        let grads = Grads { dq: of_q, dk: of_k, dv: of_v };
        for tasks in Task::rounds(spans, groups, *heads) {
            tasks.into_par_iter().with_max_len(1).for_each(|task| {
                for block in task.blocks() {
                    // SAFETY: spans do not share queries nor groups keys, and tasks of a round differ in share, or in
                    // both blocks and cells; the buffers hold them.
                    unsafe { self.block_backward(&block, task.share, &task.cells, attended, &grads) };
                }
            });
        }
        let [dk, dv] = [dk, dv].map(|shares| match heads.group() {
            1 => shares,
            group => {
                let mut sums = vec![0f32; keys * heads.kv_width()];
                let rows = sums.par_chunks_mut(ROWS * heads.kv_width()).zip(shares.par_chunks(ROWS * heads.width()));
                rows.for_each(|(sums, shares)| add_shares(shares, group, heads.dim, sums));
                sums
            }
        });
        [dq, dk, dv]
    }

    /// Writes the mixed values and logarithms of sums of a block.
    ///
    /// # Safety
    /// The buffers hold the block's rows, and nothing else touches its queries' heads meanwhile.
    pub unsafe fn attend(&self, block: &Block, [values, lse]: &[Shared; 2]) {
        let heads = &self.heads;
        with_scratch(forward_sizes(heads.dim), |[rows, queries, scores, mixed, max, sums]| {
            as_columns(gather(self.q, block, rows), heads.scale as f32, heads.dim, queries);
            mixed.fill(0.0);
            // finite, so that hidden scores are less than it
            max.fill(f32::MIN);
            sums.fill(0.0);
            for piece in block.pieces() {
                let scores = &mut scores[..piece.rows.len() * columns()];
                self.scores(block, &piece, queries, scores);
                block.hide(&piece, scores, f32::NEG_INFINITY);
                weigh(scores, max, sums, mixed);
                block.hide(&piece, scores, 0.0);
                self.mix(self.v, block, &piece, scores, mixed);
            }
            let mixed = as_rows(mixed, block.columns.len(), heads.dim, rows).chunks_exact(heads.dim);
            let lanes = block.queries().zip(block.places()).zip(max.iter().zip(&*sums));
            for ((((row, head), at), (max, sum)), mixed) in lanes.zip(mixed) {
                // SAFETY: the caller vouches for the rows.
                unsafe {
                    *lse.get().add(row * heads.n + head) = max + sum.ln();
                    mixed.iter().enumerate().for_each(|(i, value)| *values.get().add(at + i) = value / sum);
                }
            }
        });
    }

    /// Adds to the `dq` of a block, and to a share of the `dk` and `dv` of its keys, for keys of these cells.
    ///
    /// With `P = exp(S − lse)`, `D = Σ values · d_values` a query: `dS = P · (d_values · Vᵀ − D)`, times the cap's
    /// derivative where scores are capped.
    ///
    /// # Safety
    /// The gradients hold the rows of the block and of its keys, and nothing else touches its queries' heads and this
    /// share of its keys meanwhile.
    pub unsafe fn block_backward(
        &self,
        block: &Block,
        share: usize,
        cells: &Range<usize>,
        [values, lse, d_values]: [&[f32]; 3],
        grads: &Grads,
    ) {
        let mut pieces = block.pieces().filter(|piece| cells.contains(&piece.cell)).peekable();
        if pieces.peek().is_none() {
            return;
        }
        let (heads, dim, n) = (&self.heads, self.heads.dim, block.columns.len());
        with_scratch(backward_sizes(dim), |scratch| {
            let [rows, queries, query_rows, above, above_rows, weights, slopes, dq, log_sums, deltas] = scratch;
            let gathered = gather(self.q, block, rows);
            as_columns(gathered, heads.scale as f32, dim, queries);
            as_panels(gathered, dim, query_rows);
            let gathered = gather(d_values, block, rows);
            as_columns(gathered, 1.0, dim, above);
            as_panels(gathered, dim, above_rows);
            dq.fill(0.0);
            // of columns that are none: anything finite
            log_sums.fill(0.0);
            deltas.fill(0.0);
            for ((((row, head), at), above), lanes) in block
                .queries()
                .zip(block.places())
                .zip(gathered.chunks_exact(dim))
                .zip(log_sums.iter_mut().zip(&mut *deltas))
            {
                (*lanes.0, *lanes.1) = (lse[row * heads.n + head], dot(&values[at..at + dim], above));
            }
            for piece in pieces {
                let keys = piece.rows.len();
                let to = piece.rows.start * heads.width() + share * dim;
                // sums that were last touched a block ago
                for grad in [&grads.dk, &grads.dv] {
                    (0..keys).for_each(|row| {
                        fetch_at(grad.get().wrapping_add(to + row * heads.width()), dim, Cache::Second)
                    });
                }
                let [weights, slopes] = [&mut *weights, &mut *slopes].map(|scores| &mut scores[..keys * columns()]);
                self.scores(block, &piece, queries, weights);
                self.against(self.v, block, &piece, above, slopes);
                slopes_by_weights(
                    weights,
                    slopes,
                    log_sums,
                    deltas,
                    heads.scale as f32,
                    heads.cap.map(|cap| cap as f32),
                );
                block.hide(&piece, weights, 0.0);
                block.hide(&piece, slopes, 0.0);
                self.mix(self.k, block, &piece, slopes, dq);
                let len = (keys - 1) * heads.width() + dim;
                for (left, right, grad) in [(&*slopes, &*query_rows, &grads.dk), (&*weights, &*above_rows, &grads.dv)] {
                    // SAFETY: the caller vouches for the rows of keys.
                    let out = unsafe { Out::columns(grad.get().add(to), len, heads.width(), true) };
                    product([keys, dim, n], Lhs { data: left, row: columns(), col: 1 }, right, out);
                }
            }
            for (at, row) in block.places().zip(as_rows(dq, n, dim, rows).chunks_exact(dim)) {
                // SAFETY: the caller vouches for the rows of queries.
                row.iter().enumerate().for_each(|(i, dq)| unsafe { *grads.dq.get().add(at + i) += dq });
            }
        });
    }

    /// Scores `[piece, block]` of scaled queries, capped.
    fn scores(&self, block: &Block, piece: &Piece, queries: &[f32], scores: &mut [f32]) {
        self.against(self.k, block, piece, queries, scores);
        if let Some(cap) = self.heads.cap {
            scores.iter_mut().for_each(|score| *score = capped(*score, cap as f32));
        }
    }

    /// `out[piece, block] = keys · queries`.
    fn against(&self, keys: &[f32], block: &Block, piece: &Piece, queries: &[f32], out: &mut [f32]) {
        let left = Lhs { data: &keys[block.key(piece)..], row: self.heads.kv_width(), col: 1 };
        product([piece.rows.len(), columns(), self.heads.dim], left, queries, Out::new(out, columns(), false));
    }

    /// `out[dim, block] += valuesᵀ · weights[piece, block]`.
    fn mix(&self, values: &[f32], block: &Block, piece: &Piece, weights: &[f32], out: &mut [f32]) {
        let left = Lhs { data: &values[block.key(piece)..], row: 1, col: self.heads.kv_width() };
        product([self.heads.dim, columns(), piece.rows.len()], left, weights, Out::new(out, columns(), true));
    }
}

/// A block's rows `[block, dim]`, out of rows of all heads.
fn gather<'r>(from: &[f32], block: &Block, rows: &'r mut [f32]) -> &'r [f32] {
    let dim = block.heads.dim;
    for (row, at) in rows.chunks_exact_mut(dim).zip(block.places()) {
        row.copy_from_slice(&from[at..at + dim]);
    }
    &rows[..block.columns.len() * dim]
}

/// Rows `[n, dim]`, times `alpha`, as the columns of a panel `[dim, block]`.
fn as_columns(rows: &[f32], alpha: f32, dim: usize, panel: &mut [f32]) {
    transpose(Floats { data: rows, stride: dim, k: dim, alpha }, rows.len() / dim, columns(), bits(panel));
}

/// The first `n` columns of a panel `[dim, block]` as rows `[n, dim]`.
fn as_rows<'r>(panel: &[f32], n: usize, dim: usize, rows: &'r mut [f32]) -> &'r [f32] {
    let rows = &mut rows[..n * dim];
    transpose(Floats { data: panel, stride: columns(), k: n, alpha: 1.0 }, dim, dim, bits(rows));
    rows
}

/// Rows `[n, dim]` as panels of their columns, `[panel, n, column]`.
fn as_panels(rows: &[f32], dim: usize, panels: &mut [f32]) {
    let n = rows.len() / dim;
    for (panel, start) in panels.chunks_exact_mut(n * columns()).zip((0..dim).step_by(columns())) {
        for (to, row) in panel.chunks_exact_mut(columns()).zip(rows.chunks_exact(dim)) {
            let from = &row[start..dim.min(start + columns())];
            to[..from.len()].copy_from_slice(from);
        }
    }
}

/// Rows of shares that a task adds at once.
const ROWS: usize = 16;

/// Lanes that run side by side; a panel's columns are a multiple of them.
const LANES: usize = 16;

multiversion! {
    /// Scores `[key, query]` become exponentials by the largest that a query has seen, and what is summed up is scaled
    /// to it.
    fn weigh(scores: &mut [f32], max: &mut [f32], sums: &mut [f32], mixed: &mut [f32]) {
        let vectors = max.len() / LANES;
        let all = max.as_chunks_mut::<LANES>().0.iter_mut().zip(sums.as_chunks_mut::<LANES>().0).enumerate();
        for (v, (max, sums)) in all {
            // in arrays of their own, which stay in registers
            let (before, mut top, mut added) = (*max, *max, [0f32; LANES]);
            for scores in scores.as_chunks::<LANES>().0.iter().skip(v).step_by(vectors) {
                for (top, score) in top.iter_mut().zip(scores) {
                    *top = if *score > *top { *score } else { *top };
                }
            }
            for scores in scores.as_chunks_mut::<LANES>().0.iter_mut().skip(v).step_by(vectors) {
                for ((added, score), top) in added.iter_mut().zip(scores).zip(&top) {
                    *score = exp(*score - top);
                    *added += *score;
                }
            }
            let factors = std::array::from_fn::<_, LANES, _>(|i| exp(before[i] - top[i]));
            for ((sum, factor), added) in sums.iter_mut().zip(&factors).zip(added) {
                *sum = *sum * factor + added;
            }
            if before != top {
                for mixed in mixed.as_chunks_mut::<LANES>().0.iter_mut().skip(v).step_by(vectors) {
                    mixed.iter_mut().zip(&factors).for_each(|(mixed, factor)| *mixed *= factor);
                }
            }
            *max = top;
        }
    }

    /// Scores `[key, query]` become weights, and slopes by the weights become slopes by the raw scores.
    fn slopes_by_weights(
        weights: &mut [f32],
        slopes: &mut [f32],
        log_sums: &[f32],
        deltas: &[f32],
        scale: f32,
        cap: Option<f32>,
    ) {
        let rows = weights.chunks_exact_mut(log_sums.len()).zip(slopes.chunks_exact_mut(log_sums.len()));
        for (weights, slopes) in rows {
            for ((weight, slope), (log_sum, delta)) in weights.iter_mut().zip(slopes).zip(log_sums.iter().zip(deltas)) {
                let of_cap = cap.map_or(1.0, |cap| slope_at(*weight, cap));
                *weight = exp(*weight - log_sum);
                *slope = *weight * (*slope - delta) * scale * of_cap;
            }
        }
    }

    /// Adds the shares `[rows, kv, group, dim]` up in their key heads, `[rows, kv, dim]`.
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
