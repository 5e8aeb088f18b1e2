//! Products with frozen matrices in the tile unit ([`super::amx`]): f32 taken apart into bf16, or rounded to it.
//!
//! The left-hand side, activations, is packed once for all matrices that it meets. Tasks pack columns of those, a block of
//! k at a time, and multiply them with all rows. As in [`super::gemm`], the cut of k depends on k alone and every sum
//! runs in one order, so a row's bits depend neither on threads nor on the rows beside it.

pub mod pack;

use std::{arch::x86_64::*, cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    amx::{DEPTH, REGISTER, SIDE, Sums, Terms, Unit, multiply},
    compute::Compute,
    gemm::{Out, SERIAL, Threads},
    held::Products,
    simd::first,
    words::Words,
};
use pack::{Rows, along};

/// Panels of 32 columns that a task packs at once.
const PANELS: usize = 8;

/// Words of the left-hand side that are packed at once, where it holds more.
const LEFT: usize = 1 << 19;

/// Registers of k in a block: a panel of the left stays in the first-level cache. The best on Sapphire Rapids of 4 to 32.
fn block(terms: Terms) -> usize {
    match terms {
        Terms::One => 9,
        Terms::Three => 6,
        Terms::Six => 4,
    }
}

/// Bytes that so many threads hold for products.
pub(super) fn held(products: &Products, threads: usize, compute: Compute) -> usize {
    let Products { tokens, widest, backward, .. } = *products;
    let of = |terms: Terms| {
        let block = block(terms) * DEPTH;
        let left = |rows: usize, k: usize| {
            let words = |k: usize| rows.next_multiple_of(SIDE / 2) * k.next_multiple_of(DEPTH) / 2 * terms.left();
            words(k).min(LEFT.max(words(block)))
        };
        let left = match backward {
            // the gradients of a gate and of what it gates go back together
            Some([rows, outputs]) => left(tokens, 2 * widest).max(left(rows, outputs)),
            None => left(tokens, widest),
        };
        // as many rows are decoded at once as a panel has columns, and as many numbers of a row as a panel has of k or a
        // task has columns
        let right = |k: usize, n: usize| {
            let (k, n) = (block.min(k.next_multiple_of(DEPTH)), (PANELS * SIDE).min(n.next_multiple_of(SIDE)));
            k * n / 2 * terms.right() + SIDE * k.max(n)
        };
        let outputs = backward.map_or(widest, |[_, outputs]| outputs);
        let right = right(widest, widest.max(outputs)).max(right(outputs, widest));
        (left + threads * right) * size_of::<u32>()
    };
    match compute {
        Compute::Bf16 => of(Terms::One),
        Compute::F32 => of(Terms::Three).max(of(Terms::Six)),
    }
}

/// A right-hand side `[k, n]` that packs itself.
pub trait Side: Sync {
    /// Fills `out` with panels of 32 columns, `[panel][register of k][parts][2]` registers of sixteen pairs of k times
    /// sixteen columns, zero beyond the last column and the last of `k`, which starts at a multiple of [`DEPTH`]. It stays on
    /// its thread: another task's tiles are not to come between.
    fn pack(&self, k: Range<usize>, n: Range<usize>, parts: usize, out: &mut [u32]);
}

/// A left-hand side `[m, k]`, without gaps.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// Row after row.
    pub x: &'a [f32],
    /// Its columns.
    pub k: usize,
}

/// What is multiplied with the left-hand sides to be one result.
pub struct Right<'a> {
    /// A matrix `[k, n]` for each left-hand side.
    pub sides: Vec<&'a dyn Side>,
    /// Their columns.
    pub n: usize,
    /// Where the sum of the products goes.
    pub out: Out<'a>,
}

thread_local! {
    static LEFTS: RefCell<Words> = const { RefCell::new(Words::new()) };
    static RIGHTS: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// `out (+)= Σ x[m, k] · side[k, n]` over the left-hand sides, for each of `rights`.
///
/// # Panics
/// Where a matrix or a result has not the size that the shape names, and where the processor has no tiles.
pub fn products(m: usize, lefts: &[Left], rights: Vec<Right>, terms: Terms) {
    for right in &rights {
        right.out.check(m, right.n);
        assert_eq!(right.sides.len(), lefts.len(), "a side for each left-hand side");
    }
    assert!(lefts.iter().all(|left| left.x.len() == m * left.k && left.k > 0), "a left-hand side is not [{m}, k]");
    if m == 0 {
        return;
    }
    let deep: usize = lefts.iter().map(|left| left.k).sum();
    let numbers: usize = rights.iter().map(|right| m * right.n * deep).sum();
    let threads = if numbers < SERIAL { Threads::One } else { Threads::All };
    let blocks: Vec<_> = lefts.iter().enumerate().flat_map(|(index, left)| blocks(index, left.k, terms)).collect();
    // taken, not borrowed: while it waits for others, this thread may be given another product to work on
    let mut words = LEFTS.take();
    let (mut rest, mut add) = (&blocks[..], false);
    while !rest.is_empty() {
        let of = |blocks: usize| Sweep { m, blocks: &rest[..blocks], terms };
        let most = (2..=rest.len()).take_while(|blocks| of(*blocks).words() <= LEFT).last().unwrap_or(1);
        let sweep = of(most);
        let packed = words.first(sweep.words());
        sweep.pack(lefts, packed, threads);
        sweep.multiply(packed, &rights, add, threads);
        (rest, add) = (&rest[most..], true);
    }
    LEFTS.set(words);
}

/// A range of k of one of the left-hand sides.
struct Block {
    left: usize,
    k: Range<usize>,
}

impl Block {
    fn registers(&self) -> usize {
        self.k.len().div_ceil(DEPTH)
    }
}

/// Nearly equal blocks of whole registers.
fn blocks(left: usize, k: usize, terms: Terms) -> impl Iterator<Item = Block> {
    let registers = k.div_ceil(DEPTH);
    let step = registers.div_ceil(registers.div_ceil(block(terms))) * DEPTH;
    (0..k).step_by(step).map(move |start| Block { left, k: start..k.min(start + step) })
}

/// Blocks that are packed together, of all rows of the left-hand sides.
#[derive(Clone, Copy)]
struct Sweep<'a> {
    m: usize,
    blocks: &'a [Block],
    terms: Terms,
}

impl Sweep<'_> {
    /// How many halves of 32 rows a panel has: the last one may do with one.
    fn halves(&self, panel: usize) -> usize {
        (self.m - panel * SIDE).div_ceil(SIDE / 2).min(2)
    }

    /// Words of a register of k of a panel.
    fn register(&self, panel: usize) -> usize {
        self.terms.left() * self.halves(panel) * REGISTER
    }

    /// Registers of k.
    fn registers(&self) -> usize {
        self.blocks.iter().map(Block::registers).sum()
    }

    /// Words of all blocks.
    fn words(&self) -> usize {
        self.m.div_ceil(SIDE / 2) * self.registers() * self.terms.left() * REGISTER
    }

    /// Packs `[panel of 32 rows][block]`.
    fn pack(&self, lefts: &[Left], packed: &mut [u32], threads: Threads) {
        let fill = |(panel, mut out): (usize, &mut [u32])| {
            let rows = panel * SIDE..self.m.min((panel + 1) * SIDE);
            for Block { left, k } in self.blocks {
                let Left { x, k: stride } = lefts[*left];
                let (block, rest) = out.split_at_mut(k.len().div_ceil(DEPTH) * self.register(panel));
                let from = Rows { data: &x[rows.start * stride + k.start..], stride, width: k.len() };
                along(from, rows.len(), self.terms.left(), block);
                out = rest;
            }
        };
        let size = self.registers() * self.register(0);
        match threads {
            Threads::One => packed.chunks_mut(size).enumerate().for_each(fill),
            Threads::All => packed.par_chunks_mut(size).enumerate().for_each(fill),
        }
    }

    fn multiply(&self, packed: &[u32], rights: &[Right], add: bool, threads: Threads) {
        let workers = if threads == Threads::One { 1 } else { rayon::current_num_threads() };
        // columns are cut evenly over the workers
        let cut = |right: &Right| {
            let panels = right.n.div_ceil(SIDE);
            let parts = panels.div_ceil(PANELS).next_multiple_of(workers).min(panels);
            (0..parts).map(move |part| part * panels / parts..(part + 1) * panels / parts)
        };
        let tasks: Vec<_> = rights.iter().flat_map(|right| cut(right).map(move |panels| (right, panels))).collect();
        let task = |(right, panels): &(&Right, Range<usize>)| self.columns(packed, right, panels.clone(), add);
        match threads {
            Threads::One => tasks.iter().for_each(task),
            Threads::All => tasks.par_iter().with_max_len(1).for_each(task),
        }
    }

    /// Multiplies all rows with panels of 32 columns of one result.
    fn columns(&self, packed: &[u32], right: &Right, panels: Range<usize>, mut add: bool) {
        let unit = Unit::ready().expect("a product in tiles is asked for where there are tiles");
        let columns = panels.start * SIDE..right.n.min(panels.end * SIDE);
        let all = self.registers();
        let mut sums = Sums::default();
        let (mut words, mut before) = (RIGHTS.take(), 0);
        for block in self.blocks {
            let depth = block.registers();
            let size = depth * self.terms.right() * 2 * REGISTER;
            let side = words.first(panels.len() * size);
            right.sides[block.left].pack(block.k.clone(), columns.clone(), self.terms.right(), side);
            for panel in 0..self.m.div_ceil(SIDE) {
                let register = self.register(panel);
                let left = &packed[panel * all * self.register(0) + before * register..][..depth * register];
                let rows = SIDE.min(self.m - panel * SIDE);
                for (column, side) in columns.clone().step_by(SIDE).zip(side.chunks_exact(size)) {
                    multiply(&unit, self.terms, self.halves(panel), depth, left, side, &mut sums);
                    let width = SIDE.min(right.n - column);
                    // SAFETY: `check` saw that the result holds m rows of n floats; this tile is this task's alone.
                    unsafe { put(&sums, &right.out, [panel * SIDE, column], [rows, width], add) };
                }
            }
            (before, add) = (before + depth, true);
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
    let masks = [first(width), first(width.saturating_sub(16))];
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

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{pack::transposed, *};

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn rounded(x: &[f32]) -> Vec<f32> {
        x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
    }

    /// `[n, k]` as the right-hand side `[k, n]`.
    struct Turned<'a> {
        w: &'a [f32],
        k: usize,
    }

    impl Side for Turned<'_> {
        fn pack(&self, k: Range<usize>, n: Range<usize>, parts: usize, out: &mut [u32]) {
            let size = k.len().div_ceil(DEPTH) * parts * 2 * REGISTER;
            for (panel, start) in out.chunks_exact_mut(size).zip(n.clone().step_by(SIDE)) {
                let from = Rows { data: &self.w[start * self.k + k.start..], stride: self.k, width: k.len() };
                transposed(from, SIDE.min(n.end - start), parts, panel);
            }
        }
    }

    /// `Σ x · wᵀ` in f64, and how large it would be without signs.
    fn exact(m: usize, n: usize, sides: &[(Vec<f32>, Vec<f32>, usize)]) -> Vec<(f64, f64)> {
        let sum = |i: usize, j: usize| {
            let terms = sides
                .iter()
                .flat_map(|(x, w, k)| (0..*k).map(move |p| f64::from(x[i * k + p]) * f64::from(w[j * k + p])));
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
        };
        (0..m * n).map(|at| sum(at / n, at % n)).collect()
    }

    #[test]
    fn sums_over_several_sides_are_those_of_f64() {
        if !super::super::amx::available() {
            return;
        }
        for terms in [Terms::One, Terms::Three, Terms::Six] {
            for (m, n, ks) in
                [(1, 1, vec![1]), (17, 33, vec![70, 31]), (48, 40, vec![300]), (97, 300, vec![64, 1000, 3])]
            {
                let side = |(index, k): (usize, &usize)| {
                    let (x, w) = (numbers(m * k, index as u32), numbers(n * k, 9 + index as u32));
                    match terms {
                        Terms::One => (rounded(&x), rounded(&w), *k),
                        Terms::Three => (x, rounded(&w), *k),
                        Terms::Six => (x, w, *k),
                    }
                };
                let sides: Vec<_> = ks.iter().enumerate().map(side).collect();
                let lefts: Vec<_> = sides.iter().map(|(x, _, k)| Left { x, k: *k }).collect();
                let turned: Vec<_> = sides.iter().map(|(_, w, k)| Turned { w, k: *k }).collect();
                let product = |lefts: &[Left], m: usize| {
                    let mut out = vec![1f32; m * (n + 3)];
                    let sides = turned.iter().map(|side| side as &dyn Side).collect();
                    let right = Right { sides, n, out: Out::new(&mut out, n + 3, true) };
                    products(m, lefts, vec![right], terms);
                    out
                };
                let ours = product(&lefts, m);
                for (at, (sum, size)) in exact(m, n, &sides).into_iter().enumerate() {
                    let ours = ours[at / n * (n + 3) + at % n];
                    // an f32's roundings of sums that grow to this size
                    assert!(
                        (f64::from(ours) - 1.0 - sum).abs() < 5e-7 * (1.0 + size),
                        "{terms:?} {m} {n} {ks:?}: {ours} {sum}"
                    );
                }
                let past = |row: &[f32]| row[n..].iter().all(|x| *x == 1.0);
                assert!(ours.chunks_exact(n + 3).all(past), "wrote past the columns");
                // the last row alone has the same bits
                let last: Vec<_> =
                    lefts.iter().map(|left| Left { x: &left.x[(m - 1) * left.k..], k: left.k }).collect();
                assert_eq!(product(&last, 1)[..n], ours[(m - 1) * (n + 3)..][..n]);
            }
        }
    }

    #[test]
    fn three_parts_hold_an_f32() {
        if !super::super::amx::available() {
            return;
        }
        let mut x = numbers(32, 5);
        x[..4].copy_from_slice(&[0.0, -3.3e38, 1e-30, 16_777_215.0]);
        let mut words = vec![0u32; 3 * REGISTER];
        along(Rows { data: &x, stride: 32, width: 32 }, 1, 3, &mut words);
        for (i, x) in x.iter().enumerate() {
            let part = |part: usize| {
                let word = words[part * REGISTER + i / 2];
                f64::from(bf16::from_bits((word >> (16 * (i % 2))) as u16).to_f32())
            };
            assert_eq!((part(0) + part(1) + part(2)) as f32, *x);
        }
    }
}
