//! Products with frozen matrices in the tile unit ([`super::amx`]): f32 taken apart into bf16, or rounded to it.
//!
//! The left-hand side, activations, is packed once for all matrices that it meets. Tasks pack columns of those, a block of
//! k at a time, and multiply them with all rows. As in [`super::gemm`], the cut of k depends on k alone and every sum
//! runs in one order, so a row's bits depend neither on threads nor on the rows beside it.

pub mod pack;

use std::{arch::x86_64::*, cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    amx::{DEPTH, REGISTER, SIDE, Sums, Terms, Tiles, multiply},
    gemm::{Out, SERIAL, Threads},
    words::Words,
};
use pack::{Rows, along};

/// Panels of 32 columns that a task packs at once.
const PANELS: usize = 8;

/// Words of the left-hand side that are packed at once, where it holds more.
const LEFT: usize = 1 << 20;

/// Registers of k in a block: a panel of the left stays in the first-level cache. The best on Sapphire Rapids of 4 to 32.
fn block(terms: Terms) -> usize {
    match terms {
        Terms::One => 9,
        Terms::Three => 6,
        Terms::Six => 4,
    }
}

/// A right-hand side `[k, n]` that packs itself.
pub trait Side: Sync {
    /// Fills `out` with panels of 32 columns, `[panel][register of k][parts][2]` registers of sixteen pairs of k times
    /// sixteen columns, zero beyond the last column and the last of `k`, which starts at a multiple of [`DEPTH`].
    fn pack(&self, k: Range<usize>, n: Range<usize>, parts: usize, out: &mut [u32]);
}

/// One of the matrices that a left-hand side is multiplied with.
pub struct Right<'a> {
    /// The matrix `[k, n]`.
    pub side: &'a dyn Side,
    /// Its columns.
    pub n: usize,
    /// Where the product goes.
    pub out: Out<'a>,
}

thread_local! {
    static LEFTS: RefCell<Words> = const { RefCell::new(Words::new()) };
    static RIGHTS: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// `out (+)= x[m, k] · side[k, n]` for each matrix on the right.
///
/// # Panics
/// Where `x` or a result has not the size that the shape names, and where the processor has no tiles.
pub fn products([m, k]: [usize; 2], x: &[f32], rights: &[Right], terms: Terms) {
    if m == 0 || k == 0 {
        return;
    }
    assert!(x.len() == m * k, "the left-hand side has {} numbers, not {m} x {k}", x.len());
    for right in rights {
        right.out.check(m, right.n);
    }
    let registers = k.div_ceil(DEPTH);
    // equal blocks
    let block = registers.div_ceil(registers.div_ceil(block(terms)));
    let a_block = m.next_multiple_of(SIDE / 2) * block * DEPTH / 2 * terms.left();
    let chunk = block * (LEFT / a_block).max(1);
    let numbers: usize = rights.iter().map(|right| m * right.n * k).sum();
    let threads = if numbers < SERIAL { Threads::One } else { Threads::All };
    // taken, not borrowed: while it waits for others, this thread may be given another product to work on
    let mut words = LEFTS.take();
    for first in (0..registers).step_by(chunk) {
        let count = chunk.min(registers - first);
        let left = Left { m, first, count, terms };
        let packed = words.first(left.words());
        left.pack(x, k, packed, threads);
        left.multiply(packed, k, block, rights, threads);
    }
    LEFTS.set(words);
}

/// `count` registers of k from `first` on, of all rows of the left-hand side.
#[derive(Clone, Copy)]
struct Left {
    m: usize,
    first: usize,
    count: usize,
    terms: Terms,
}

impl Left {
    /// How many halves of 32 rows a panel has: the last one may do with one.
    fn halves(&self, panel: usize) -> usize {
        (self.m - panel * SIDE).div_ceil(SIDE / 2).min(2)
    }

    /// Words of a register of k of a panel.
    fn register(&self, panel: usize) -> usize {
        self.terms.left() * self.halves(panel) * REGISTER
    }

    fn words(&self) -> usize {
        self.m.div_ceil(SIDE / 2) * self.count * self.terms.left() * REGISTER
    }

    fn pack(&self, x: &[f32], k: usize, packed: &mut [u32], threads: Threads) {
        let columns = self.first * DEPTH..k.min((self.first + self.count) * DEPTH);
        let fill = |(panel, out): (usize, &mut [u32])| {
            let rows = panel * SIDE..self.m.min((panel + 1) * SIDE);
            let from = Rows { data: &x[rows.start * k + columns.start..], stride: k, width: columns.len() };
            along(from, rows.len(), self.terms.left(), out);
        };
        let size = self.count * self.register(0);
        match threads {
            Threads::One => packed.chunks_mut(size).enumerate().for_each(fill),
            Threads::All => packed.par_chunks_mut(size).enumerate().for_each(fill),
        }
    }

    fn multiply(&self, packed: &[u32], k: usize, block: usize, rights: &[Right], threads: Threads) {
        let workers = if threads == Threads::One { 1 } else { rayon::current_num_threads() };
        // columns are cut evenly over the workers
        let cut = |right: &Right| {
            let panels = right.n.div_ceil(SIDE);
            let parts = panels.div_ceil(PANELS).next_multiple_of(workers).min(panels);
            (0..parts).map(move |part| part * panels / parts..(part + 1) * panels / parts)
        };
        let tasks: Vec<_> = rights.iter().flat_map(|right| cut(right).map(move |panels| (right, panels))).collect();
        let task = |(right, panels): &(&Right, Range<usize>)| self.columns(packed, k, block, right, panels.clone());
        match threads {
            Threads::One => tasks.iter().for_each(task),
            Threads::All => tasks.par_iter().with_max_len(1).for_each(task),
        }
    }

    /// Multiplies all rows with the panels of one matrix.
    fn columns(&self, packed: &[u32], k: usize, block: usize, right: &Right, panels: Range<usize>) {
        let tiles = Tiles::ready().expect("a product in tiles is asked for where there are tiles");
        let parts = self.terms.right();
        let columns = panels.start * SIDE..right.n.min(panels.end * SIDE);
        let mut sums = Sums::new();
        let mut words = RIGHTS.take();
        for start in (self.first..self.first + self.count).step_by(block) {
            let depth = block.min(self.first + self.count - start);
            let size = depth * parts * 2 * REGISTER;
            let side = words.first(panels.len() * size);
            right.side.pack(start * DEPTH..k.min((start + depth) * DEPTH), columns.clone(), parts, side);
            for panel in 0..self.m.div_ceil(SIDE) {
                let register = self.register(panel);
                let at = panel * self.count * self.register(0) + (start - self.first) * register;
                let left = &packed[at..][..depth * register];
                for (column, side) in columns.clone().step_by(SIDE).zip(side.chunks_exact(size)) {
                    multiply(&tiles, self.terms, self.halves(panel), depth, left, side, &mut sums);
                    let (rows, width) = (SIDE.min(self.m - panel * SIDE), SIDE.min(right.n - column));
                    // SAFETY: `check` saw that the result holds m rows of n floats; this tile is this task's alone.
                    unsafe { put(&sums, &right.out, [panel * SIDE, column], [rows, width], start > 0) };
                }
            }
        }
        RIGHTS.set(words);
    }
}

/// Writes so many rows and columns of the sums to the result from row and column `at` on, or adds them.
///
/// # Safety
/// They lie in the result, nothing else touches them, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn put(sums: &Sums, out: &Out, [row, column]: [usize; 2], [rows, width]: [usize; 2], add: bool) {
    let masks = [0, 16].map(|half: usize| if width >= half + 16 { u16::MAX } else { (1 << width.saturating_sub(half)) - 1 });
    for (i, sums) in sums.0.iter().enumerate().take(rows) {
        for (half, mask) in masks.into_iter().enumerate() {
            // SAFETY: the caller vouches for the row; the mask holds what is read and written to the columns.
            unsafe {
                let at = out.data.add((row + i) * out.ld + column).wrapping_add(16 * half);
                let mut sums = _mm512_loadu_ps(sums.as_ptr().add(16 * half));
                if add || out.add {
                    sums = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums);
                }
                _mm512_mask_storeu_ps(at, mask, sums);
            }
        }
    }
}
