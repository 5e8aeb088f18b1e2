//! The kernels for thin sides, in the registers of AVX-512 or of AVX2.

use std::arch::x86_64::*;

use super::{Kernels, Place, Wide};
use crate::kernels::simd;

/// A register of floats.
///
/// # Safety
/// Its methods are for a processor that has it, and for memory that holds what they read and write.
pub unsafe trait Vector: Copy {
    /// Floats in it.
    const LANES: usize;

    /// Its first lanes.
    type Mask: Copy;

    /// The first `n` lanes, or all.
    unsafe fn first(n: usize) -> Self::Mask;

    /// Zeros.
    unsafe fn zero() -> Self;

    /// `x` in every lane.
    unsafe fn repeat(x: f32) -> Self;

    /// What lies at `at`.
    unsafe fn load(at: *const f32) -> Self;

    /// The same of these lanes; zeros beyond them, of which nothing is read.
    unsafe fn load_first(at: *const f32, mask: Self::Mask) -> Self;

    /// Writes the first `n` lanes, or all.
    unsafe fn store_first(self, at: *mut f32, n: usize);

    /// `a · b + self`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;

    /// The lower half plus the upper one, of what is wider than eight lanes.
    unsafe fn eight(self) -> __m256;
}

/// Methods of [`Vector`] that are a few instructions each.
macro_rules! instructions {
    ($(fn $name:ident($($arg:ident: $of:ty),*) $(-> $result:ty)? = $body:expr;)+) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) $(-> $result)? {
            // SAFETY: the processor has them, and memory holds what they touch: the trait's promise.
            unsafe { $body }
        }
    )+};
}

// SAFETY: the instructions are those of AVX-512 F.
unsafe impl Vector for __m512 {
    const LANES: usize = 16;

    type Mask = u16;

    #[inline(always)]
    unsafe fn first(n: usize) -> u16 {
        simd::first(n)
    }

    instructions! {
        fn zero() -> Self = _mm512_setzero_ps();
        fn repeat(x: f32) -> Self = _mm512_set1_ps(x);
        fn load(at: *const f32) -> Self = _mm512_loadu_ps(at);
        fn load_first(at: *const f32, mask: u16) -> Self = _mm512_maskz_loadu_ps(mask, at);
        fn store_first(self: Self, at: *mut f32, n: usize) = _mm512_mask_storeu_ps(at, Self::first(n), self);
        fn add_product(self: Self, a: Self, b: Self) -> Self = _mm512_fmadd_ps(a, b, self);
        fn eight(self: Self) -> __m256 = {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
            _mm256_add_ps(_mm512_castps512_ps256(self), upper)
        };
    }
}

// SAFETY: the instructions are those of AVX2 and FMA.
unsafe impl Vector for __m256 {
    const LANES: usize = 8;

    type Mask = __m256i;

    instructions! {
        fn first(n: usize) -> __m256i =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        fn zero() -> Self = _mm256_setzero_ps();
        fn repeat(x: f32) -> Self = _mm256_set1_ps(x);
        fn load(at: *const f32) -> Self = _mm256_loadu_ps(at);
        fn load_first(at: *const f32, mask: __m256i) -> Self = _mm256_maskload_ps(at, mask);
        // a masked store is slow on some processors
        fn store_first(self: Self, at: *mut f32, n: usize) = match n {
            0 => {}
            8.. => _mm256_storeu_ps(at, self),
            _ => _mm256_maskstore_ps(at, Self::first(n), self),
        };
        fn add_product(self: Self, a: Self, b: Self) -> Self = _mm256_fmadd_ps(a, b, self);
    }

    #[inline(always)]
    unsafe fn eight(self) -> __m256 {
        self
    }
}

/// Repeats a statement for each of the tile's rows, columns or vectors, at most eight: sums that are indexed by a
/// loop's variable would not stay in registers.
macro_rules! each {
    ($i:ident below $n:expr, $body:block) => {
        each!(@ $i, $n, $body, 0, 1, 2, 3, 4, 5, 6, 7)
    };
    (@ $i:ident, $n:expr, $body:block, $($at:literal),+) => {
        $(if $at < $n { const $i: usize = $at; $body })+
    };
}

/// [`super::rows`] in tiles of `ROWS` rows with `WITH` of the thin matrix.
///
/// # Safety
/// Both matrices hold their rows, `out` is `[x.rows, thin.rows]`, and the processor has the register's features.
#[inline(always)]
pub unsafe fn rows<V: Vector, const ROWS: usize, const WITH: usize>(
    alpha: f32,
    x: Wide,
    thin: Wide,
    out: &mut [f32],
    add: bool,
) {
    let (k, n) = (x.width, thin.rows);
    for i in (0..x.rows).step_by(ROWS) {
        for j in (0..n).step_by(WITH) {
            // rows past the last are the last again: computed and not written
            let left: [*const f32; ROWS] =
                std::array::from_fn(|row| x.data[(i + row).min(x.rows - 1) * x.stride..].as_ptr());
            let right: [*const f32; WITH] =
                std::array::from_fn(|row| thin.data[(j + row).min(n - 1) * thin.stride..].as_ptr());
            // SAFETY: whole vectors lie within the rows, and the mask holds the loads of the last within them.
            let sums = unsafe {
                let mut sums = [[V::zero(); WITH]; ROWS];
                for p in (0..k - k % V::LANES).step_by(V::LANES) {
                    let mut l = [V::zero(); ROWS];
                    each!(I below ROWS, { l[I] = V::load(left[I].add(p)); });
                    each!(J below WITH, {
                        let r = V::load(right[J].add(p));
                        each!(I below ROWS, { sums[I][J] = sums[I][J].add_product(l[I], r); });
                    });
                }
                let (p, mask) = (k - k % V::LANES, V::first(k % V::LANES));
                let mut l = [V::zero(); ROWS];
                each!(I below ROWS, { l[I] = V::load_first(left[I].add(p), mask); });
                each!(J below WITH, {
                    let r = V::load_first(right[J].add(p), mask);
                    each!(I below ROWS, { sums[I][J] = sums[I][J].add_product(l[I], r); });
                });
                sums
            };
            for (sums, out) in sums.iter().zip(out[i * n..].chunks_exact_mut(n)) {
                // SAFETY: the processor has what the caller says.
                let totals = unsafe { totals(sums) };
                for (sum, out) in totals.into_iter().zip(&mut out[j..n.min(j + WITH)]) {
                    *out = if add { *out + alpha * sum } else { alpha * sum };
                }
            }
        }
    }
}

/// The sum of each vector's lanes, all in one order; a multiple of four of them.
///
/// # Safety
/// The processor has the register's features.
#[inline(always)]
unsafe fn totals<V: Vector, const N: usize>(sums: &[V; N]) -> [f32; N] {
    let mut all = [0.0; N];
    for (all, sums) in all.as_chunks_mut::<4>().0.iter_mut().zip(sums.as_chunks::<4>().0) {
        // SAFETY: the caller vouches for the processor; four floats are written.
        unsafe {
            // no closures: those would be compiled without the feature, and called
            let first = _mm256_hadd_ps(sums[0].eight(), sums[1].eight());
            let four = _mm256_hadd_ps(first, _mm256_hadd_ps(sums[2].eight(), sums[3].eight()));
            let sum = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four));
            _mm_storeu_ps(all.as_mut_ptr(), sum);
        }
    }
    all
}

/// [`super::outer`] in tiles of `ROWS` rows and `VECTORS` registers.
///
/// # Safety
/// Both matrices hold their rows, `out` is `[left.rows, right.width]`, and the processor has the register's features.
#[inline(always)]
pub unsafe fn outer<V: Vector, const ROWS: usize, const VECTORS: usize>(
    alpha: f32,
    left: Wide,
    right: Wide,
    out: &mut [f32],
    add: bool,
) {
    let n = right.width;
    for i in (0..left.rows).step_by(ROWS) {
        let count = ROWS.min(left.rows - i);
        // rows past the last are the last again: computed and not written
        let rows: [*const f32; ROWS] =
            std::array::from_fn(|row| left.data[(i + row).min(left.rows - 1) * left.stride..].as_ptr());
        for j in (0..n).step_by(V::LANES * VECTORS) {
            let lanes: [usize; VECTORS] = std::array::from_fn(|vector| (n - j).saturating_sub(V::LANES * vector));
            let mut from = right.data[j..].as_ptr();
            // SAFETY: both matrices hold what is read, `out` what is written: the masks see to its ends.
            unsafe {
                let mut masks = [V::first(0); VECTORS];
                each!(I below VECTORS, { masks[I] = V::first(lanes[I]); });
                let mut sums = [[V::zero(); VECTORS]; ROWS];
                for p in 0..left.width {
                    let mut r = [V::zero(); VECTORS];
                    each!(I below VECTORS, { r[I] = V::load_first(from.wrapping_add(V::LANES * I), masks[I]); });
                    each!(I below ROWS, {
                        let l = V::repeat(*rows[I].add(p));
                        each!(J below VECTORS, { sums[I][J] = sums[I][J].add_product(l, r[J]); });
                    });
                    from = from.wrapping_add(right.stride);
                }
                let alpha = V::repeat(alpha);
                for (row, sums) in sums.iter().enumerate().take(count) {
                    let to = out.as_mut_ptr().add((i + row) * n + j);
                    for (vector, sum) in sums.iter().enumerate() {
                        let to = to.wrapping_add(V::LANES * vector);
                        let before = if add { V::load_first(to, masks[vector]) } else { V::zero() };
                        before.add_product(alpha, *sum).store_first(to, lanes[vector]);
                    }
                }
            }
        }
    }
}

/// [`super::columns`] for the columns of `x` from `at` on, at most `COLUMNS`, which are those of `VECTORS` registers, in
/// tiles with `WITH` columns of the thin matrix.
///
/// # Safety
/// Both matrices hold their rows, `out` holds every place and nobody else has those of the columns, and the processor
/// has the register's features.
#[inline(always)]
pub unsafe fn columns<V: Vector, const COLUMNS: usize, const VECTORS: usize, const WITH: usize>(
    alpha: f32,
    thin: Wide,
    x: Wide,
    at: usize,
    (out, place): (*mut f32, Place),
    add: bool,
) {
    let width = COLUMNS.min(x.width - at);
    for i in (0..thin.width).step_by(WITH) {
        let count = WITH.min(thin.width - i);
        // columns past the last are the last again: computed and not written
        let offsets: [usize; WITH] = std::array::from_fn(|column| (i + column).min(thin.width - 1));
        let (mut left, mut right) = (thin.data.as_ptr(), x.data[at..].as_ptr());
        let mut tile = [[0f32; COLUMNS]; WITH];
        // SAFETY: both hold the rows, and the masks hold the loads within them; what is fetched ahead may lie anywhere;
        // the vectors are the tile's columns.
        unsafe {
            let mut masks = [V::first(0); VECTORS];
            each!(J below VECTORS, { masks[J] = V::first(width.saturating_sub(V::LANES * J)); });
            let mut sums = [[V::zero(); VECTORS]; WITH];
            for _ in 0..x.rows {
                let mut r = [V::zero(); VECTORS];
                each!(J below VECTORS, {
                    r[J] = V::load_first(right.wrapping_add(V::LANES * J), masks[J]);
                    _mm_prefetch::<_MM_HINT_T0>(right.wrapping_add(4 * x.stride + V::LANES * J).cast());
                });
                each!(I below WITH, {
                    let l = V::repeat(*left.add(offsets[I]));
                    each!(J below VECTORS, { sums[I][J] = sums[I][J].add_product(l, r[J]); });
                });
                left = left.wrapping_add(thin.stride);
                right = right.wrapping_add(x.stride);
            }
            each!(I below WITH, {
                each!(J below VECTORS, { sums[I][J].store_first(tile[I][V::LANES * J..].as_mut_ptr(), V::LANES); });
            });
        }
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

/// The kernels compiled for a register, and the shapes of their tiles.
macro_rules! kernels {
    ($name:ident, $module:ident, $feature:literal, $vector:ty,
     rows [$rows:literal, $with:literal], outer [$outer:literal, $vectors:literal],
     columns [$columns:literal, $by:literal, $thin:literal]) => {
        mod $module {
            use std::arch::x86_64::*;

            use super::{Place, Wide};

            #[target_feature(enable = $feature)]
            pub unsafe fn rows(alpha: f32, x: Wide, thin: Wide, out: &mut [f32], add: bool) {
                // SAFETY: passed on.
                unsafe { super::rows::<$vector, $rows, $with>(alpha, x, thin, out, add) }
            }

            #[target_feature(enable = $feature)]
            pub unsafe fn outer(alpha: f32, left: Wide, right: Wide, out: &mut [f32], add: bool) {
                // SAFETY: passed on.
                unsafe { super::outer::<$vector, $outer, $vectors>(alpha, left, right, out, add) }
            }

            #[target_feature(enable = $feature)]
            pub unsafe fn columns(alpha: f32, thin: Wide, x: Wide, at: usize, out: (*mut f32, Place), add: bool) {
                // SAFETY: passed on.
                unsafe { super::columns::<$vector, $columns, $by, $thin>(alpha, thin, x, at, out, add) }
            }
        }

        pub const $name: Kernels = Kernels {
            rows: $module::rows,
            tile_rows: $rows,
            outer: $module::outer,
            outer_rows: $outer,
            columns: $module::columns,
            strip: $columns,
        };
    };
}

kernels!(AVX512, avx512, "avx512f", __m512, rows [3, 8], outer [6, 4], columns [48, 3, 8]);
kernels!(AVX2, avx2, "avx2,fma", __m256, rows [3, 4], outer [6, 2], columns [24, 3, 4]);
