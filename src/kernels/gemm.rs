//! Matrix products on the CPU: `c (+)= alpha · a · b`, blocked for the caches, on all cores.
//!
//! The right-hand side is an [`Rhs`]: something that packs panels of itself. A frozen matrix decodes itself while it is
//! packed, so no f32 copy of it ever exists; where it asks for bf16, the left-hand side is rounded while it is packed.
//!
//! A left-hand side is packed once for all matrices that it meets, and several pairs of sides may add up to one result.
//! The cut of k into blocks depends on k alone and every sum runs in the order of k, so an element's value is the same
//! at any number of threads and whatever other rows stand in the batch. Zero margins at step 0 rest on this.

use std::{marker::PhantomData, mem::MaybeUninit, ops::Range};

use super::{
    compute::Compute,
    micro::Micro,
    pack::{Floats, transpose},
    words::One,
};
use sweep::{Block, Sweep};

mod sweep;
#[cfg(test)]
mod tests;

/// Panels of the right-hand side that a task packs at once (4 × 32 columns × 768 words: 384 KiB, half of it on AVX2).
pub(super) const PANELS: usize = 4;
/// Most words of k in a block: packed panels stay in the second-level cache, and a tile is summed up so long that what
/// it takes to begin and to end one hardly counts.
pub(super) const BLOCK: usize = 768;
/// Words of the left-hand sides that are packed at once, where they hold more than one block of k.
const LEFT: usize = 1 << 19;
/// Products under so many multiply-adds are not worth waking other threads for.
pub const SERIAL: usize = 1 << 18;

/// A left-hand side `[m, k]`: element `(i, p)` is `data[i·row + p·col]`.
#[derive(Clone, Copy)]
pub struct Lhs<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Stride between rows.
    pub row: usize,
    /// Stride between columns.
    pub col: usize,
}

/// A right-hand side `[k, n]` that packs itself.
pub trait Rhs: Sync {
    /// The type in which the product multiplies.
    fn compute(&self) -> Compute {
        Compute::F32
    }

    /// Fills `out` with panels of `nr` columns, `[panel][step][nr]` words (`micro.rs` says of what), zero beyond the
    /// last column of `n` and, in the second half of a pair, beyond the last of `k`.
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]);

    /// Asks for what [`Rhs::pack`] will read to come nearer: a share of it, the `part`th of `parts`.
    fn fetch(&self, _k: Range<usize>, _n: Range<usize>, _part: usize, _parts: usize) {}
}

/// Where the result goes: element `(i, j)` lies at `i·ld + j`.
///
/// A pointer, not a slice: tasks that fill columns of one matrix have interleaved elements, which no two slices may
/// share.
pub struct Out<'a> {
    pub(super) data: *mut f32,
    len: usize,
    pub(super) ld: usize,
    pub(super) add: bool,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl<'a> Out<'a> {
    /// Rows `ld` apart, written over, or added to where `add` says so.
    pub fn new(data: &'a mut [f32], ld: usize, add: bool) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), ld, add, borrowed: PhantomData }
    }

    /// `len` floats from `data` on, of which the product touches those of its shape alone.
    ///
    /// # Safety
    /// They lie in one buffer that outlives the product, initialised where it adds; nothing else touches the elements
    /// of the shape meanwhile.
    pub unsafe fn columns(data: *mut f32, len: usize, ld: usize, add: bool) -> Self {
        Self { data, len, ld, add, borrowed: PhantomData }
    }

    /// Fresh memory for `ld` columns a row; the product writes every element of its shape.
    pub fn fresh(data: &'a mut [MaybeUninit<f32>], ld: usize) -> Self {
        Self { data: data.as_mut_ptr().cast(), len: data.len(), ld, add: false, borrowed: PhantomData }
    }

    /// Zeros for `m` rows of `n` columns, which lie in it.
    fn clear(&self, m: usize, n: usize) {
        for i in 0..m {
            // SAFETY: `check` saw that the result holds m rows of n floats `ld` apart; zero bytes are 0.0.
            unsafe { self.data.add(i * self.ld).write_bytes(0, n) };
        }
    }

    /// Writes, or adds, `rows × columns` of a tile of `nr` columns at row `i` and column `j`.
    ///
    /// # Safety
    /// They lie in the result, are initialised where it adds, and nobody else touches them meanwhile.
    pub(super) unsafe fn put(
        &self,
        tile: &[f32],
        nr: usize,
        [i, j]: [usize; 2],
        [rows, columns]: [usize; 2],
        add: bool,
    ) {
        for (r, sums) in tile.chunks_exact(nr).take(rows).enumerate() {
            for (c, sum) in sums.iter().take(columns).enumerate() {
                // SAFETY: the caller vouches for them.
                unsafe {
                    let at = self.data.add((i + r) * self.ld + j + c);
                    at.write(if add { *at + sum } else { *sum });
                }
            }
        }
    }

    /// # Panics
    /// Where `m` rows of `n` columns do not lie in it.
    pub(super) fn check(&self, m: usize, n: usize) {
        assert!(m == 0 || self.ld >= n && self.len >= (m - 1) * self.ld + n, "the result is too small");
    }
}

// SAFETY: it is written in unsafe code alone, where every task has its own rows and columns; the borrow outlives them.
unsafe impl Send for Out<'_> {}
// SAFETY: as above.
unsafe impl Sync for Out<'_> {}

/// A dense f32 right-hand side with any strides: element `(p, j)` is `data[p·row + j·col]`.
#[derive(Clone, Copy)]
pub struct Dense<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Stride between rows (k).
    pub row: usize,
    /// Stride between columns (n).
    pub col: usize,
}

impl Rhs for Dense<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]) {
        for (panel, start) in out.chunks_exact_mut(k.len() * nr).zip(n.clone().step_by(nr)) {
            let width = nr.min(n.end - start);
            if self.row == 1 {
                let data = &self.data[k.start + start * self.col..];
                transpose(Floats { data, stride: self.col, k: k.len(), alpha: 1.0 }, width, nr, panel);
                continue;
            }
            for (out, p) in panel.chunks_exact_mut(nr).zip(k.clone()) {
                let from = &self.data[p * self.row + start * self.col..];
                match self.col {
                    1 => out.iter_mut().zip(&from[..width]).for_each(|(out, x)| *out = x.to_bits()),
                    col => {
                        out[..width].iter_mut().zip(from.iter().step_by(col)).for_each(|(out, x)| *out = x.to_bits())
                    }
                }
                out[width..].fill(0);
            }
        }
    }
}

/// Whether a product may spread over the cores. Inside a task of a parallel loop it stays on its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// This thread alone.
    One,
    /// Rayon's pool.
    All,
}

/// What is multiplied with the left-hand sides to be one result.
pub struct Right<'a> {
    /// A matrix `[k, n]` for each left-hand side, all of one type.
    pub sides: &'a [&'a dyn Rhs],
    /// Their columns.
    pub n: usize,
    /// Where the sum of the products goes.
    pub out: Out<'a>,
}

static PACKED: One = One::new();

/// `out (+)= alpha · a[m, k] · b[k, n]`.
///
/// # Panics
/// Where a matrix does not hold the elements that the shape names.
pub fn gemm([m, n, k]: [usize; 3], alpha: f32, a: Lhs, b: &dyn Rhs, out: Out, threads: Threads) {
    products(m, alpha, &[(a, k)], &[Right { sides: &[b], n, out }], threads);
}

/// `out (+)= alpha · Σ a[m, k] · side[k, n]` over the left-hand sides, each with its k, for each of `rights`.
///
/// # Panics
/// Where a matrix does not hold the elements that the shape names, and where sides are of different types.
pub fn products(m: usize, alpha: f32, lefts: &[(Lhs, usize)], rights: &[Right], threads: Threads) {
    let Some(compute) = rights.first().and_then(|right| right.sides.first()).map(|side| side.compute()) else { return };
    for right in rights {
        right.out.check(m, right.n);
        assert_eq!(right.sides.len(), lefts.len(), "a side for each left-hand side");
        assert!(right.sides.iter().all(|side| side.compute() == compute), "sides of different types");
    }
    for (a, k) in lefts {
        assert!(m * k == 0 || a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "the left-hand side is too small");
    }
    let columns: usize = rights.iter().map(|right| right.n).sum();
    let deep: usize = lefts.iter().map(|(_, k)| k).sum();
    if m == 0 || columns == 0 {
        return;
    }
    if deep == 0 {
        rights.iter().filter(|right| !right.out.add).for_each(|right| right.out.clear(m, right.n));
        return;
    }
    let threads = if m * columns * deep < SERIAL { Threads::One } else { threads };
    let mr = Micro::choose(m, columns, compute).mr;
    let blocks: Vec<_> = lefts.iter().enumerate().flat_map(|(left, (_, k))| blocks(left, *k, compute)).collect();
    let mut words = PACKED.take();
    for (index, sweep) in (Sweep { m, mr, compute, blocks: &blocks }).parts().enumerate() {
        let packed = words.first(sweep.words());
        sweep.pack(alpha, lefts, packed, threads);
        sweep.multiply(packed, rights, index > 0, threads);
    }
    PACKED.give_back(words);
}

/// The most words that a product packs at once of left-hand sides of up to `m` rows, each so deep.
pub(super) fn left_words(m: usize, depths: &[usize], compute: Compute) -> usize {
    let m = m.next_multiple_of(Micro::choose(m, usize::MAX, compute).mr);
    let steps: usize = depths.iter().map(|k| k.div_ceil(compute.per_step())).sum();
    let block = depths.iter().map(|k| block_steps(*k, compute)).max().unwrap_or(0);
    // where all rows take fewer blocks at once, fewer rows take more of them, up to LEFT
    (m * steps).min(LEFT.max(m * block))
}

/// Steps of the deepest block of `k`.
pub(super) fn block_steps(k: usize, compute: Compute) -> usize {
    k.min(block(k, compute)).div_ceil(compute.per_step())
}

/// The most columns of a panel on the right.
pub(super) fn panel(compute: Compute) -> usize {
    Micro::choose(usize::MAX, usize::MAX, compute).nr
}

/// How deep a block of `k` is.
fn block(k: usize, compute: Compute) -> usize {
    let blocks = k.div_ceil(BLOCK * compute.per_step());
    k.div_ceil(blocks.max(1)).next_multiple_of(32)
}

/// Nearly equal blocks in multiples of 32: block-quantised rows are cut between their blocks.
fn blocks(left: usize, k: usize, compute: Compute) -> impl Iterator<Item = Block> {
    let step = block(k, compute);
    (0..k).step_by(step.max(1)).map(move |start| Block { left, k: start..k.min(start + step) })
}
