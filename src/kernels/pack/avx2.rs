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
        let whole = match (there, lanes) {
            (8, 8) | (6, 6) => steps / 8 * 8,
            _ => 0,
        };
        // SAFETY: only rows that are there are read; steps and lanes written are those of the panel.
        unsafe {
            let to = out.as_mut_ptr().add(first);
            for start in (0..whole).step_by(8) {
                let to = to.add(start * width);
                match lanes {
                    8 => tile::<R, 8>(rows, first, start, to, width),
                    _ => tile::<R, 6>(rows, first, start, to, width),
                }
            }
            for start in (whole..steps).step_by(8) {
                edge(rows, [first, there], start, to.add(start * width), [width, lanes]);
            }
        }
    }
}

/// Eight steps of as many rows as lanes, in a loop without ends, which stays in registers.
///
/// # Safety
/// `rows` holds rows and steps, `to` has room for eight steps `width` words apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn tile<R: Rows, const LANES: usize>(rows: R, first: usize, start: usize, to: *mut u32, width: usize) {
    let mut v = [_mm256_setzero_si256(); 8];
    // SAFETY: the caller vouches for rows, steps and lanes.
    unsafe {
        for (i, v) in v[..LANES].iter_mut().enumerate() {
            // the panel that comes next: too many streams for the processor to foresee them all
            _mm_prefetch::<_MM_HINT_T0>(rows.at(first + i + width, start).cast());
            *v = rows.eight(first + i, start);
        }
        transpose8(&mut v);
        for (i, v) in v.iter().enumerate() {
            store(to.add(i * width), *v, LANES);
        }
    }
}

/// At most eight steps of the `there` rows from `first` on.
///
/// # Safety
/// As for [`tile`], of the steps and lanes that are left.
#[target_feature(enable = "avx2")]
unsafe fn edge<R: Rows>(rows: R, [first, there]: [usize; 2], start: usize, to: *mut u32, [width, lanes]: [usize; 2]) {
    let mut v = [_mm256_setzero_si256(); 8];
    let left = rows.steps() - start;
    // SAFETY: the caller vouches for rows, steps and lanes.
    unsafe {
        for (i, v) in v.iter_mut().enumerate().take(there) {
            *v = if left >= 8 { rows.eight(first + i, start) } else { few(rows, first + i, start) };
        }
        transpose8(&mut v);
        for (i, v) in v.iter().enumerate().take(left) {
            store(to.add(i * width), *v, lanes);
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
