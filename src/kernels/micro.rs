//! The innermost product: a tile of `mr × nr` sums held in registers.
//!
//! Packed panels are made of words: the bits of an f32, or two bf16 that follow one another in k, the first in the
//! lower half. Every element is a chain of fused multiply-adds in the order of k, whatever the tile's place in the
//! matrix, so a row's result does not depend on what else is in the batch.

use super::compute::Compute;

/// Computes `c[mr, nr] (+)= a · b` over `steps` words a row and column.
///
/// `a` is packed `[steps][mr]`, `b` is packed `[steps][nr]`, `c` is row-major with `ldc` floats a row.
///
/// # Safety
/// `a` and `b` hold `steps·mr` and `steps·nr` words, `c` is writable over `mr` rows of `nr` floats `ldc` apart, and the
/// processor has the features that the kernel was chosen by.
pub type Tile = unsafe fn(steps: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, add: bool);

/// A micro-kernel and the shape of its tile.
#[derive(Clone, Copy)]
pub struct Micro {
    /// Rows of the tile.
    pub mr: usize,
    /// Columns of the tile.
    pub nr: usize,
    /// The kernel.
    pub tile: Tile,
    /// Kernels of the same panels for tiles of fewer rows, the fewest first.
    fewer: &'static [(usize, Tile)],
}

/// [`Tile`] of f32 whose left-hand side is not packed: its words of rows and of steps lie the two strides apart.
///
/// # Safety
/// As for [`Tile`], with the words on the left where the strides put them.
pub type Loose =
    unsafe fn(steps: usize, a: *const u32, strides: [usize; 2], b: *const u32, c: *mut f32, ldc: usize, add: bool);

/// The kernels of this processor for a left-hand side that is not packed: each with its rows, the most first, the last
/// with one; and the columns of their panels.
pub fn loose() -> (&'static [(usize, Loose)], usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return (x86::AVX512_LOOSE, 32);
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return (x86::AVX2_LOOSE, 16);
    }
    (&[(4, portable_loose::<4>), (1, portable_loose::<1>)], 16)
}

/// The largest tile of any kernel, in floats.
pub const MAX_TILE: usize = MAX_MR * 32;
/// The most rows of a tile.
pub const MAX_MR: usize = 12;

impl Micro {
    const fn new(mr: usize, nr: usize, tile: Tile) -> Self {
        Self { mr, nr, tile, fewer: &[] }
    }

    /// The kernel that computes the first `rows` rows of a panel, and how many it computes.
    pub fn of_rows(&self, rows: usize) -> (usize, Tile) {
        self.fewer.iter().copied().find(|(computed, _)| *computed >= rows).unwrap_or((self.mr, self.tile))
    }

    /// The best kernel of this processor for a product of `m` rows and `n` columns.
    ///
    /// # Panics
    /// For bf16 where the processor does not multiply it: [`Compute::bf16_or_f32`] asks it.
    pub fn choose(m: usize, n: usize, compute: Compute) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if compute == Compute::Bf16 && Compute::bf16_or_f32() == Compute::Bf16 {
                let [few_rows, few_columns, many] = x86::BF16;
                return match (m, n) {
                    (0..=4, _) => few_rows,
                    (_, 0..=16) => few_columns,
                    _ => many,
                };
            }
            if compute == Compute::F32 && is_x86_feature_detected!("avx512f") {
                return match (m, n) {
                    (0..=4, _) => Self::new(4, 32, x86::avx512_4x32),
                    (_, 0..=16) => Self::new(12, 16, x86::avx512_12x16),
                    _ => x86::F32,
                };
            }
            if compute == Compute::F32 && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return match n {
                    0..=8 => Self::new(6, 8, x86::avx2_6x8),
                    _ => Self::new(6, 16, x86::avx2_6x16),
                };
            }
        }
        assert!(compute == Compute::F32, "this processor has no bf16 products");
        let _ = (m, n);
        Self::new(4, 16, tile_portable)
    }
}

/// Plain Rust that the compiler vectorises: NEON on ARM, SSE2 on an old x86.
unsafe fn tile_portable(steps: usize, a: *const u32, b: *const u32, c: *mut f32, ldc: usize, add: bool) {
    // SAFETY: the caller vouches for the same.
    unsafe { portable_loose::<4>(steps, a, [1, 4], b, c, ldc, add) }
}

/// [`Loose`] of so many rows in plain Rust.
#[inline(always)]
unsafe fn portable_loose<const MR: usize>(
    steps: usize,
    a: *const u32,
    [row, step]: [usize; 2],
    b: *const u32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    const NR: usize = 16;
    let mut sums = [[0f32; NR]; MR];
    // SAFETY: the caller vouches for `steps` words of both sides and for the tile of `c`; words are the bits of floats.
    unsafe {
        let b = std::slice::from_raw_parts(b.cast::<f32>(), steps * NR);
        for (p, b) in b.chunks_exact(NR).enumerate() {
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = *a.cast::<f32>().add(i * row + p * step);
                for (sum, &b) in sums.iter_mut().zip(b) {
                    // a fused multiply-add is a library call where the target has none
                    *sum = if cfg!(target_arch = "aarch64") { a.mul_add(b, *sum) } else { *sum + a * b };
                }
            }
        }
        for (i, row) in sums.iter().enumerate() {
            let c = std::slice::from_raw_parts_mut(c.add(i * ldc), NR);
            for (c, sum) in c.iter_mut().zip(row) {
                *c = if add { *c + sum } else { *sum };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::{Loose, Micro};

    /// A kernel whose rows and vectors are written out one by one: sums that are indexed by a loop's variable stay in
    /// memory unless the compiler happens to unroll it, at a fifth of the speed.
    ///
    /// `word` is what a panel holds, `right` loads a vector of it, `broadcast` repeats one, `fma(a, b, sums)`
    /// multiplies; `load`, `store` and `add` are those of the sums. On the left, `at` says where a row starts, and
    /// `panel` how far apart words of steps lie.
    macro_rules! tile {
        ($name:ident($($strides:ident)?), $feature:literal, $lanes:literal, $vector:ty, $word:ty,
         $right:ident, $broadcast:ident, $fma:ident, $zero:ident, $load:ident, $store:ident, $add:ident,
         [$at:expr, $panel:expr], [$($row:literal),+], $vectors:tt) => {
            #[target_feature(enable = $feature)]
            pub unsafe fn $name(
                steps: usize,
                a: *const u32,
                $($strides: [usize; 2],)?
                b: *const u32,
                c: *mut f32,
                ldc: usize,
                add: bool,
            ) {
                const ROWS: usize = [$($row),+].len();
                const VECTORS: usize = $vectors.len();
                let (mut a, mut b, at) = (a.cast::<$word>(), b.cast::<$word>(), $at);
                let mut sums: [[$vector; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
                // SAFETY: the caller vouches for `steps` words of both panels and for the tile of `c`.
                unsafe {
                    for _ in 0..steps {
                        tile!(@load b, $right, $lanes, $vectors, columns);
                        $(
                            let left = $broadcast(*a.add(at($row)));
                            tile!(@fma sums, $row, left, columns, $fma, $vectors);
                        )+
                        a = a.wrapping_add($panel);
                        b = b.add($lanes * VECTORS);
                    }
                    for (i, row) in sums.iter().enumerate() {
                        for (v, &sum) in row.iter().enumerate() {
                            let at = c.add(i * ldc + $lanes * v);
                            $store(at, if add { $add($load(at), sum) } else { sum });
                        }
                    }
                }
            }
        };
        (@load $b:ident, $right:ident, $lanes:literal, [$($v:literal),+], $columns:ident) => {
            let $columns = [$($right($b.add($lanes * $v))),+];
        };
        (@fma $sums:ident, $row:literal, $left:ident, $columns:ident, $fma:ident, [$($v:literal),+]) => {
            $($sums[$row][$v] = $fma($left, $columns[$v], $sums[$row][$v]);)+
        };
    }

    macro_rules! avx512 {
        ($name:ident($($strides:ident)?), $left:tt, $rows:tt, $vectors:tt) => {
            tile!(
                $name($($strides)?),
                "avx512f",
                16,
                __m512,
                f32,
                _mm512_loadu_ps,
                _mm512_set1_ps,
                _mm512_fmadd_ps,
                _mm512_setzero_ps,
                _mm512_loadu_ps,
                _mm512_storeu_ps,
                _mm512_add_ps,
                $left,
                $rows,
                $vectors
            );
        };
    }

    macro_rules! bf16 {
        ($name:ident, $panel:literal, $rows:tt, $vectors:tt) => {
            tile!(
                $name(),
                "avx512f,avx512bf16",
                16,
                __m512,
                u32,
                load_pairs,
                repeat_pair,
                dot_pairs,
                _mm512_setzero_ps,
                _mm512_loadu_ps,
                _mm512_storeu_ps,
                _mm512_add_ps,
                [packed, $panel],
                $rows,
                $vectors
            );
        };
    }

    macro_rules! avx2 {
        ($name:ident($($strides:ident)?), $left:tt, $rows:tt, $vectors:tt) => {
            tile!(
                $name($($strides)?),
                "avx2,fma",
                8,
                __m256,
                f32,
                _mm256_loadu_ps,
                _mm256_set1_ps,
                _mm256_fmadd_ps,
                _mm256_setzero_ps,
                _mm256_loadu_ps,
                _mm256_storeu_ps,
                _mm256_add_ps,
                $left,
                $rows,
                $vectors
            );
        };
    }

    avx512!(avx512_12x32(), [packed, 12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1]);
    avx512!(avx512_8_of_12x32(), [packed, 12], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1]);
    avx512!(avx512_4_of_12x32(), [packed, 12], [0, 1, 2, 3], [0, 1]);
    avx512!(avx512_12x16(), [packed, 12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0]);
    avx512!(avx512_4x32(), [packed, 4], [0, 1, 2, 3], [0, 1]);
    avx512!(avx512_12(strides), [|row| row * strides[0], strides[1]], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1]);
    avx512!(avx512_8(strides), [|row| row * strides[0], strides[1]], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1]);
    avx512!(avx512_4(strides), [|row| row * strides[0], strides[1]], [0, 1, 2, 3], [0, 1]);
    avx512!(avx512_1(strides), [|row| row * strides[0], strides[1]], [0], [0, 1]);
    bf16!(bf16_12x32, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1]);
    bf16!(bf16_8_of_12x32, 12, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1]);
    bf16!(bf16_4_of_12x32, 12, [0, 1, 2, 3], [0, 1]);
    bf16!(bf16_12x16, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0]);
    bf16!(bf16_4x32, 4, [0, 1, 2, 3], [0, 1]);
    /// For many rows and columns.
    pub const F32: Micro =
        Micro { fewer: &[(4, avx512_4_of_12x32), (8, avx512_8_of_12x32)], ..Micro::new(12, 32, avx512_12x32) };
    /// For few rows, for few columns, for many of both.
    pub const BF16: [Micro; 3] = [
        Micro::new(4, 32, bf16_4x32),
        Micro::new(12, 16, bf16_12x16),
        Micro { fewer: &[(4, bf16_4_of_12x32), (8, bf16_8_of_12x32)], ..Micro::new(12, 32, bf16_12x32) },
    ];
    avx2!(avx2_6x16(), [packed, 6], [0, 1, 2, 3, 4, 5], [0, 1]);
    avx2!(avx2_6x8(), [packed, 6], [0, 1, 2, 3, 4, 5], [0]);
    avx2!(avx2_6(strides), [rows_apart(strides[0]), strides[1]], [0, 1, 2, 3, 4, 5], [0, 1]);
    avx2!(avx2_5(strides), [rows_apart(strides[0]), strides[1]], [0, 1, 2, 3, 4], [0, 1]);
    avx2!(avx2_4(strides), [rows_apart(strides[0]), strides[1]], [0, 1, 2, 3], [0, 1]);
    avx2!(avx2_3(strides), [rows_apart(strides[0]), strides[1]], [0, 1, 2], [0, 1]);
    avx2!(avx2_2(strides), [rows_apart(strides[0]), strides[1]], [0, 1], [0, 1]);
    avx2!(avx2_1(strides), [rows_apart(strides[0]), strides[1]], [0], [0, 1]);
    /// On panels of 32 columns, the most rows first.
    pub const AVX512_LOOSE: &[(usize, Loose)] = &[(12, avx512_12), (8, avx512_8), (4, avx512_4), (1, avx512_1)];
    /// On panels of 16 columns.
    pub const AVX2_LOOSE: &[(usize, Loose)] =
        &[(6, avx2_6), (5, avx2_5), (4, avx2_4), (3, avx2_3), (2, avx2_2), (1, avx2_1)];

    /// Where a row of a packed panel starts.
    #[inline(always)]
    fn packed(row: usize) -> usize {
        row
    }

    /// Where a row starts of rows that lie so far apart.
    #[inline(always)]
    fn rows_apart(apart: usize) -> impl Fn(usize) -> usize {
        // An address is a sum of one register and one, two, four or eight times another. Were it seen what these are,
        // each row's would be added up from the one before: a chain as long as the step's products.
        let (three, five) = black_box((3 * apart, 5 * apart));
        move |row| match row {
            3 => three,
            5 => five,
            row => row * apart,
        }
    }

    /// Sixteen pairs.
    ///
    /// # Safety
    /// `at` points to sixteen words.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load_pairs(at: *const u32) -> __m512bh {
        // SAFETY: the caller vouches for the words; both types are 64 bytes of bits.
        unsafe { std::mem::transmute(_mm512_loadu_si512(at.cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn repeat_pair(pair: u32) -> __m512bh {
        // SAFETY: both types are 64 bytes of bits.
        unsafe { std::mem::transmute(_mm512_set1_epi32(pair.cast_signed())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot_pairs(a: __m512bh, b: __m512bh, sums: __m512) -> __m512 {
        _mm512_dpbf16_ps(sums, a, b)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn kernels() -> Vec<(Micro, Compute)> {
        let mut all = vec![
            Micro::new(4, 16, tile_portable),
            Micro::choose(1, 64, Compute::F32),
            Micro::choose(64, 8, Compute::F32),
            Micro::choose(64, 64, Compute::F32),
        ];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Micro::new(6, 16, x86::avx2_6x16));
            all.push(Micro::new(6, 8, x86::avx2_6x8));
        }
        let mut all: Vec<_> = all.into_iter().map(|micro| (micro, Compute::F32)).collect();
        if Compute::bf16_or_f32() == Compute::Bf16 {
            #[cfg(target_arch = "x86_64")]
            all.extend(x86::BF16.map(|micro| (micro, Compute::Bf16)));
        }
        all
    }

    #[test]
    fn every_kernel_multiplies_and_adds() {
        let all = kernels().into_iter().flat_map(|kernel| [1, 21].map(|steps| (kernel, steps)));
        for (micro, compute, steps, asked) in
            all.flat_map(|((micro, compute), steps)| (1..=micro.mr).map(move |rows| (micro, compute, steps, rows)))
        {
            let (Micro { mr, nr, .. }, (rows, tile)) = (micro, micro.of_rows(asked));
            assert!((asked..=mr).contains(&rows));
            if asked < rows {
                continue; // the same kernel comes with all its rows
            }
            let per = compute.per_step();
            let k = steps * per;
            let a = |i: usize, p: usize| ((p * mr + i) % 7) as f32 - 3.0;
            let b = |p: usize, j: usize| ((p * nr + j) % 5) as f32 - 2.0;
            let word = |values: &[f32]| match values {
                [one] => one.to_bits(),
                pair => pair.iter().rev().fold(0, |word, x| word << 16 | u32::from(bf16::from_f32(*x).to_bits())),
            };
            let pack = |width: usize, of: &dyn Fn(usize, usize) -> f32| -> Vec<u32> {
                let values = |at: usize| (0..per).map(|i| of(at / width * per + i, at % width)).collect::<Vec<_>>();
                (0..steps * width).map(|at| word(&values(at))).collect()
            };
            let (left, right) = (pack(mr, &|p, i| a(i, p)), pack(nr, &b));
            let mut c = vec![1f32; mr * (nr + 3)];
            // SAFETY: the buffers have the sizes that the kernel states.
            unsafe { tile(steps, left.as_ptr(), right.as_ptr(), c.as_mut_ptr(), nr + 3, true) };
            for i in 0..mr {
                for j in 0..nr {
                    let sum: f32 = if i < rows { (0..k).map(|p| a(i, p) * b(p, j)).sum() } else { 0.0 };
                    assert_eq!(c[i * (nr + 3) + j], 1.0 + sum, "{compute:?} {mr}x{nr} at {i},{j}");
                }
                assert_eq!(c[i * (nr + 3) + nr], 1.0, "wrote past the tile");
            }
        }
    }
}
