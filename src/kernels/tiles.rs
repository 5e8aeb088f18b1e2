//! Products with frozen matrices in the tile unit ([`super::amx`]): f32 taken apart, or rounded to bf16.
//!
//! The left-hand side, activations, is packed once for all matrices that it meets. Tasks pack columns of those, a block
//! of k at a time, and multiply them with all rows. As in [`super::gemm`], the cut of k depends on k alone and every
//! sum runs in one order, so a row's bits depend neither on threads nor on the rows beside it.

pub mod digits;
pub mod pack;

use std::{arch::x86_64::*, cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    amx::{REGISTER, SIDE, Sums, Terms, Unit, multiply},
    compute::Compute,
    gemm::{Out, SERIAL, Threads},
    held::Lefts,
    simd::first,
    words::{One, Words},
};
use pack::Rows;

/// Panels of 32 columns that a task packs at once.
const PANELS: usize = 8;

/// Words of the left-hand side that are packed at once, where it holds more.
const LEFT: usize = 1 << 19;

/// Columns of a matrix of which a whole block of k is decoded at once for digits, whose scale must be known first.
pub const DECODED_COLUMNS: usize = 2 * SIDE;

/// Registers of k in a block: a panel of the left stays in the first-level cache. The best on Sapphire Rapids of 2 to
/// 32.
fn block(terms: Terms) -> usize {
    match terms {
        Terms::One => 9,
        Terms::Three => 6,
        Terms::Eight => DIGITS,
    }
}

/// Registers of digits in a block.
const DIGITS: usize = 4;
// a sum of three products of digits is a whole number that an f32 holds
const _: () = assert!(3 * DIGITS * Terms::Eight.depth() * 128 * 128 < 1 << 24);

/// Words of `16 · halves` rows or columns in so many registers of k, and of their scales where they are digits.
fn panel(terms: Terms, registers: usize, parts: usize, halves: usize) -> usize {
    registers * parts * halves * REGISTER + if terms == Terms::Eight { SIDE } else { 0 }
}

/// Words of a panel of 32 columns of a right-hand side, `k` deep.
pub fn panel_of(k: usize, terms: Terms) -> usize {
    panel(terms, k.div_ceil(terms.depth()), terms.right(), 2)
}

/// Packs up to 32 rows of f32, k running along them, as a panel of the right-hand side.
///
/// # Panics
/// Where the sizes do not fit, and where the processor has no tiles.
pub fn transposed(from: Rows<f32>, rows: usize, terms: Terms, out: &mut [u32]) {
    match terms {
        Terms::Eight => digits::transposed(from, rows, out),
        _ => pack::transposed(from, rows, out),
    }
}

/// Bytes that so many threads hold for products.
pub(super) fn held<'a, I: Iterator<Item = Lefts<'a>>>(
    products: impl Fn() -> I,
    threads: usize,
    compute: Compute,
) -> usize {
    let of = |terms: Terms| {
        let registers = |k: usize| k.div_ceil(terms.depth());
        let blocks = |k: usize| registers(k).div_ceil(block(terms));
        // as in `gemm::left_words`: where all rows take fewer blocks at once, fewer rows take more of them, up to LEFT
        let left = |(rows, depths): Lefts| {
            let one =
                |k: usize| rows.div_ceil(SIDE) * panel(terms, registers(k).div_ceil(blocks(k).max(1)), terms.left(), 2);
            let all: usize = depths.iter().map(|k| blocks(*k) * one(*k)).sum();
            all.min(LEFT.max(depths.iter().map(|k| one(*k)).max().unwrap_or(0)))
        };
        let left = products().map(left).max().unwrap_or(0);
        let deepest = products().flat_map(|(_, depths)| depths).map(|k| registers(*k)).max().unwrap_or(0);
        let k = deepest.min(block(terms)) * terms.depth();
        // decoded before it is packed: forward a block of k of a panel's rows; backward a task's columns of 32 rows, or
        // for digits some columns of a block
        let columns = PANELS * SIDE;
        let decoded = if terms == Terms::Eight { k * DECODED_COLUMNS } else { SIDE * k.max(columns) };
        (left + threads * (PANELS * panel_of(k, terms) + decoded)) * size_of::<u32>()
    };
    match compute {
        Compute::Bf16 => of(Terms::One),
        Compute::F32 => of(Terms::Three).max(of(Terms::Eight)),
    }
}

/// A right-hand side `[k, n]` that packs itself.
pub trait Side: Sync {
    /// Fills `out` with panels of 32 columns, `[panel][register of k][parts][2]` registers of sixteen words of k times
    /// sixteen columns, zero beyond the last column and the last of `k`, which starts at a multiple of a register's
    /// depth; behind the registers of a panel the scales of its columns, where they are digits. It stays on its thread:
    /// another task's tiles are not to come between.
    fn pack(&self, k: Range<usize>, n: Range<usize>, terms: Terms, out: &mut [u32]);
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

static LEFTS: One = One::new();

thread_local! {
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
    LEFTS.give_back(words);
}

/// A range of k of one of the left-hand sides.
struct Block {
    left: usize,
    k: Range<usize>,
}

/// Nearly equal blocks of whole registers.
fn blocks(left: usize, k: usize, terms: Terms) -> impl Iterator<Item = Block> {
    let registers = k.div_ceil(terms.depth());
    let step = registers.div_ceil(registers.div_ceil(block(terms))) * terms.depth();
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

    /// Registers of k in a block.
    fn registers(&self, block: &Block) -> usize {
        block.k.len().div_ceil(self.terms.depth())
    }

    /// Words of a block of a panel of so many halves.
    fn block(&self, block: &Block, halves: usize) -> usize {
        panel(self.terms, self.registers(block), self.terms.left(), halves)
    }

    /// Words of all blocks of a panel of so many halves.
    fn panel(&self, halves: usize) -> usize {
        self.blocks.iter().map(|block| self.block(block, halves)).sum()
    }

    /// Words of all blocks.
    fn words(&self) -> usize {
        let last = self.m.div_ceil(SIDE) - 1;
        last * self.panel(2) + self.panel(self.halves(last))
    }

    /// Packs `[panel of 32 rows][block]`.
    fn pack(&self, lefts: &[Left], packed: &mut [u32], threads: Threads) {
        let fill = |(panel, mut out): (usize, &mut [u32])| {
            let rows = panel * SIDE..self.m.min((panel + 1) * SIDE);
            for block in self.blocks {
                let Left { x, k: stride } = lefts[block.left];
                let (words, rest) = out.split_at_mut(self.block(block, self.halves(panel)));
                let from = Rows { data: &x[rows.start * stride + block.k.start..], stride, width: block.k.len() };
                match self.terms {
                    Terms::One => pack::along::<1>(from, rows.len(), words),
                    Terms::Three => pack::along::<3>(from, rows.len(), words),
                    Terms::Eight => digits::along(from, rows.len(), words),
                }
                out = rest;
            }
        };
        let size = self.panel(2);
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
        let mut sums = Sums::default();
        let mut words = RIGHTS.take();
        for (index, block) in self.blocks.iter().enumerate() {
            let size = panel_of(block.k.len(), self.terms);
            let side = words.first(panels.len() * size);
            right.sides[block.left].pack(block.k.clone(), columns.clone(), self.terms, side);
            for panel in 0..self.m.div_ceil(SIDE) {
                let halves = self.halves(panel);
                let before: usize = self.blocks[..index].iter().map(|block| self.block(block, halves)).sum();
                let left = &packed[panel * self.panel(2) + before..][..self.block(block, halves)];
                let rows = SIDE.min(self.m - panel * SIDE);
                for (column, side) in columns.clone().step_by(SIDE).zip(side.chunks_exact(size)) {
                    multiply(&unit, self.terms, halves, self.registers(block), left, side, &mut sums);
                    let tile = Tile { at: [panel * SIDE, column], rows, width: SIDE.min(right.n - column), add };
                    // SAFETY: `check` saw that the result holds m rows of n floats; this tile is this task's alone.
                    unsafe {
                        match self.terms {
                            Terms::Eight => {
                                let scales =
                                    [left, side].map(|panel| panel.last_chunk().expect("behind the registers"));
                                put(&right.out, tile, |row, half| digits::sum(&sums, scales, row, half));
                            }
                            _ => put(&right.out, tile, |row, half| {
                                _mm512_loadu_ps(sums.0[0][row][half * 16..].as_ptr().cast())
                            }),
                        }
                    }
                }
            }
            add = true;
        }
        RIGHTS.set(words);
    }
}

/// A part of a result.
struct Tile {
    /// Its first row and column.
    at: [usize; 2],
    rows: usize,
    width: usize,
    /// Whether there is already a part of the sum.
    add: bool,
}

/// Writes sums to the result, or adds them: `sum` gives sixteen of a row, the lower or the upper half.
///
/// # Safety
/// The tile lies in the result, nothing else touches it, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn put(out: &Out, tile: Tile, sum: impl Fn(usize, usize) -> __m512) {
    let masks = [first(tile.width), first(tile.width.saturating_sub(16))];
    let [row, column] = tile.at;
    for i in 0..tile.rows {
        for (half, mask) in masks.into_iter().enumerate() {
            // SAFETY: the caller vouches for the row; the mask holds what is read and written to the columns.
            unsafe {
                let at = out.data.add((row + i) * out.ld + column).wrapping_add(16 * half);
                let mut sum = sum(i, half);
                if tile.add || out.add {
                    sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum);
                }
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

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
        fn pack(&self, k: Range<usize>, n: Range<usize>, terms: Terms, out: &mut [u32]) {
            let size = panel_of(k.len(), terms);
            for (panel, start) in out.chunks_exact_mut(size).zip(n.clone().step_by(SIDE)) {
                let from = Rows { data: &self.w[start * self.k + k.start..], stride: self.k, width: k.len() };
                transposed(from, SIDE.min(n.end - start), terms, panel);
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
        for terms in [Terms::One, Terms::Three, Terms::Eight] {
            for (m, n, ks) in [
                (1, 1, vec![1]),
                (17, 33, vec![70, 31]),
                (48, 40, vec![300]),
                (97, 300, vec![64, 1000, 3]),
                (700, 40, vec![1500]),
            ] {
                let side = |(index, k): (usize, &usize)| {
                    let (x, w) = (numbers(m * k, index as u32), numbers(n * k, 9 + index as u32));
                    match terms {
                        Terms::One => (rounded(&x), rounded(&w), *k),
                        Terms::Three => (x, rounded(&w), *k),
                        Terms::Eight => (x, w, *k),
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
        pack::along::<3>(Rows { data: &x, stride: 32, width: 32 }, 1, &mut words);
        for (i, x) in x.iter().enumerate() {
            let part = |part: usize| {
                let word = words[part * REGISTER + i / 2];
                f64::from(bf16::from_bits((word >> (16 * (i % 2))) as u16).to_f32())
            };
            assert_eq!((part(0) + part(1) + part(2)) as f32, *x);
        }
    }

    /// The sum of one row of numbers times one column, and how it comes out.
    fn sum_of(x: &[f32], w: &[f32]) -> f32 {
        let mut out = [0f32];
        let side = Turned { w, k: x.len() };
        let right = Right { sides: vec![&side], n: 1, out: Out::new(&mut out, 1, false) };
        products(1, &[Left { x, k: x.len() }], vec![right], Terms::Eight);
        out[0]
    }

    #[test]
    fn digits_hold_numbers_of_any_size() {
        if !super::super::amx::available() {
            return;
        }
        let ones = [1f32; 300];
        for number in
            [0.0, 1.0, -1.0, 8_355_711.0, 8_388_607.0, -16_777_215.0, 1e-30, -3e38, 1.999_999_9, f32::MIN_POSITIVE]
        {
            let mut x = [0f32; 300];
            x[280] = number;
            for (a, b) in [(&x, &ones), (&ones, &x)] {
                let sum = sum_of(a, b);
                // half a unit, of which the largest number is at least half of what three digits reach
                let bound = f64::from(number.abs()) / 8_355_711.0 + 1e-37;
                assert!((f64::from(sum) - f64::from(number)).abs() <= bound, "{number:e} became {sum:e}");
            }
        }
        // what is small beside a large number counts in blocks of its own
        let mut x = [1e-3f32; 600];
        x[0] = 1e6;
        let sum = sum_of(&x, &[&[0.0; 300], &[1.0; 300][..]].concat());
        assert!((f64::from(sum) - 300.0 * f64::from(1e-3f32)).abs() < 1e-7, "{sum}");
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        if !super::super::amx::available() {
            return;
        }
        let ones = [1f32; 300];
        for number in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX] {
            let mut x = ones;
            x[7] = number;
            assert!(!sum_of(&x, &ones).is_finite() && !sum_of(&ones, &x).is_finite(), "{number}");
        }
    }
}
