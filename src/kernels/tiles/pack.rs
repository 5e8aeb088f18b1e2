//! What the registers of tiles are loaded from: words of two bf16 that follow one another in k, in sixteens each way.
//!
//! Rows in which k runs along are copied for the left and transposed for the right; rows of which each is one of k are
//! interleaved in pairs. An f32 is rounded to bf16, and on the left what the rounding left over is rounded in turn, as
//! often as there are parts: three hold it whole (but for what is below 1e-33, and above 3.39e38, which rounds to
//! infinity).

use std::arch::x86_64::*;

use super::super::{
    amx::{self, REGISTER, SIDE, Terms},
    pack::avx512::transpose16,
    simd::first,
};

/// Numbers of k that a register takes.
const DEPTH: usize = Terms::Three.depth();

/// Rows of numbers.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// The numbers.
    pub data: &'a [T],
    /// Numbers from a row to the next.
    pub stride: usize,
    /// Numbers of a row that are there.
    pub width: usize,
}

impl<T> Rows<'_, T> {
    /// Whether so many rows are there.
    pub(super) fn hold(&self, rows: usize) -> bool {
        rows == 0 || self.data.len() >= (rows - 1) * self.stride + self.width
    }
}

/// A number that is rounded to bf16.
pub trait Number: Copy + Sync {
    /// Sixteen pairs of numbers from `at` on; zero where not `there`.
    ///
    /// # Safety
    /// As many numbers as are there can be read, and the processor has the features of [`along`].
    unsafe fn pairs(at: *const Self, there: usize) -> __m512i;

    /// Sixteen numbers, each in the lower half of a word.
    ///
    /// # Safety
    /// As for pairs.
    unsafe fn singles(at: *const Self, there: usize) -> __m512i;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn pairs(at: *const Self, there: usize) -> __m512i {
        // SAFETY: passed on.
        unsafe { parts::<1>(at, there)[0] }
    }

    #[inline(always)]
    unsafe fn singles(at: *const Self, there: usize) -> __m512i {
        // SAFETY: the mask holds the load to what is there.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(there), at));
            _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(rounded))
        }
    }
}

/// A bf16 as it lies in a file.
impl Number for [u8; 2] {
    #[inline(always)]
    unsafe fn pairs(at: *const Self, there: usize) -> __m512i {
        let mask = if there >= 32 { u32::MAX } else { (1 << there) - 1 };
        // SAFETY: the mask holds the load to what is there.
        unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) }
    }

    #[inline(always)]
    unsafe fn singles(at: *const Self, there: usize) -> __m512i {
        // SAFETY: the mask holds the load to what is there.
        unsafe {
            _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(first(there).into(), at.cast())))
        }
    }
}

/// Sixteen pairs of f32 from `at` on, in parts; zero where not `there`.
///
/// # Safety
/// As many numbers as are there can be read, and the processor has the features of [`along`].
#[inline(always)]
unsafe fn parts<const PARTS: usize>(at: *const f32, there: usize) -> [__m512i; PARTS] {
    // SAFETY: the masks hold the loads to what is there.
    unsafe {
        let mut low = _mm512_maskz_loadu_ps(first(there), at);
        let mut high = _mm512_maskz_loadu_ps(first(there.saturating_sub(16)), at.wrapping_add(16));
        let mut parts = [_mm512_setzero_si512(); PARTS];
        for part in &mut parts {
            *part = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(*part)));
            high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(*part)));
        }
        parts
    }
}

/// Sixteen bf16 as f32.
#[inline(always)]
unsafe fn widen(numbers: __m256i) -> __m512 {
    // SAFETY: the caller runs where AVX-512 is.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(numbers))) }
}

/// Packs up to 32 rows, k running along them, for the left: `[register of k][parts][halves][row][pair]`.
///
/// # Panics
/// Where the sizes do not fit, and where the processor has no tiles; so for the others.
pub fn along<const PARTS: usize>(from: Rows<f32>, rows: usize, out: &mut [u32]) {
    let (depth, halves) = (from.width.div_ceil(DEPTH), rows.div_ceil(SIDE / 2));
    assert!(amx::available() && from.hold(rows) && halves <= 2, "{rows} rows");
    assert_eq!(out.len(), depth * PARTS * halves * REGISTER, "a panel of {rows} rows");
    // SAFETY: the processor has tiles, and what they need for packing; the sizes are checked.
    unsafe { along_in::<PARTS>(from, rows, out.as_mut_ptr()) }
}

/// Packs up to 32 rows, k running along them, for the right: `[register of k][2][pair][row]`.
pub fn transposed<T: Number>(from: Rows<T>, rows: usize, out: &mut [u32]) {
    let depth = from.width.div_ceil(DEPTH);
    assert!(amx::available() && from.hold(rows) && rows <= SIDE, "{rows} rows");
    assert_eq!(out.len(), depth * 2 * REGISTER, "a panel of {rows} columns");
    // SAFETY: as above.
    unsafe { transposed_in(from, rows, out.as_mut_ptr()) }
}

/// Packs up to 32 rows, each one of k, for the right: register `register` of k of each panel of 32 columns, panels
/// `size` words from one another.
pub fn across<T: Number>(from: Rows<T>, rows: usize, register: usize, size: usize, out: &mut [u32]) {
    assert!(amx::available() && from.hold(rows) && rows <= DEPTH, "{rows} rows");
    assert!((register + 1) * 2 * REGISTER <= size, "register {register} of panels of {size} words");
    assert!(out.len() >= from.width.div_ceil(SIDE) * size, "panels of {} columns", from.width);
    // SAFETY: as above.
    unsafe { across_in(from, rows, size, out[register * 2 * REGISTER..].as_mut_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn along_in<const PARTS: usize>(from: Rows<f32>, rows: usize, out: *mut u32) {
    let halves = rows.div_ceil(SIDE / 2);
    for half in 0..halves {
        for row in 16 * half..16 * half + 16 {
            for start in (0..from.width).step_by(DEPTH) {
                // SAFETY: the caller holds the rows to the data, and `out` to as many registers.
                unsafe {
                    let at = from.data.as_ptr().wrapping_add(row * from.stride + start);
                    let there = if row < rows { from.width - start } else { 0 };
                    let register = start / DEPTH * PARTS * halves + half;
                    for (part, words) in parts::<PARTS>(at, there).into_iter().enumerate() {
                        let to = out.add((register + part * halves) * REGISTER + row % 16 * 16);
                        _mm512_storeu_si512(to.cast(), words);
                    }
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn transposed_in<T: Number>(from: Rows<T>, rows: usize, out: *mut u32) {
    for half in 0..2 {
        let there = rows.saturating_sub(16 * half).min(16);
        for start in (0..from.width).step_by(DEPTH) {
            // SAFETY: the caller holds the rows to the data, and `out` to as many registers.
            unsafe {
                let mut words = [_mm512_setzero_si512(); 16];
                for (row, words) in words.iter_mut().enumerate().take(there) {
                    let at = from.data.as_ptr().add((16 * half + row) * from.stride + start);
                    // the rows that come next: too many streams for the processor to foresee them all
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(16 * from.stride).cast());
                    *words = T::pairs(at, from.width - start);
                }
                transpose16(&mut words);
                let to = out.add((start / DEPTH * 2 + half) * REGISTER);
                for (pair, words) in words.iter().enumerate() {
                    _mm512_storeu_si512(to.add(16 * pair).cast(), *words);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn across_in<T: Number>(from: Rows<T>, rows: usize, size: usize, out: *mut u32) {
    for pair in 0..16 {
        for start in (0..from.width.next_multiple_of(SIDE)).step_by(16) {
            // SAFETY: the caller holds the rows to the data, and `out` to as many panels.
            unsafe {
                let row = |row: usize| {
                    let there = if row < rows { from.width.saturating_sub(start) } else { 0 };
                    T::singles(from.data.as_ptr().wrapping_add(row * from.stride + start), there)
                };
                let words = _mm512_or_si512(row(2 * pair), _mm512_slli_epi32::<16>(row(2 * pair + 1)));
                let to = out.add(start / SIDE * size + start % SIDE / 16 * REGISTER + 16 * pair);
                _mm512_storeu_si512(to.cast(), words);
            }
        }
    }
}
