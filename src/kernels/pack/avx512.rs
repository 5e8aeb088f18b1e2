//! Packing with AVX-512: sixteen words by sixteen in registers.

use std::arch::x86_64::*;

use super::{Rows, first};

/// # Safety
/// `rows` holds `count` rows, `out` is `[steps][width]`, and the processor has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn with_bf16<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    // SAFETY: passed on.
    unsafe { body(rows, count, width, out) }
}

/// # Safety
/// As [`with_bf16`], and `rows` does not round.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn without_bf16<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    // SAFETY: passed on.
    unsafe { body(rows, count, width, out) }
}

#[inline(always)]
unsafe fn body<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    let steps = rows.steps();
    for first in (0..width).step_by(16) {
        let (there, lanes) = (count.saturating_sub(first).min(16), (width - first).min(16));
        if lanes < 16 && lanes.is_multiple_of(4) {
            for four in (first..width).step_by(4) {
                // SAFETY: passed on.
                unsafe { fours(rows, four, count, width, out) }
            }
            continue;
        }
        for start in (0..steps).step_by(if R::WIDENS { 32 } else { 16 }) {
            // SAFETY: only rows that are there are read; steps and lanes written are those of the panel.
            unsafe {
                let mut v = [_mm512_setzero_si512(); 16];
                if there == 16 {
                    for (i, v) in v.iter_mut().enumerate() {
                        // the rows that come next: too many streams for the processor to foresee them all
                        _mm_prefetch::<_MM_HINT_T0>(rows.at(first + i + 16, start).cast());
                        *v = rows.words(first + i, start);
                    }
                } else {
                    for (i, v) in v.iter_mut().take(there).enumerate() {
                        *v = rows.words(first + i, start);
                    }
                }
                transpose16(&mut v);
                let to = out.as_mut_ptr().add(start * width + first);
                if R::WIDENS {
                    widen(&v, steps - start, to, width);
                    continue;
                }
                for (i, v) in v.iter().enumerate() {
                    if start + i < steps {
                        store(to.add(i * width), *v, lanes);
                    }
                }
            }
        }
    }
}

/// Stores pairs of bf16, the first in the lower half, as a step each; as many steps as there are.
///
/// # Safety
/// So many steps of 16 words, `width` apart, lie at `to`.
#[inline(always)]
unsafe fn widen(pairs: &[__m512i; 16], steps: usize, to: *mut u32, width: usize) {
    // SAFETY: the caller vouches for the steps.
    unsafe {
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        for (i, pair) in pairs.iter().enumerate() {
            if 2 * i < steps {
                _mm512_storeu_si512(to.add(2 * i * width).cast(), _mm512_slli_epi32::<16>(*pair));
            }
            if 2 * i + 1 < steps {
                _mm512_storeu_si512(to.add((2 * i + 1) * width).cast(), _mm512_and_si512(*pair, upper));
            }
        }
    }
}

/// Packs the four rows from `four` on: what narrow panels are made of.
///
/// # Safety
/// As [`with_bf16`], and `four + 4` is at most `width`.
#[inline(always)]
unsafe fn fours<R: Rows>(rows: R, four: usize, count: usize, width: usize, out: &mut [u32]) {
    let steps = rows.steps();
    for start in (0..steps).step_by(16) {
        // SAFETY: only rows that are there are read; steps and lanes written are those of the panel.
        unsafe {
            let mut v = [_mm512_setzero_si512(); 4];
            for (i, v) in v.iter_mut().enumerate() {
                if four + i < count {
                    *v = rows.words(four + i, start);
                }
            }
            let [a, b, c, d] = v;
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            // v[j] holds, in quarter q, the four rows' words of step 4q + j
            let v = [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ];
            let to = out.as_mut_ptr().add(start * width + four);
            for (j, v) in v.into_iter().enumerate() {
                let quarters = [
                    _mm512_castsi512_si128(v),
                    _mm512_extracti32x4_epi32::<1>(v),
                    _mm512_extracti32x4_epi32::<2>(v),
                    _mm512_extracti32x4_epi32::<3>(v),
                ];
                for (q, quarter) in quarters.into_iter().enumerate() {
                    if start + 4 * q + j < steps {
                        _mm_storeu_si128(to.add((4 * q + j) * width).cast(), quarter);
                    }
                }
            }
        }
    }
}

/// # Safety
/// `at` has room for the lanes.
#[inline(always)]
unsafe fn store(at: *mut u32, v: __m512i, lanes: usize) {
    // SAFETY: the caller vouches for the lanes; the mask holds the store within them.
    unsafe {
        match lanes {
            16 => _mm512_storeu_si512(at.cast(), v),
            lanes => _mm512_mask_storeu_epi32(at.cast(), first(lanes), v),
        }
    }
}

/// Word `j` of vector `i` becomes word `i` of vector `j`.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
pub unsafe fn transpose16(v: &mut [__m512i; 16]) {
    // SAFETY: the caller runs where AVX-512 is.
    unsafe {
        let mut w = [_mm512_setzero_si512(); 16];
        // pairs of rows, then fours, within each quarter of the vectors
        for i in 0..8 {
            w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        for i in 0..4 {
            v[4 * i] = _mm512_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
            v[4 * i + 1] = _mm512_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
            v[4 * i + 2] = _mm512_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
            v[4 * i + 3] = _mm512_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
        }
        // v[4g + j] holds, in quarter q, column 4q + j of the rows 4g..4g+4: gather the quarters
        for j in 0..4 {
            let even = _mm512_shuffle_i32x4::<0x88>(v[j], v[4 + j]);
            let odd = _mm512_shuffle_i32x4::<0xdd>(v[j], v[4 + j]);
            let even_high = _mm512_shuffle_i32x4::<0x88>(v[8 + j], v[12 + j]);
            let odd_high = _mm512_shuffle_i32x4::<0xdd>(v[8 + j], v[12 + j]);
            w[j] = _mm512_shuffle_i32x4::<0x88>(even, even_high);
            w[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_high);
            w[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_high);
            w[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_high);
        }
        *v = w;
    }
}
