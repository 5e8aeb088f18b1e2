//! Panels as the micro-kernels read them: for one step of k after another, a word of each row (or column) of the panel.
//!
//! What lies with k running along its rows is transposed in registers, sixteen by sixteen on AVX-512 and eight by eight
//! on AVX2, and decoded or rounded on the way. What lies across is copied, with pairs of rows interleaved for bf16.

#[cfg(target_arch = "x86_64")]
use super::compute::Compute;
#[cfg(target_arch = "x86_64")]
use super::simd::first;
use super::simd::multiversion;

/// Rows of words: where a panel's words come from, k running along.
pub trait Rows: Copy {
    /// Whether f32 become bf16 on the way.
    const ROUNDS: bool = false;
    /// Whether a vector of [`Rows::words`] is of pairs of bf16, each of which becomes two words.
    const WIDENS: bool = false;

    /// Words a row.
    fn steps(&self) -> usize;

    /// Whether `rows` rows lie in the data.
    fn holds(&self, rows: usize) -> bool;

    /// Word `step` of row `row`.
    fn word(&self, row: usize, step: usize) -> u32;

    /// Words `step..step + 16` of row `row`, or the 32 of [`Rows::WIDENS`]; zero past the last.
    ///
    /// # Safety
    /// The data hold the row, `step` is below [`Rows::steps`], and the processor has AVX-512 F and BW (and BF16, for
    /// what rounds).
    #[cfg(target_arch = "x86_64")]
    unsafe fn words(&self, row: usize, step: usize) -> std::arch::x86_64::__m512i;

    /// Words `step..step + 8` of row `row`.
    ///
    /// # Safety
    /// The data hold them, and the processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(&self, row: usize, step: usize) -> std::arch::x86_64::__m256i {
        let words: [u32; 8] = std::array::from_fn(|i| self.word(row, step + i));
        // SAFETY: both types are 32 bytes of bits.
        unsafe { std::mem::transmute(words) }
    }

    /// Where word `step` of row `row` lies, if there is such a row: to be fetched ahead.
    fn at(&self, row: usize, step: usize) -> *const u8;
}

/// Rows of `k` floats `stride` apart, multiplied with `alpha`.
#[derive(Clone, Copy)]
pub struct Floats<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Elements from a row to the next.
    pub stride: usize,
    /// Elements a row.
    pub k: usize,
    /// A factor.
    pub alpha: f32,
}

/// [`Floats`] as pairs of bf16.
#[derive(Clone, Copy)]
pub struct Rounded<'a>(pub Floats<'a>);

/// Rows of `k` bf16 `stride` elements apart, little-endian, as f32.
#[derive(Clone, Copy)]
pub struct Widened<'a> {
    /// Two bytes an element.
    pub bytes: &'a [u8],
    /// Elements from a row to the next.
    pub stride: usize,
    /// Elements a row.
    pub k: usize,
}

/// [`Widened`] rows of an even `k` as pairs, which is how they lie.
#[derive(Clone, Copy)]
pub struct Pairs<'a>(pub Widened<'a>);

impl Rows for Floats<'_> {
    fn steps(&self) -> usize {
        self.k
    }

    fn holds(&self, rows: usize) -> bool {
        rows == 0 || self.data.len() >= (rows - 1) * self.stride + self.k
    }

    fn at(&self, row: usize, step: usize) -> *const u8 {
        self.data.as_ptr().wrapping_add(row * self.stride + step).cast()
    }

    fn word(&self, row: usize, step: usize) -> u32 {
        (self.alpha * self.data[row * self.stride + step]).to_bits()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words(&self, row: usize, step: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        // SAFETY: the mask holds the load within the row.
        unsafe {
            let at = self.data.as_ptr().add(row * self.stride + step);
            let floats = _mm512_maskz_loadu_ps(first(self.k - step), at);
            _mm512_castps_si512(_mm512_mul_ps(floats, _mm512_set1_ps(self.alpha)))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(&self, row: usize, step: usize) -> std::arch::x86_64::__m256i {
        use std::arch::x86_64::*;
        // SAFETY: the caller vouches for the words.
        unsafe {
            let floats = _mm256_loadu_ps(self.data.as_ptr().add(row * self.stride + step));
            _mm256_castps_si256(_mm256_mul_ps(floats, _mm256_set1_ps(self.alpha)))
        }
    }
}

impl Rows for Rounded<'_> {
    const ROUNDS: bool = true;

    fn steps(&self) -> usize {
        self.0.k.div_ceil(2)
    }

    fn holds(&self, rows: usize) -> bool {
        self.0.holds(rows)
    }

    fn at(&self, row: usize, step: usize) -> *const u8 {
        self.0.at(row, 2 * step)
    }

    fn word(&self, row: usize, step: usize) -> u32 {
        let Floats { data, stride, k, alpha } = self.0;
        let element = |p: usize| if p < k { rounded(alpha * data[row * stride + p]) } else { 0 };
        pair(element(2 * step), element(2 * step + 1))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words(&self, row: usize, step: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        let Floats { data, stride, k, alpha } = self.0;
        let left = k - 2 * step;
        // SAFETY: the masks hold the loads within the row; `wrapping_add` may point past it where the mask is empty.
        // Both types of the transmutation are 64 bytes of bits.
        unsafe {
            let (at, alpha) = (data.as_ptr().add(row * stride + 2 * step), _mm512_set1_ps(alpha));
            let low = _mm512_maskz_loadu_ps(first(left), at);
            let high = _mm512_maskz_loadu_ps(first(left.saturating_sub(16)), at.wrapping_add(16));
            std::mem::transmute(_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, alpha), _mm512_mul_ps(low, alpha)))
        }
    }
}

impl Widened<'_> {
    fn bits(&self, row: usize, p: usize) -> u16 {
        let at = 2 * (row * self.stride + p);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }
}

impl Rows for Widened<'_> {
    const WIDENS: bool = true;

    fn steps(&self) -> usize {
        self.k
    }

    fn holds(&self, rows: usize) -> bool {
        rows == 0 || self.bytes.len() / 2 >= (rows - 1) * self.stride + self.k
    }

    fn at(&self, row: usize, step: usize) -> *const u8 {
        self.bytes.as_ptr().wrapping_add(2 * (row * self.stride + step))
    }

    fn word(&self, row: usize, step: usize) -> u32 {
        u32::from(self.bits(row, step)) << 16
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words(&self, row: usize, step: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        let mask = u32::MAX >> 32usize.saturating_sub(self.k - step);
        // SAFETY: the mask holds the load within the row.
        unsafe { _mm512_maskz_loadu_epi16(mask, self.bytes.as_ptr().add(2 * (row * self.stride + step)).cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn eight(&self, row: usize, step: usize) -> std::arch::x86_64::__m256i {
        use std::arch::x86_64::*;
        // SAFETY: the caller vouches for the words, two bytes each.
        unsafe { _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(self.at(row, step).cast()))) }
    }
}

impl Rows for Pairs<'_> {
    fn steps(&self) -> usize {
        self.0.k / 2
    }

    fn holds(&self, rows: usize) -> bool {
        self.0.holds(rows) && self.0.k.is_multiple_of(2)
    }

    fn at(&self, row: usize, step: usize) -> *const u8 {
        self.0.at(row, 2 * step)
    }

    fn word(&self, row: usize, step: usize) -> u32 {
        pair(self.0.bits(row, 2 * step), self.0.bits(row, 2 * step + 1))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn words(&self, row: usize, step: usize) -> std::arch::x86_64::__m512i {
        use std::arch::x86_64::*;
        // SAFETY: the mask holds the load within the row.
        unsafe {
            let at = self.0.bytes.as_ptr().add(2 * (row * self.0.stride + 2 * step));
            _mm512_maskz_loadu_epi32(first(self.0.k / 2 - step), at.cast())
        }
    }
}

/// The word of two bf16 that follow one another in k.
#[inline(always)]
pub fn pair(first: u16, second: u16) -> u32 {
    u32::from(first) | u32::from(second) << 16
}

/// The bits of the nearest bf16, ties to even, in a form that vectorises. A NaN stays one.
#[inline(always)]
pub fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if x.is_nan() { bits >> 16 | 0x40 } else { nearest }) as u16
}

/// Packs `count` rows as `out[step][width]`, zero from the last row on.
///
/// # Panics
/// Where the data do not hold the rows, or `out` is not `steps × width`.
pub fn transpose<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    assert!(count <= width && rows.holds(count) && out.len() == rows.steps() * width, "the panel does not fit");
    #[cfg(target_arch = "x86_64")]
    {
        // AVX-512 widens for no other kernels
        let wide = !R::WIDENS || width.is_multiple_of(16);
        let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        if wide && Compute::bf16_or_f32() == Compute::Bf16 {
            // SAFETY: the data hold the rows, `out` the panel, and the processor has the features.
            return unsafe { avx512::with_bf16(rows, count, width, out) };
        } else if wide && avx512 && !R::ROUNDS {
            // SAFETY: as above; what rounds does not come here.
            return unsafe { avx512::without_bf16(rows, count, width, out) };
        } else if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { avx2::transpose(rows, count, width, out) };
        }
    }
    plain(rows, count, width, out);
}

/// [`transpose`] by tiles that stay in the first-level cache.
fn plain<R: Rows>(rows: R, count: usize, width: usize, out: &mut [u32]) {
    const TILE: usize = 16;
    if count < width {
        out.fill(0);
    }
    for start in (0..rows.steps()).step_by(TILE) {
        for first in (0..count).step_by(TILE) {
            for step in start..rows.steps().min(start + TILE) {
                for (i, word) in out[step * width..][first..count.min(first + TILE)].iter_mut().enumerate() {
                    *word = rows.word(first + i, step);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;

/// Where a step's words go in panels of `nr` columns that lie `size` words apart.
#[derive(Clone, Copy)]
pub struct Step {
    /// Columns a panel.
    pub nr: usize,
    /// Words a panel.
    pub size: usize,
    /// The step's number within the panels.
    pub step: usize,
}

/// Puts `word(first[j], second[j])` for every column j into the panels of `out`, zero beyond the last column.
#[inline(always)]
fn across<T>(first: &[T], second: &[T], to: Step, out: &mut [u32], word: impl Fn(&T, &T) -> u32) {
    match to.nr {
        32 => across_whole::<T, 32>(first, second, to, out, word),
        16 => across_whole::<T, 16>(first, second, to, out, word),
        _ => across_rest(first, second, to, out, word),
    }
}

/// [`across`] for panels of a known width, whose loops need no ends.
#[inline(always)]
fn across_whole<T, const NR: usize>(
    first: &[T],
    second: &[T],
    to: Step,
    out: &mut [u32],
    word: impl Fn(&T, &T) -> u32,
) {
    let ((whole, rest), (whole_second, rest_second)) = (first.as_chunks::<NR>(), second.as_chunks::<NR>());
    for (i, (first, second)) in whole.iter().zip(whole_second).enumerate() {
        let Some(words) = out[i * to.size + to.step * NR..].first_chunk_mut::<NR>() else { return };
        for (out, (first, second)) in words.iter_mut().zip(first.iter().zip(second)) {
            *out = word(first, second);
        }
    }
    if !rest.is_empty() {
        across_rest(rest, rest_second, to, &mut out[whole.len() * to.size..], word);
    }
}

#[inline(always)]
fn across_rest<T>(first: &[T], second: &[T], to: Step, out: &mut [u32], word: impl Fn(&T, &T) -> u32) {
    let rows = first.chunks(to.nr).zip(second.chunks(to.nr));
    for (panel, (first, second)) in out.chunks_exact_mut(to.size).zip(rows) {
        let words = &mut panel[to.step * to.nr..][..to.nr];
        let (there, rest) = words.split_at_mut(first.len());
        for ((out, first), second) in there.iter_mut().zip(first).zip(second) {
            *out = word(first, second);
        }
        rest.fill(0);
    }
}

multiversion! {
    /// A row of bf16, little-endian, as a step of f32.
    pub fn widen(row: &[[u8; 2]], to: Step, out: &mut [u32]) {
        across(row, row, to, out, |x, _| u32::from(u16::from_le_bytes(*x)) << 16);
    }

    /// Two rows of bf16 as a step of pairs.
    pub fn interleave(first: &[[u8; 2]], second: &[[u8; 2]], to: Step, out: &mut [u32]) {
        across(first, second, to, out, |x, y| pair(u16::from_le_bytes(*x), u16::from_le_bytes(*y)));
    }

    /// A row of f32 as a step.
    pub fn copy(row: &[f32], to: Step, out: &mut [u32]) {
        across(row, row, to, out, |x, _| x.to_bits());
    }

    /// Two rows of f32 as a step of pairs of bf16.
    pub fn round(first: &[f32], second: &[f32], to: Step, out: &mut [u32]) {
        across(first, second, to, out, |x, y| pair(rounded(*x), rounded(*y)));
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Holds what [`transpose`] packs, at every width of a panel, against words taken one by one.
    fn holds<R: Rows>(rows: R, count: usize) {
        for width in [4, 6, 8, 12, 16, 32].into_iter().filter(|width| *width >= count) {
            let mut ours = vec![0xdead_beef; rows.steps() * width];
            let mut expected = ours.clone();
            transpose(rows, count, width, &mut ours);
            plain(rows, count, width, &mut expected);
            assert_eq!(ours, expected, "{count} rows in {width}");
            // which a processor with AVX-512 does not choose
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                ours.fill(0xdead_beef);
                // SAFETY: the data hold the rows, `ours` the panel, and the processor has AVX2.
                unsafe { avx2::transpose(rows, count, width, &mut ours) };
                assert_eq!(ours, expected, "{count} rows in {width}, by eight");
            }
        }
    }

    #[test]
    fn panels_hold_every_word_in_its_place() {
        let data: Vec<f32> = (0..40 * 80).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let bytes: Vec<u8> = data.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        for k in [1, 2, 15, 16, 17, 31, 32, 48, 70, 80] {
            for count in [1, 3, 4, 7, 12, 16, 19, 32] {
                let floats = Floats { data: &data, stride: 80, k, alpha: 0.5 };
                // bytes of a file are aligned to nothing
                let unaligned = [&[0], &bytes[..]].concat();
                let widened = Widened { bytes: &unaligned[1..], stride: 80, k };
                holds(floats, count);
                holds(Rounded(floats), count);
                holds(widened, count);
                if k % 2 == 0 {
                    holds(Pairs(widened), count);
                }
            }
        }
        assert_eq!(plain_word(&data, 3, 5), data[3 * 80 + 5]);
    }

    fn plain_word(data: &[f32], row: usize, step: usize) -> f32 {
        let mut out = vec![0; 80 * 4];
        plain(Floats { data, stride: 80, k: 80, alpha: 1.0 }, 4, 4, &mut out);
        f32::from_bits(out[step * 4 + row])
    }

    #[test]
    fn rounding_is_the_formats_own() {
        let of = |bits: u32| f32::from_bits(bits);
        let numbers = (0..1 << 16).map(|i: u32| of(i.wrapping_mul(2_654_435_761)));
        for x in numbers.chain([0.0, -0.0, f32::INFINITY, f32::MAX, of(0x3f80_8000), of(0x3f81_8000)]) {
            let (ours, theirs) = (bf16::from_bits(rounded(x)), bf16::from_f32(x));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{x}: {ours} {theirs}");
        }
    }
}
