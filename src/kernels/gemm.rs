//! Matrix products on the CPU: `c (+)= alpha · a · b`, blocked for the caches, on all cores.
//!
//! The right-hand side is an [`Rhs`]: something that packs panels of itself. A frozen matrix decodes itself while it is
//! packed, so no f32 copy of it ever exists; where it asks for bf16, the left-hand side is rounded while it is packed.
//!
//! The cut of k into blocks depends on k alone and every sum runs in the order of k, so an element's value is the same
//! at any number of threads and whatever other rows stand in the batch. Zero margins at step 0 rest on this.

use std::{cell::RefCell, marker::PhantomData, mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use super::{
    compute::Compute,
    micro::{MAX_TILE, Micro},
    pack::{Floats, Rounded, pair, rounded, transpose},
    words::Words,
};

/// Panels of the right-hand side that a task packs at once (8 × 32 columns × 512 words: 512 KiB).
pub(super) const PANELS: usize = 8;
/// Most words of k in a block: a packed panel of 32 columns stays in the second-level cache.
pub(super) const BLOCK: usize = 512;
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

    /// Fills `out` with panels of `nr` columns, `[panel][step][nr]` words (`micro.rs` says of what), zero beyond the last
    /// column of `n` and, in the second half of a pair, beyond the last of `k`.
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]);
}

/// Where the result goes: element `(i, j)` lies at `i·ld + j`.
///
/// A pointer, not a slice: tasks that fill columns of one matrix have interleaved elements, which no two slices may share.
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
    /// They lie in one buffer that outlives the product, initialised where it adds; nothing else touches the elements of
    /// the shape meanwhile.
    pub unsafe fn columns(data: *mut f32, len: usize, ld: usize, add: bool) -> Self {
        Self { data, len, ld, add, borrowed: PhantomData }
    }

    /// Fresh memory for `ld` columns a row; the product writes every element of its shape.
    pub fn fresh(data: &'a mut [MaybeUninit<f32>], ld: usize) -> Self {
        Self { data: data.as_mut_ptr().cast(), len: data.len(), ld, add: false, borrowed: PhantomData }
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

thread_local! {
    static LEFT: RefCell<Words> = const { RefCell::new(Words::new()) };
    static RIGHT: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// `out (+)= alpha · a[m, k] · b[k, n]`.
///
/// # Panics
/// Where a matrix does not hold the elements that the shape names.
pub fn gemm([m, n, k]: [usize; 3], alpha: f32, a: Lhs, b: &dyn Rhs, out: Out, threads: Threads) {
    if m == 0 || n == 0 {
        return;
    }
    out.check(m, n);
    if k == 0 {
        if !out.add {
            for i in 0..m {
                // SAFETY: the result holds m rows of n floats `ld` apart; zero bytes are 0.0.
                unsafe { out.data.add(i * out.ld).write_bytes(0, n) };
            }
        }
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "the left-hand side is too small");
    let compute = b.compute();
    let micro = Micro::choose(m, n, compute);
    let threads = if m * n * k < SERIAL { Threads::One } else { threads };
    let blocks = k.div_ceil(BLOCK * compute.per_step());
    // equal blocks in multiples of 32: block-quantised rows are cut between their blocks
    let step = k.div_ceil(blocks).next_multiple_of(32);
    // taken, not borrowed: while it waits for others, this thread may be given another product to work on
    let mut left = LEFT.take();
    for start in (0..k).step_by(step) {
        let block = start..k.min(start + step);
        let steps = block.len().div_ceil(compute.per_step());
        let left = left.first(m.next_multiple_of(micro.mr) * steps);
        pack_left(&micro, m, block.clone(), (alpha, a, compute), left, threads);
        let product = Product { micro, m, k: block, steps, left, right: b, out: &out, add: out.add || start > 0 };
        product.run(n, threads);
    }
    LEFT.set(left);
}

/// Packs rows of `a` into panels as the kernel wants them, scaled, zero beyond the last row.
fn pack_left(
    micro: &Micro,
    m: usize,
    k: Range<usize>,
    (alpha, a, compute): (f32, Lhs, Compute),
    left: &mut [u32],
    threads: Threads,
) {
    let mr = micro.mr;
    let panel = mr * k.len().div_ceil(compute.per_step());
    let fill = |(index, panel): (usize, &mut [u32])| {
        let rows = index * mr..m.min((index + 1) * mr);
        let count = rows.len();
        if a.col == 1 {
            let data = &a.data[rows.start * a.row + k.start..];
            let floats = Floats { data, stride: a.row, k: k.len(), alpha };
            return match compute {
                Compute::F32 => transpose(floats, count, mr, panel),
                Compute::Bf16 => transpose(Rounded(floats), count, mr, panel),
            };
        }
        if count < mr {
            panel.fill(0);
        }
        let element = |r: usize, p: usize| alpha * a.data[(rows.start + r) * a.row + p * a.col];
        let word = |r: usize, p: usize| {
            let second = if p + 1 < k.end { rounded(element(r, p + 1)) } else { 0 };
            pair(rounded(element(r, p)), second)
        };
        for (step, out) in panel.chunks_exact_mut(mr).enumerate() {
            let p = k.start + step * compute.per_step();
            match compute {
                Compute::F32 if a.row == 1 => {
                    let from = &a.data[rows.start + p * a.col..][..count];
                    out.iter_mut().zip(from).for_each(|(out, x)| *out = (alpha * x).to_bits());
                }
                Compute::F32 => (0..count).for_each(|r| out[r] = element(r, p).to_bits()),
                Compute::Bf16 => (0..count).for_each(|r| out[r] = word(r, p)),
            }
        }
    };
    match threads {
        Threads::One => left.chunks_exact_mut(panel).enumerate().for_each(fill),
        Threads::All => left.par_chunks_exact_mut(panel).enumerate().with_min_len(4).for_each(fill),
    }
}

/// One block of k: packed rows on the left, panels of the right packed by the task that multiplies them.
struct Product<'a> {
    micro: Micro,
    m: usize,
    k: Range<usize>,
    /// Words of `k`.
    steps: usize,
    left: &'a [u32],
    right: &'a dyn Rhs,
    out: &'a Out<'a>,
    add: bool,
}

impl Product<'_> {
    fn run(&self, n: usize, threads: Threads) {
        let (mr, nr) = (self.micro.mr, self.micro.nr);
        let (row_panels, panels) = (self.m.div_ceil(mr), n.div_ceil(nr));
        let workers = if threads == Threads::One { 1 } else { rayon::current_num_threads() };
        // columns are cut evenly over the workers; where there are too few, rows are cut as well
        let column_tasks = panels.div_ceil(PANELS).next_multiple_of(workers).min(panels);
        let row_tasks = workers.div_ceil(column_tasks).min(row_panels);
        let cut = |parts: usize, total: usize, i: usize| i * total / parts..(i + 1) * total / parts;
        let task = |index: usize| {
            let columns = cut(column_tasks, panels, index / row_tasks);
            let rows = cut(row_tasks, row_panels, index % row_tasks);
            self.tiles(rows, columns, n);
        };
        match threads {
            Threads::One => (0..column_tasks * row_tasks).for_each(task),
            Threads::All => (0..column_tasks * row_tasks).into_par_iter().with_max_len(1).for_each(task),
        }
    }

    /// Multiplies the row panels with the column panels.
    fn tiles(&self, row_panels: Range<usize>, panels: Range<usize>, n: usize) {
        let (mr, nr, k) = (self.micro.mr, self.micro.nr, self.steps);
        RIGHT.with_borrow_mut(|right| {
            let right = right.first(panels.len() * nr * k);
            self.right.pack(self.k.clone(), panels.start * nr..n.min(panels.end * nr), nr, right);
            for row_panel in row_panels {
                let left = &self.left[row_panel * mr * k..][..mr * k];
                for (panel, right) in panels.clone().zip(right.chunks_exact(nr * k)) {
                    self.tile(left, right, row_panel * mr, panel * nr, n);
                }
            }
        });
    }

    fn tile(&self, left: &[u32], right: &[u32], i: usize, j: usize, n: usize) {
        let Micro { mr, nr, tile, .. } = self.micro;
        let (k, ld) = (self.steps, self.out.ld);
        let (rows, columns) = (mr.min(self.m - i), nr.min(n - j));
        // SAFETY: `gemm` checked that the result holds m rows of n floats `ld` apart; this tile is ours alone; the
        // panels hold k·mr and k·nr words; `Micro::choose` checked the processor.
        unsafe {
            let c = self.out.data.add(i * ld + j);
            if rows == mr && columns == nr {
                return tile(k, left.as_ptr(), right.as_ptr(), c, ld, self.add);
            }
            let mut whole = [0f32; MAX_TILE];
            tile(k, left.as_ptr(), right.as_ptr(), whole.as_mut_ptr(), nr, false);
            for (r, sums) in whole.chunks_exact(nr).take(rows).enumerate() {
                for (j, sum) in sums.iter().take(columns).enumerate() {
                    let at = c.add(r * ld + j);
                    at.write(if self.add { *at + sum } else { *sum });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i + seed).wrapping_mul(2654435761) >> 20) as f32 / 2048.0 - 1.0).collect()
    }

    fn plain([m, n, k]: [usize; 3], a: &[f32], b: &[f32]) -> Vec<f64> {
        let mut c = vec![0f64; m * n];
        for i in 0..m {
            for p in 0..k {
                for j in 0..n {
                    c[i * n + j] += f64::from(a[i * k + p]) * f64::from(b[p * n + j]);
                }
            }
        }
        c
    }

    #[test]
    fn equals_the_sum_in_f64_at_every_edge() {
        for [m, n, k] in [[1, 1, 1], [12, 32, 8], [13, 33, 9], [25, 8, 576], [7, 100, 1100], [64, 300, 520]] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let exact = plain([m, n, k], &a, &b);
            for threads in [Threads::One, Threads::All] {
                let mut c = vec![f32::NAN; m * n];
                let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
                gemm([m, n, k], 0.5, lhs, &rhs, Out::new(&mut c, n, false), threads);
                gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, true), threads);
                for (c, exact) in c.iter().zip(&exact) {
                    assert!((f64::from(*c) - 1.5 * exact).abs() < 2e-6 * k as f64, "{c} {exact}");
                }
            }
        }
    }

    #[test]
    fn transposed_sides_give_the_same_bits() {
        let [m, n, k] = [30, 70, 50];
        let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
        let transpose = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..rows * cols).map(|i| x[(i % rows) * cols + i / rows]).collect()
        };
        let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
        let (mut c, mut ct) = (vec![0f32; m * n], vec![0f32; m * n]);
        let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
        gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, false), Threads::All);
        let (lhs, rhs) = (Lhs { data: &at, row: 1, col: m }, Dense { data: &bt, row: 1, col: k });
        gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut ct, n, false), Threads::One);
        assert_eq!(c, ct);
    }

    /// Two products at once write columns that interleave, as attention's heads do. Small enough for Miri.
    #[test]
    fn columns_of_one_matrix_are_filled_side_by_side() {
        let [m, n, k] = [5, 3, 4];
        let (a, b) = (numbers(m * k, 7), numbers(k * n, 8));
        let mut one = vec![0f32; m * n];
        let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Dense { data: &b, row: n, col: 1 });
        gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
        let mut all = vec![0f32; m * 2 * n];
        let whole = Out::new(&mut all, 2 * n, false);
        let start = |out: &Out| out.data;
        let half = |at: usize, add: bool| {
            // SAFETY: the columns `at..at + n` are this closure's alone.
            let out = unsafe { Out::columns(start(&whole).add(at), (m - 1) * 2 * n + n, 2 * n, add) };
            gemm([m, n, k], 1.0, lhs, &rhs, out, Threads::One);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| half(0, false));
            half(n, true);
        });
        for (row, one) in all.chunks_exact(2 * n).zip(one.chunks_exact(n)) {
            assert_eq!((&row[..n], &row[n..]), (one, one));
        }
        // nothing along k is a sum of nothing
        gemm([m, n, 0], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
        assert_eq!(one, vec![0.0; m * n]);
    }

    /// Packs slowly now and then, so that threads wait for one another.
    struct Slow<'a>(Dense<'a>);

    impl Rhs for Slow<'_> {
        fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]) {
            if n.start > 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            self.0.pack(k, n, nr, out);
        }
    }

    #[test]
    fn a_thread_that_waits_within_a_product_may_begin_another() {
        let [m, n, k] = [64, 64, SERIAL / 64 / 64];
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let product = |_| {
            let mut c = vec![0f32; m * n];
            let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Slow(Dense { data: &b, row: n, col: 1 }));
            gemm([m, n, k], 1.0, lhs, &rhs, Out::new(&mut c, n, false), Threads::All);
            c
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let all: Vec<_> = pool.install(|| (0..50).into_par_iter().map(product).collect());
        assert!(all.iter().all(|c| *c == all[0]));
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let [m, n, k] = [37, 65, 700];
        let (a, b) = (numbers(m * k, 5), numbers(k * n, 6));
        let rhs = Dense { data: &b, row: n, col: 1 };
        let mut all = vec![0f32; m * n];
        gemm([m, n, k], 1.0, Lhs { data: &a, row: k, col: 1 }, &rhs, Out::new(&mut all, n, false), Threads::All);
        for i in 0..m {
            let mut one = vec![0f32; n];
            let lhs = Lhs { data: &a[i * k..], row: k, col: 1 };
            gemm([1, n, k], 1.0, lhs, &rhs, Out::new(&mut one, n, false), Threads::One);
            assert_eq!(one, all[i * n..(i + 1) * n]);
        }
    }
}
