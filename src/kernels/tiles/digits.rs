//! f32 as whole numbers of three signed digits of eight bits, packed for the tile unit's products of bytes (an Ozaki
//! scheme).
//!
//! A row of the left-hand side, and a column of the right, is multiplied by a power of two for each block of k, so that
//! its largest number has 22 or 23 bits, and rounded to whole numbers. So a number is off by at most 2^-23 of the
//! largest of its row or column in the block, where an f32 is off by 2^-24 of itself. Blocks of numbers below 1e-30
//! lose bits, and what is not finite, or above 3.389e38, makes all sums of its row or column so.
//!
//! Panels are those of [`super::pack`] with three parts a number, the greatest digit first, and the 32 scales behind
//! them. Word `j` of a register holds the numbers `j`, `16 + j`, `32 + j` and `48 + j` of its 64, on either side.

use std::arch::x86_64::*;

use super::super::{
    amx::{self, REGISTER, SIDE, Sums, Terms},
    pack::avx512::transpose16,
    simd::first,
};
use super::{pack::Rows, panel, panel_of};

/// Numbers of k that a register takes.
const DEPTH: usize = Terms::Eight.depth();

/// Digits of a number.
const PARTS: usize = 3;

/// Packs up to 32 rows, k running along them, for the left.
///
/// # Panics
/// Where the sizes do not fit, and where the processor has no tiles; so for the others.
pub fn along(from: Rows<f32>, rows: usize, out: &mut [u32]) {
    let (depth, halves) = (from.width.div_ceil(DEPTH), rows.div_ceil(SIDE / 2));
    assert!(amx::available() && from.hold(rows) && halves <= 2, "{rows} rows");
    assert_eq!(out.len(), panel(Terms::Eight, depth, PARTS, halves), "a panel of {rows} rows");
    // SAFETY: the processor has tiles, and what they need for packing; the sizes are checked.
    unsafe { along_in(from, rows, out.as_mut_ptr()) }
}

/// Packs up to 32 rows, k running along them, for the right.
pub fn transposed(from: Rows<f32>, rows: usize, out: &mut [u32]) {
    assert!(amx::available() && from.hold(rows) && rows <= SIDE, "{rows} rows");
    assert_eq!(out.len(), panel_of(from.width, Terms::Eight), "a panel of {rows} columns");
    // SAFETY: as above.
    unsafe { transposed_in(from, rows, out.as_mut_ptr()) }
}

/// Packs rows, each one of k, for the right, in panels of 32 columns.
pub fn across(from: Rows<f32>, rows: usize, out: &mut [u32]) {
    let size = panel_of(rows, Terms::Eight);
    assert!(amx::available() && from.hold(rows), "{rows} rows");
    assert_eq!(out.len(), from.width.div_ceil(SIDE) * size, "panels of {} columns", from.width);
    for (panel, out) in out.chunks_exact_mut(size).enumerate() {
        // SAFETY: as above.
        unsafe { across_in(from, panel * SIDE, rows, out.as_mut_ptr()) }
    }
}

/// Sixteen sums of a row of a tile, the lower or upper half of it, under the scales of its rows and columns.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
pub unsafe fn sum(sums: &Sums, [rows, columns]: [&[u32; SIDE]; 2], row: usize, half: usize) -> __m512 {
    let order = |order: usize| {
        let sums = &sums.0[order][row][16 * half..];
        // SAFETY: the caller's promise; sixteen are there.
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[..16].as_ptr().cast())) }
    };
    // SAFETY: as above.
    unsafe {
        // an order's digits are worth 1/256 of those of the order before
        let less = _mm512_set1_ps(1.0 / 256.0);
        let sum = (0..3).rev().fold(order(3), |sum, above| _mm512_fmadd_ps(sum, less, order(above)));
        let columns = _mm512_loadu_ps(columns[16 * half..][..16].as_ptr().cast());
        _mm512_mul_ps(sum, _mm512_mul_ps(_mm512_set1_ps(f32::from_bits(rows[row])), columns))
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn along_in(from: Rows<f32>, rows: usize, out: *mut u32) {
    let (depth, halves) = (from.width.div_ceil(DEPTH), rows.div_ceil(SIDE / 2));
    for row in 0..halves * 16 {
        // SAFETY: the caller holds the rows to the data, and `out` to the registers and the scales.
        unsafe {
            let (at, width) = if row < rows { (row * from.stride, from.width) } else { (0, 0) };
            let at = from.data.as_ptr().add(at);
            let (to, back) = scales(_mm512_set1_epi32(_mm512_reduce_max_epu32(largest(at, width)) as i32));
            for register in 0..depth {
                let start = register * DEPTH;
                let parts = stretch(at.wrapping_add(start), width.saturating_sub(start), to);
                for (part, words) in parts.into_iter().enumerate() {
                    let register = (register * PARTS + part) * halves + row / 16;
                    _mm512_storeu_si512(out.add(register * REGISTER + row % 16 * 16).cast(), words);
                }
            }
            *out.add(depth * PARTS * halves * REGISTER + row) = _mm512_cvtss_f32(back).to_bits();
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn transposed_in(from: Rows<f32>, rows: usize, out: *mut u32) {
    let depth = from.width.div_ceil(DEPTH);
    for half in 0..2 {
        let there = rows.saturating_sub(16 * half).min(16);
        // SAFETY: the caller holds the rows to the data, and `out` to the registers and the scales.
        unsafe {
            let at = |row: usize| from.data.as_ptr().add((16 * half + row) * from.stride);
            let (mut largest_of, mut to) = ([0u32; 16], [0f32; 16]);
            for (row, of) in largest_of.iter_mut().enumerate().take(there) {
                *of = _mm512_reduce_max_epu32(largest(at(row), from.width));
            }
            let (scale, back) = scales(_mm512_loadu_si512(largest_of.as_ptr().cast()));
            _mm512_storeu_ps(to.as_mut_ptr(), scale);
            _mm512_storeu_ps(out.add(depth * PARTS * 2 * REGISTER + 16 * half).cast(), back);
            for register in 0..depth {
                let start = register * DEPTH;
                let mut words = [[_mm512_setzero_si512(); 16]; PARTS];
                for row in 0..there {
                    let parts = stretch(at(row).add(start), from.width - start, _mm512_set1_ps(to[row]));
                    words.iter_mut().zip(parts).for_each(|(words, part)| words[row] = part);
                }
                for (part, words) in words.iter_mut().enumerate() {
                    transpose16(words);
                    let to = out.add(((register * PARTS + part) * 2 + half) * REGISTER);
                    for (word, words) in words.iter().enumerate() {
                        _mm512_storeu_si512(to.add(16 * word).cast(), *words);
                    }
                }
            }
        }
    }
}

/// One panel, of the columns from `column` on.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn across_in(from: Rows<f32>, column: usize, rows: usize, out: *mut u32) {
    let depth = rows.div_ceil(DEPTH);
    for half in 0..2 {
        let start = column + 16 * half;
        let mask = first(from.width.saturating_sub(start));
        // SAFETY: the caller holds the rows to the data, the mask the columns, and `out` to the registers and the
        // scales.
        unsafe {
            let row = |row: usize| {
                let mask = if row < rows { mask } else { 0 };
                _mm512_maskz_loadu_ps(mask, from.data.as_ptr().wrapping_add(row * from.stride + start))
            };
            let largest = (0..rows).fold(_mm512_setzero_si512(), |largest, k| larger(largest, row(k)));
            let (to, back) = scales(largest);
            _mm512_storeu_ps(out.add(depth * PARTS * 2 * REGISTER + 16 * half).cast(), back);
            for word in 0..16 * depth {
                let (register, word) = (word / 16, word % 16);
                let number = |i: usize| digits(row(register * DEPTH + 16 * i + word), to);
                let parts = turned([number(0), number(1), number(2), number(3)]);
                for (part, words) in parts.into_iter().enumerate() {
                    let register = (register * PARTS + part) * 2 + half;
                    _mm512_storeu_si512(out.add(register * REGISTER + 16 * word).cast(), words);
                }
            }
        }
    }
}

/// The larger of the bits of absolute values: in the order of the numbers, with what is not finite above all.
#[inline(always)]
unsafe fn larger(largest: __m512i, x: __m512) -> __m512i {
    // SAFETY: the caller runs where AVX-512 is; so for the others.
    unsafe { _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(x))) }
}

/// The largest of `width` numbers from `at` on, in one of sixteen places.
#[inline(always)]
unsafe fn largest(at: *const f32, width: usize) -> __m512i {
    // SAFETY: the mask holds the load to what is there.
    unsafe {
        let load = |start: usize| _mm512_maskz_loadu_ps(first(width - start), at.add(start));
        (0..width).step_by(16).fold(_mm512_setzero_si512(), |largest, start| larger(largest, load(start)))
    }
}

/// Powers of two: the one that makes numbers up to `largest` whole numbers of three digits, and the one that turns a
/// product of first digits back into a number.
#[inline(always)]
unsafe fn scales(largest: __m512i) -> (__m512, __m512) {
    // three digits reach (127 · 256 + 127) · 256 + 127, a little less than 2^23
    const REACH: f32 = 8_388_608.0 / 8_355_711.0;
    // SAFETY: as above.
    unsafe {
        let exponent = _mm512_getexp_ps(_mm512_mul_ps(_mm512_castsi512_ps(largest), _mm512_set1_ps(REACH)));
        // in this order: where one is NaN the second is given
        let exponent = _mm512_max_ps(_mm512_set1_ps(-100.0), exponent);
        let power = |exponent: __m512| _mm512_scalef_ps(_mm512_set1_ps(1.0), exponent);
        (
            power(_mm512_sub_ps(_mm512_set1_ps(22.0), exponent)),
            power(_mm512_sub_ps(exponent, _mm512_set1_ps(22.0 - 16.0))),
        )
    }
}

/// Words of three digits, the least one lowest.
#[inline(always)]
unsafe fn digits(x: __m512, to: __m512) -> __m512i {
    // SAFETY: as above.
    unsafe {
        // with a half of its range added a digit is a plain byte, and flipping its highest bit takes the half away
        // again
        let half = _mm512_set1_epi32(0x80_8080);
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, to));
        _mm512_xor_si512(_mm512_add_epi32(whole, half), half)
    }
}

/// Sixteen words of four numbers in digits, from `at` on; zero where not `there`.
#[inline(always)]
unsafe fn stretch(at: *const f32, there: usize, to: __m512) -> [__m512i; PARTS] {
    // SAFETY: the masks hold the loads to what is there.
    unsafe {
        let number =
            |i: usize| digits(_mm512_maskz_loadu_ps(first(there.saturating_sub(16 * i)), at.wrapping_add(16 * i)), to);
        turned([number(0), number(1), number(2), number(3)])
    }
}

/// For each digit, the greatest first, words of that digit of the four numbers.
#[inline(always)]
unsafe fn turned(x: [__m512i; 4]) -> [__m512i; PARTS] {
    const UPPER: u32 = 0xaaaa_aaaa;
    // SAFETY: as above.
    unsafe {
        let even = _mm512_set1_epi16(0xff);
        // the two lower digits of two numbers, and the greatest ones
        let low = |a, b| _mm512_mask_blend_epi16(UPPER, a, _mm512_slli_epi32::<16>(b));
        let high = |a, b| _mm512_mask_blend_epi16(UPPER, _mm512_srli_epi32::<16>(a), b);
        let (low, high) = ([low(x[0], x[2]), low(x[1], x[3])], [high(x[0], x[2]), high(x[1], x[3])]);
        [
            _mm512_or_si512(high[0], _mm512_slli_epi16::<8>(high[1])),
            _mm512_or_si512(_mm512_srli_epi16::<8>(low[0]), _mm512_andnot_si512(even, low[1])),
            _mm512_or_si512(_mm512_and_si512(even, low[0]), _mm512_slli_epi16::<8>(low[1])),
        ]
    }
}
