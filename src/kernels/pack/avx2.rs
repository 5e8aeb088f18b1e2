//! Packing with AVX2: eight words by eight in registers.

use std::arch::x86_64::*;

use super::Rows;

/// # Safety
/// `rows` holds `count` rows, `out` is `[steps][width]`, and the processor has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn transpose<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    let steps = rows.steps();
    for first in (0..width).step_by(8) {
        let (there, lanes) = (count.saturating_sub(first).min(8), (width - first).min(8));
        for start in (0..steps).step_by(8) {
            let mut v = [_mm256_setzero_si256(); 8];
            // SAFETY: only rows that are there are read; steps and lanes written are those of the panel.
            unsafe {
                for (i, v) in v.iter_mut().enumerate().take(there) {
                    // the panel that comes next: too many streams for the processor to foresee them all
                    _mm_prefetch::<_MM_HINT_T0>(rows.at(first + i + width, start).cast());
                    *v = match start + 8 <= steps {
                        true => rows.eight(first + i, start),
                        false => few(rows, first + i, start),
                    };
                }
                transpose8(&mut v);
                let to = out.as_mut_ptr().add(start * width + first);
                for (i, v) in v.iter().enumerate().take(steps - start) {
                    store(to.add(i * width), *v, lanes);
                }
            }
        }
    }
}

/// The words of a row from `step` on, which are less than eight.
#[inline]
#[target_feature(enable = "avx2")]
fn few<R: Rows>(rows: R, row: usize, step: usize) -> __m256i {
    let mut words = [0u32; 8];
    for (word, step) in words.iter_mut().zip(step..rows.steps()) {
        *word = rows.word(row, step);
    }
    // SAFETY: eight words.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

/// # Safety
/// `at` has room for the lanes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(at: *mut u32, v: __m256i, lanes: usize) {
    let (lower, upper) = (_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    // SAFETY: the caller vouches for the lanes. A masked store is slow on older processors.
    unsafe {
        match lanes {
            8 => _mm256_storeu_si256(at.cast(), v),
            6 => {
                _mm_storeu_si128(at.cast(), lower);
                _mm_storel_epi64(at.add(4).cast(), upper);
            }
            4 => _mm_storeu_si128(at.cast(), lower),
            lanes => {
                let mut words = [0u32; 8];
                _mm256_storeu_si256(words.as_mut_ptr().cast(), v);
                at.copy_from_nonoverlapping(words.as_ptr(), lanes);
            }
        }
    }
}

/// Word `j` of vector `i` becomes word `i` of vector `j`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose8(v: &mut [__m256i; 8]) {
    let mut w = *v;
    // pairs of rows, then fours, within each half of the vectors
    for i in 0..4 {
        w[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        w[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for i in 0..2 {
        v[4 * i] = _mm256_unpacklo_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 1] = _mm256_unpackhi_epi64(w[4 * i], w[4 * i + 2]);
        v[4 * i + 2] = _mm256_unpacklo_epi64(w[4 * i + 1], w[4 * i + 3]);
        v[4 * i + 3] = _mm256_unpackhi_epi64(w[4 * i + 1], w[4 * i + 3]);
    }
    // v[4g + j] holds, in half h, column 4h + j of the rows 4g..4g+4
    for j in 0..4 {
        w[j] = _mm256_permute2x128_si256::<0x20>(v[j], v[4 + j]);
        w[4 + j] = _mm256_permute2x128_si256::<0x31>(v[j], v[4 + j]);
    }
    *v = w;
}
