//! Matrix products on the CPU: `c (+)= alpha · a · b`, blocked for the caches, on all cores.
//!
//! The right-hand side is an [`Rhs`]: something that packs panels of itself as f32. A frozen matrix in bf16 (or any
//! later format) decodes itself while it is packed, so no f32 copy of it ever exists.
//!
//! The cut of k into blocks depends on k alone and every sum runs in the order of k, so an element's value is the same
//! at any number of threads and whatever other rows stand in the batch. Zero margins at step 0 rest on this.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::micro::{MAX_TILE, Micro};

/// Most steps of k in a block: a packed panel of 32 columns stays in the second-level cache.
const K_BLOCK: usize = 512;
/// Panels of the right-hand side that a task packs at once (8 × 32 columns × 512 steps: 512 KiB).
const PANELS: usize = 8;
/// Products under so many multiply-adds are not worth waking other threads for.
const SERIAL: usize = 1 << 18;

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
    /// Fills `out` with panels of `nr` columns, `[panel][k][nr]`, zero beyond the last column of `n`.
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [f32]);
}

/// Where the result goes: element `(i, j)` is `data[i·ld + j]`.
pub struct Out<'a> {
    /// The elements.
    pub data: &'a mut [f32],
    /// Stride between rows.
    pub ld: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

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
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [f32]) {
        let panel = k.len() * nr;
        for (panel, start) in out.chunks_exact_mut(panel).zip(n.clone().step_by(nr)) {
            let width = nr.min(n.end - start);
            for (out, p) in panel.chunks_exact_mut(nr).zip(k.clone()) {
                let at = p * self.row + start * self.col;
                if self.col == 1 {
                    out[..width].copy_from_slice(&self.data[at..at + width]);
                } else {
                    for (j, out) in out[..width].iter_mut().enumerate() {
                        *out = self.data[at + j * self.col];
                    }
                }
                out[width..].fill(0.0);
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
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static RIGHT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out (+)= alpha · a[m, k] · b[k, n]`.
///
/// # Panics
/// Where a matrix does not hold the elements that the shape names.
pub fn gemm([m, n, k]: [usize; 3], alpha: f32, a: Lhs, b: &dyn Rhs, out: Out, threads: Threads) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(out.ld >= n && out.data.len() >= (m - 1) * out.ld + n, "the result is too small");
    if k == 0 {
        if !out.add {
            (0..m).for_each(|i| out.data[i * out.ld..][..n].fill(0.0));
        }
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "the left-hand side is too small");
    let micro = Micro::choose(n);
    let threads = if m * n * k < SERIAL { Threads::One } else { threads };
    let blocks = k.div_ceil(K_BLOCK);
    // equal blocks in multiples of 32: block-quantised rows are cut between their blocks
    let step = k.div_ceil(blocks).next_multiple_of(32);
    let target = Target { data: out.data.as_mut_ptr(), ld: out.ld };
    // taken, not borrowed: while it waits for others, this thread may be given another product to work on
    let mut left = LEFT.take();
    for start in (0..k).step_by(step) {
        let block = start..k.min(start + step);
        pack_left(&micro, m, block.clone(), alpha, a, &mut left, threads);
        let product = Product { micro, m, k: block, left: &left, right: b, target, add: out.add || start > 0 };
        product.run(n, threads);
    }
    LEFT.set(left);
}

/// Packs rows of `a` as `[panel][k][mr]`, scaled, zero beyond the last row.
fn pack_left(micro: &Micro, m: usize, k: Range<usize>, alpha: f32, a: Lhs, left: &mut Vec<f32>, threads: Threads) {
    let mr = micro.mr;
    let panel = mr * k.len();
    let size = m.div_ceil(mr) * panel;
    if left.len() < size {
        left.resize(size, 0.0);
    }
    let fill = |(index, panel): (usize, &mut [f32])| {
        let rows = index * mr..m.min((index + 1) * mr);
        if rows.len() < mr {
            panel.fill(0.0);
        }
        if a.row == 1 {
            for (out, p) in panel.chunks_exact_mut(mr).zip(k.clone()) {
                let column = &a.data[rows.start + p * a.col..][..rows.len()];
                for (out, x) in out.iter_mut().zip(column) {
                    *out = alpha * x;
                }
            }
            return;
        }
        for (r, i) in rows.enumerate() {
            let row = a.data[i * a.row + k.start * a.col..].iter().step_by(a.col);
            for (out, x) in panel.chunks_exact_mut(mr).zip(row) {
                out[r] = alpha * x;
            }
        }
    };
    match threads {
        Threads::One => left[..size].chunks_exact_mut(panel).enumerate().for_each(fill),
        Threads::All => left[..size].par_chunks_exact_mut(panel).enumerate().with_min_len(4).for_each(fill),
    }
}

/// The result, shared by tasks that write disjoint tiles of it.
#[derive(Clone, Copy)]
struct Target {
    data: *mut f32,
    ld: usize,
}

// SAFETY: every task writes its own rows and columns of the result, and the borrow outlives them all.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// One block of k: packed rows on the left, panels of the right packed by the task that multiplies them.
struct Product<'a> {
    micro: Micro,
    m: usize,
    k: Range<usize>,
    left: &'a [f32],
    right: &'a dyn Rhs,
    target: Target,
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
        let (mr, nr, k) = (self.micro.mr, self.micro.nr, self.k.len());
        let size = panels.len() * nr * k;
        RIGHT.with_borrow_mut(|right| {
            if right.len() < size {
                right.resize(size, 0.0);
            }
            let right = &mut right[..size];
            self.right.pack(self.k.clone(), panels.start * nr..n.min(panels.end * nr), nr, right);
            for row_panel in row_panels {
                let left = &self.left[row_panel * mr * k..][..mr * k];
                for (panel, right) in panels.clone().zip(right.chunks_exact(nr * k)) {
                    self.tile(left, right, row_panel * mr, panel * nr, n);
                }
            }
        });
    }

    fn tile(&self, left: &[f32], right: &[f32], i: usize, j: usize, n: usize) {
        let Micro { mr, nr, tile } = self.micro;
        let (k, ld) = (self.k.len(), self.target.ld);
        let (rows, columns) = (mr.min(self.m - i), nr.min(n - j));
        // SAFETY: `gemm` checked that the result holds m rows of n floats `ld` apart; this tile is ours alone; the
        // panels hold k·mr and k·nr floats; `Micro::choose` checked the processor.
        unsafe {
            let c = self.target.data.add(i * ld + j);
            if rows == mr && columns == nr {
                return tile(k, left.as_ptr(), right.as_ptr(), c, ld, self.add);
            }
            let mut whole = [0f32; MAX_TILE];
            tile(k, left.as_ptr(), right.as_ptr(), whole.as_mut_ptr(), nr, false);
            for (r, sums) in whole.chunks_exact(nr).take(rows).enumerate() {
                let c = std::slice::from_raw_parts_mut(c.add(r * ld), columns);
                for (c, sum) in c.iter_mut().zip(sums) {
                    *c = if self.add { *c + sum } else { *sum };
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
                gemm([m, n, k], 0.5, lhs, &rhs, Out { data: &mut c, ld: n, add: false }, threads);
                gemm([m, n, k], 1.0, lhs, &rhs, Out { data: &mut c, ld: n, add: true }, threads);
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
        gemm([m, n, k], 1.0, lhs, &rhs, Out { data: &mut c, ld: n, add: false }, Threads::All);
        let (lhs, rhs) = (Lhs { data: &at, row: 1, col: m }, Dense { data: &bt, row: 1, col: k });
        gemm([m, n, k], 1.0, lhs, &rhs, Out { data: &mut ct, ld: n, add: false }, Threads::One);
        assert_eq!(c, ct);
    }

    /// Packs slowly now and then, so that threads wait for one another.
    struct Slow<'a>(Dense<'a>);

    impl Rhs for Slow<'_> {
        fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [f32]) {
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
            gemm([m, n, k], 1.0, lhs, &rhs, Out { data: &mut c, ld: n, add: false }, Threads::All);
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
        gemm(
            [m, n, k],
            1.0,
            Lhs { data: &a, row: k, col: 1 },
            &rhs,
            Out { data: &mut all, ld: n, add: false },
            Threads::All,
        );
        for i in 0..m {
            let mut one = vec![0f32; n];
            let lhs = Lhs { data: &a[i * k..], row: k, col: 1 };
            gemm([1, n, k], 1.0, lhs, &rhs, Out { data: &mut one, ld: n, add: false }, Threads::One);
            assert_eq!(one, all[i * n..(i + 1) * n]);
        }
    }
}
