//! Products of a wide matrix with a thin one, as LoRA's matrices are: the wide one is read where it lies, once.
//!
//! The general product packs its left-hand side, which costs as much as a few columns do. Here nothing of the wide
//! matrix is packed: [`rows`] takes dot products along its rows, [`columns`] sums over its rows, [`outer`] makes it of
//! two thin ones. All are for AVX-512; elsewhere the general product serves.
//!
//! An element is one sum in an order that depends on its length alone, so a row's result depends on the row alone.

use rayon::prelude::*;

/// Most rows of a thin matrix for which [`rows`] pays: with more, packing is paid for. Products of 400 rows of 576 on
/// one core of a Sapphire Rapids, GFLOP/s of the general product and of this: 41 and 162 at 8 rows, 85 and 129 at 16,
/// 128 and 107 at 32.
pub const THIN_ROWS: usize = 16;

/// The same of a thin matrix's columns for [`columns`]: 60 and 198 at 8, 134 and 191 at 32, 156 and 192 at 64, 181 and
/// 187 at 128.
pub const THIN_COLUMNS: usize = 64;

/// Most products that an element of [`outer`] is a sum of, for which it pays at any width: with more, a wide low side
/// leaves the cache. The same of 400 rows: 93 and 155 at 32 where they are 576 wide, 126 and 129 where they are 4096,
/// 156 and 132 of those at 64.
pub const LOW_ROWS: usize = 32;

/// Whether this processor has what the kernels here need.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
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
    assert!(x.width == thin.width && out.len() == x.rows * thin.rows && available(), "shapes that do not fit");
    share_rows(x, thin.rows, ROWS, out, parallel, |part, out| {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the feature, and both matrices hold their rows.
        unsafe {
            x86::rows(alpha, part, thin, out, add)
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (alpha, part, out, add);
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
    assert!(left.width == right.rows && out.len() == left.rows * right.width && available(), "shapes that do not fit");
    share_rows(left, right.width, OUTER_ROWS, out, parallel, |part, out| {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the feature, and both matrices hold their rows.
        unsafe {
            x86::outer(alpha, part, right, out, add)
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (alpha, part, out, add);
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
    assert!(x.rows == thin.rows && available(), "shapes that do not fit");
    assert!(
        out.len() > (thin.width - 1) * place.thin + (x.width - 1) * place.wide
            && (place.thin >= place.wide * x.width || place.wide >= place.thin * thin.width),
        "the result is too small or lies on itself"
    );
    let out = Shared(out.as_mut_ptr());
    let task = |strip: usize| {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the feature, both matrices hold their rows, `out` every place; the columns of `x`
        // from `strip · COLUMNS` on are this task's alone.
        unsafe {
            x86::columns(alpha, thin, x, strip * COLUMNS, (out.get(), place), add)
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (strip, alpha, out.get(), add);
    };
    let strips = x.width.div_ceil(COLUMNS);
    match parallel {
        true => (0..strips).into_par_iter().for_each(task),
        false => (0..strips).for_each(task),
    }
}

/// Rows of `x` in a tile of [`rows`].
const ROWS: usize = 3;
/// Columns of `x` in a tile of [`columns`].
const COLUMNS: usize = 48;
/// Rows in a tile of [`outer`], of 64 columns.
const OUTER_ROWS: usize = 6;
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, OUTER_ROWS, Place, ROWS, Wide};
    use crate::kernels::simd::first;

    /// Rows or columns of the thin matrix in a tile.
    const WITH: usize = 8;

    /// Repeats a statement for each of the tile's rows or columns: sums must stay in registers.
    macro_rules! each {
        ($i:ident in [$($at:literal),+] $body:block) => {
            $({ const $i: usize = $at; $body })+
        };
    }

    /// # Safety
    /// Both matrices hold their rows, `out` is `[x.rows, thin.rows]`, and the processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn rows(alpha: f32, x: Wide, thin: Wide, out: &mut [f32], add: bool) {
        let (k, n) = (x.width, thin.rows);
        for i in (0..x.rows).step_by(ROWS) {
            for j in (0..n).step_by(WITH) {
                // rows past the last are the last again: computed and not written
                let left: [*const f32; ROWS] =
                    std::array::from_fn(|row| x.data[(i + row).min(x.rows - 1) * x.stride..].as_ptr());
                let right: [*const f32; WITH] =
                    std::array::from_fn(|row| thin.data[(j + row).min(n - 1) * thin.stride..].as_ptr());
                let mut sums = [[_mm512_setzero_ps(); WITH]; ROWS];
                // SAFETY: whole vectors lie within the rows, and the mask holds the loads of the last within them.
                unsafe {
                    for p in (0..k - k % 16).step_by(16) {
                        let l = [
                            _mm512_loadu_ps(left[0].add(p)),
                            _mm512_loadu_ps(left[1].add(p)),
                            _mm512_loadu_ps(left[2].add(p)),
                        ];
                        each!(J in [0, 1, 2, 3, 4, 5, 6, 7] {
                            let r = _mm512_loadu_ps(right[J].add(p));
                            each!(I in [0, 1, 2] { sums[I][J] = _mm512_fmadd_ps(l[I], r, sums[I][J]); });
                        });
                    }
                    let (p, mask) = (k - k % 16, first(k % 16));
                    let l = [
                        _mm512_maskz_loadu_ps(mask, left[0].add(p)),
                        _mm512_maskz_loadu_ps(mask, left[1].add(p)),
                        _mm512_maskz_loadu_ps(mask, left[2].add(p)),
                    ];
                    each!(J in [0, 1, 2, 3, 4, 5, 6, 7] {
                        let r = _mm512_maskz_loadu_ps(mask, right[J].add(p));
                        each!(I in [0, 1, 2] { sums[I][J] = _mm512_fmadd_ps(l[I], r, sums[I][J]); });
                    });
                }
                for (sums, out) in sums.iter().zip(out[i * n..].chunks_exact_mut(n)) {
                    for (sum, out) in totals(sums).into_iter().zip(&mut out[j..n.min(j + WITH)]) {
                        *out = if add { *out + alpha * sum } else { alpha * sum };
                    }
                }
            }
        }
    }

    /// # Safety
    /// Both matrices hold their rows, `out` is `[left.rows, right.width]`, and the processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn outer(alpha: f32, left: Wide, right: Wide, out: &mut [f32], add: bool) {
        let n = right.width;
        for i in (0..left.rows).step_by(OUTER_ROWS) {
            let count = OUTER_ROWS.min(left.rows - i);
            // rows past the last are the last again: computed and not written
            let rows: [*const f32; OUTER_ROWS] =
                std::array::from_fn(|row| left.data[(i + row).min(left.rows - 1) * left.stride..].as_ptr());
            for j in (0..n).step_by(64) {
                let rest = n - j;
                let masks = [
                    first(rest),
                    first(rest.saturating_sub(16)),
                    first(rest.saturating_sub(32)),
                    first(rest.saturating_sub(48)),
                ];
                let mut sums = [[_mm512_setzero_ps(); 4]; OUTER_ROWS];
                let mut from = right.data[j..].as_ptr();
                // SAFETY: both matrices hold what is read, `out` what is written: the masks see to its ends.
                unsafe {
                    for p in 0..left.width {
                        let r = [
                            _mm512_maskz_loadu_ps(masks[0], from),
                            _mm512_maskz_loadu_ps(masks[1], from.wrapping_add(16)),
                            _mm512_maskz_loadu_ps(masks[2], from.wrapping_add(32)),
                            _mm512_maskz_loadu_ps(masks[3], from.wrapping_add(48)),
                        ];
                        each!(I in [0, 1, 2, 3, 4, 5] {
                            let l = _mm512_set1_ps(*rows[I].add(p));
                            each!(V in [0, 1, 2, 3] { sums[I][V] = _mm512_fmadd_ps(l, r[V], sums[I][V]); });
                        });
                        from = from.wrapping_add(right.stride);
                    }
                    let alpha = _mm512_set1_ps(alpha);
                    for (row, sums) in sums.iter().enumerate().take(count) {
                        let to = out.as_mut_ptr().add((i + row) * n + j);
                        for (vector, sum) in sums.iter().enumerate() {
                            let (to, mask) = (to.wrapping_add(16 * vector), masks[vector]);
                            let before = if add { _mm512_maskz_loadu_ps(mask, to) } else { _mm512_setzero_ps() };
                            _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(alpha, *sum, before));
                        }
                    }
                }
            }
        }
    }

    /// The sum of each vector's lanes, all in one order.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn totals(sums: &[__m512; WITH]) -> [f32; WITH] {
        // loops, no closures: those would be compiled without the feature, and called
        let mut halves = [_mm256_setzero_ps(); WITH];
        for (half, sum) in halves.iter_mut().zip(sums) {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(*sum)));
            *half = _mm256_add_ps(_mm512_castps512_ps256(*sum), upper);
        }
        let mut fours = [_mm256_setzero_ps(); 2];
        for (four, halves) in fours.iter_mut().zip(halves.as_chunks::<4>().0) {
            let (first, second) = (_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
            *four = _mm256_hadd_ps(first, second);
        }
        let [first, second] = fours;
        let sums =
            _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(first, second), _mm256_permute2f128_ps::<0x31>(first, second));
        let mut all = [0.0; WITH];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(all.as_mut_ptr(), sums) };
        all
    }

    /// [`super::columns`] for the columns of `x` from `at` on, at most [`COLUMNS`].
    ///
    /// # Safety
    /// Both matrices hold their rows, `out` holds every place and nobody else has those of the columns, and the
    /// processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn columns(alpha: f32, thin: Wide, x: Wide, at: usize, (out, place): (*mut f32, Place), add: bool) {
        let width = COLUMNS.min(x.width - at);
        let masks = [first(width), first(width.saturating_sub(16)), first(width.saturating_sub(32))];
        for i in (0..thin.width).step_by(WITH) {
            let count = WITH.min(thin.width - i);
            // columns past the last are the last again: computed and not written
            let offsets: [usize; WITH] = std::array::from_fn(|column| (i + column).min(thin.width - 1));
            let mut sums = [[_mm512_setzero_ps(); 3]; WITH];
            let (mut left, mut right) = (thin.data.as_ptr(), x.data[at..].as_ptr());
            for _ in 0..x.rows {
                // SAFETY: both hold the row, and the masks hold the loads within it; what is fetched ahead may lie
                // anywhere.
                unsafe {
                    let r = [
                        _mm512_maskz_loadu_ps(masks[0], right),
                        _mm512_maskz_loadu_ps(masks[1], right.wrapping_add(16)),
                        _mm512_maskz_loadu_ps(masks[2], right.wrapping_add(32)),
                    ];
                    each!(V in [0, 1, 2] {
                        _mm_prefetch::<_MM_HINT_T0>(right.wrapping_add(4 * x.stride + 16 * V).cast());
                    });
                    each!(I in [0, 1, 2, 3, 4, 5, 6, 7] {
                        let l = _mm512_set1_ps(*left.add(offsets[I]));
                        each!(V in [0, 1, 2] { sums[I][V] = _mm512_fmadd_ps(l, r[V], sums[I][V]); });
                    });
                }
                left = left.wrapping_add(thin.stride);
                right = right.wrapping_add(x.stride);
            }
            let mut tile = [[0f32; COLUMNS]; WITH];
            each!(I in [0, 1, 2, 3, 4, 5, 6, 7] {
                // SAFETY: three vectors are the columns.
                each!(V in [0, 1, 2] { unsafe { _mm512_storeu_ps(tile[I][16 * V..].as_mut_ptr(), sums[I][V]) }; });
            });
            let put = |row: usize, column: usize| {
                // SAFETY: the caller vouches for every place.
                unsafe {
                    let to = out.add((i + row) * place.thin + (at + column) * place.wide);
                    let sum = alpha * tile[row][column];
                    *to = if add { *to + sum } else { sum };
                }
            };
            if place.wide == 1 {
                (0..count).for_each(|row| (0..width).for_each(|column| put(row, column)));
            } else {
                (0..width).for_each(|column| (0..count).for_each(|row| put(row, column)));
            }
        }
    }
}
