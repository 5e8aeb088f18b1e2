//! Products of a wide matrix with a thin one, as LoRA's matrices are: the wide one is read where it lies, once.
//!
//! The general product packs its left-hand side, which costs as much as a few columns do. Here nothing of the wide
//! matrix is packed: [`rows`] takes dot products along its rows, [`columns`] sums over its rows, [`outer`] makes it of
//! two thin ones. All are for AVX-512 and AVX2; elsewhere the general product serves.
//!
//! An element is one sum in an order that depends on its length alone, so a row's result depends on the row alone.

#[cfg(target_arch = "x86_64")]
mod x86;

use rayon::prelude::*;

/// Most rows of a thin matrix for which [`rows`] pays: with more, packing is paid for. Products of 400 rows of 576 on
/// one core of a Sapphire Rapids, GFLOP/s of the general product and of this: 41 and 162 at 8 rows, 85 and 129 at 16,
/// 128 and 107 at 32. AVX2 goes by the same limits, unmeasured.
pub const THIN_ROWS: usize = 16;

/// The same of a thin matrix's columns for [`columns`]: 60 and 198 at 8, 134 and 191 at 32, 156 and 192 at 64, 181 and
/// 187 at 128.
pub const THIN_COLUMNS: usize = 64;

/// Most products that an element of [`outer`] is a sum of, for which it pays at any width: with more, a wide low side
/// leaves the cache. The same of 400 rows: 93 and 155 at 32 where they are 576 wide, 126 and 129 where they are 4096,
/// 156 and 132 of those at 64.
pub const LOW_ROWS: usize = 32;

/// Kernels for a register, which the processor must have, and the shapes of their tiles.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // none elsewhere
struct Kernels {
    rows: unsafe fn(f32, Wide, Wide, &mut [f32], bool),
    /// Rows of the wide matrix in a tile.
    tile_rows: usize,
    outer: unsafe fn(f32, Wide, Wide, &mut [f32], bool),
    /// Rows in a tile.
    outer_rows: usize,
    columns: unsafe fn(f32, Wide, Wide, usize, (*mut f32, Place), bool),
    /// Columns of the wide matrix in a tile.
    strip: usize,
}

/// Those of this processor.
fn kernels() -> Option<&'static Kernels> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return Some(&x86::AVX512);
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return Some(&x86::AVX2);
    }
    None
}

/// Whether this processor has what the kernels here need.
pub fn available() -> bool {
    kernels().is_some()
}

/// Rows of `width` floats `stride` apart.
#[derive(Clone, Copy)]
pub struct Wide<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// How many rows.
    pub rows: usize,
    /// Elements from a row to the next.
    pub stride: usize,
    /// Elements a row.
    pub width: usize,
}

impl Wide<'_> {
    /// # Panics
    /// Where the data do not hold the rows.
    fn check(&self) {
        assert!(self.rows > 0 && self.width > 0 && self.width <= self.stride, "rows overlap or there are none");
        assert!(self.data.len() >= (self.rows - 1) * self.stride + self.width, "the data do not hold the rows");
    }
}

/// `out[m, n] (+)= alpha · x · thinᵀ` for `x[m, k]` and `thin[n, k]`, `out` without gaps.
///
/// # Panics
/// Where shapes do not fit, or the processor is without [`available`].
pub fn rows(alpha: f32, x: Wide, thin: Wide, out: &mut [f32], add: bool, parallel: bool) {
    x.check();
    thin.check();
    assert!(x.width == thin.width && out.len() == x.rows * thin.rows, "shapes that do not fit");
    let kernels = kernels().expect(NEEDED);
    share_rows(x, thin.rows, kernels.tile_rows, out, parallel, |part, out| {
        // SAFETY: the processor has the feature, and both matrices hold their rows.
        unsafe { (kernels.rows)(alpha, part, thin, out, add) }
    });
}

/// Gives each thread a run of whole tiles of `tile` rows, with its rows of the result, `width` numbers each.
fn share_rows(
    of: Wide,
    width: usize,
    tile: usize,
    out: &mut [f32],
    parallel: bool,
    work: impl Fn(Wide, &mut [f32]) + Sync,
) {
    if !parallel {
        return work(of, out);
    }
    let each = of.rows.div_ceil(rayon::current_num_threads()).next_multiple_of(tile);
    out.par_chunks_mut(each * width).enumerate().with_max_len(1).for_each(|(task, out)| {
        work(Wide { data: &of.data[task * each * of.stride..], rows: out.len() / width, ..of }, out);
    });
}

/// `out[m, n] (+)= alpha · left · right` for a thin `left[m, k]` and a low `right[k, n]`, `out` without gaps.
///
/// # Panics
/// Where shapes do not fit, or the processor is without [`available`].
pub fn outer(alpha: f32, left: Wide, right: Wide, out: &mut [f32], add: bool, parallel: bool) {
    left.check();
    right.check();
    assert!(left.width == right.rows && out.len() == left.rows * right.width, "shapes that do not fit");
    let kernels = kernels().expect(NEEDED);
    share_rows(left, right.width, kernels.outer_rows, out, parallel, |part, out| {
        // SAFETY: the processor has the feature, and both matrices hold their rows.
        unsafe { (kernels.outer)(alpha, part, right, out, add) }
    });
}

/// Where [`columns`] puts element `(i, j)`: at `i · thin + j · wide`.
#[derive(Clone, Copy)]
pub struct Place {
    /// From a column of the thin matrix to the next.
    pub thin: usize,
    /// From a column of the wide matrix to the next.
    pub wide: usize,
}

/// `out[i, j] (+)= alpha · Σ thin[p, i] · x[p, j]` over all rows p.
///
/// # Panics
/// Where shapes do not fit, or the processor is without [`available`].
pub fn columns(alpha: f32, thin: Wide, x: Wide, (out, place): (&mut [f32], Place), add: bool, parallel: bool) {
    x.check();
    thin.check();
    assert!(x.rows == thin.rows, "shapes that do not fit");
    assert!(
        out.len() > (thin.width - 1) * place.thin + (x.width - 1) * place.wide
            && (place.thin >= place.wide * x.width || place.wide >= place.thin * thin.width),
        "the result is too small or lies on itself"
    );
    let (kernels, out) = (kernels().expect(NEEDED), Shared(out.as_mut_ptr()));
    // SAFETY: the processor has the feature, both matrices hold their rows, `out` every place; the columns of `x` from
    // the strip's first on are this task's alone.
    let task =
        |strip: usize| unsafe { (kernels.columns)(alpha, thin, x, strip * kernels.strip, (out.get(), place), add) };
    let strips = x.width.div_ceil(kernels.strip);
    match parallel {
        true => (0..strips).into_par_iter().for_each(task),
        false => (0..strips).for_each(task),
    }
}

/// Callers ask [`available`].
const NEEDED: &str = "a processor with kernels for thin sides";

/// The result, shared by tasks that write disjoint columns of it.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: tasks write disjoint elements, as each says, and the borrow outlives them all.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Numbers that are added up exactly, in any order.
    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed) % 5) as f32 - 2.0).collect()
    }

    /// The kernels of every register that this processor has, not of the widest alone.
    #[test]
    fn kernels_of_each_register_sum_what_the_shapes_name() {
        let narrow = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let all = [(narrow, &x86::AVX2), (is_x86_feature_detected!("avx512f"), &x86::AVX512)];
        for kernels in all.into_iter().filter_map(|(there, kernels)| there.then_some(kernels)) {
            for (m, n, k) in [(1, 1, 1), (7, 3, 5), (4, 8, 16), (13, 9, 37), (6, 16, 70)] {
                let (a, b) = (numbers(m * (k + 3), 1), numbers(n * (k + 1), 2));
                let x = Wide { data: &a, rows: m, stride: k + 3, width: k };
                let thin = Wide { data: &b, rows: n, stride: k + 1, width: k };
                let mut out = vec![1.0; m * n];
                // SAFETY: the matrices hold their rows, the results every place, and the processor has the features.
                unsafe { (kernels.rows)(2.0, x, thin, &mut out, true) };
                for (at, sum) in out.into_iter().enumerate() {
                    let terms = (0..k).map(|p| a[at / n * (k + 3) + p] * b[at % n * (k + 1) + p]);
                    assert_eq!(sum, 1.0 + 2.0 * terms.sum::<f32>());
                }

                let c = numbers(k * (n + 2), 3);
                let right = Wide { data: &c, rows: k, stride: n + 2, width: n };
                let mut out = vec![1.0; m * n];
                // SAFETY: as above.
                unsafe { (kernels.outer)(2.0, x, right, &mut out, true) };
                for (at, sum) in out.into_iter().enumerate() {
                    let terms = (0..k).map(|p| a[at / n * (k + 3) + p] * c[p * (n + 2) + at % n]);
                    assert_eq!(sum, 1.0 + 2.0 * terms.sum::<f32>());
                }

                // sums over rows: m columns of the thin side, n of the wide one
                let d = numbers(k * (m + 1), 4);
                let thin = Wide { data: &d, rows: k, stride: m + 1, width: m };
                for place in [Place { thin: n, wide: 1 }, Place { thin: 1, wide: m }] {
                    let mut out = vec![1.0; m * n];
                    for at in (0..n).step_by(kernels.strip) {
                        // SAFETY: as above.
                        unsafe { (kernels.columns)(2.0, thin, right, at, (out.as_mut_ptr(), place), true) };
                    }
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let terms = (0..k).map(|p| d[p * (m + 1) + i] * c[p * (n + 2) + j]);
                        assert_eq!(out[i * place.thin + j * place.wide], 1.0 + 2.0 * terms.sum::<f32>());
                    }
                }
            }
        }
    }
}
