//! Numbers of four bits, looked up in tables of sixteen. Whatever a format does with such a number, it has sixteen
//! results in a group: they are computed once, as the format's program computes them, and permuted into place.
//!
//! A look-up is the one thing here that the compiler makes no vector code of by itself.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::weights::dtype::DType;

/// The numbers themselves: a table before the format has done its own to it.
pub const SIXTEEN: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// Which half of a byte comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The low half.
    LowFirst,
    /// The high half.
    HighFirst,
}

impl Order {
    /// How far the eight numbers of a little-endian word are shifted.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn shifts(self) -> [i32; 8] {
        match self {
            Self::LowFirst => [0, 4, 8, 12, 16, 20, 24, 28],
            Self::HighFirst => [4, 0, 12, 8, 20, 16, 28, 24],
        }
    }
}

/// A way to look numbers up, which exists where the processor has it.
pub trait LookUp: Copy {
    /// `out[i] = table[number i of bytes]`.
    ///
    /// # Panics
    /// Where `bytes` hold fewer numbers than `out`.
    fn look_up(self, table: &[f32; 16], order: Order, bytes: &[u8], out: &mut [f32]);

    /// `out[i]` becomes `scale · (out[i] − zero)`, with the bits of scale and zero at `places[i]` of the two tables. A
    /// place beyond them leaves it as it is.
    #[inline(always)]
    fn scale_by_place(self, [scales, zeros]: [&[u32]; 2], places: &[u32], out: &mut [f32]) {
        for (out, place) in out.iter_mut().zip(places) {
            if let (Some(scale), Some(zero)) = (scales.get(*place as usize), zeros.get(*place as usize)) {
                *out = f32::from_bits(*scale) * (*out - f32::from_bits(*zero));
            }
        }
    }

    /// A table rounded to the numbers of a type.
    #[inline(always)]
    fn rounded(self, dtype: DType, mut table: [f32; 16]) -> [f32; 16] {
        dtype.round_all(&mut table);
        table
    }
}

/// One number after the other.
#[derive(Debug, Clone, Copy)]
pub struct Plain;

impl LookUp for Plain {
    #[inline(always)]
    fn look_up(self, table: &[f32; 16], order: Order, bytes: &[u8], out: &mut [f32]) {
        let bytes = &bytes[..out.len().div_ceil(2)];
        for (out, byte) in out.chunks_mut(2).zip(bytes) {
            let pair = match order {
                Order::LowFirst => [byte & 15, byte >> 4],
                Order::HighFirst => [byte >> 4, byte & 15],
            };
            for (out, number) in out.iter_mut().zip(pair) {
                *out = table[usize::from(number)];
            }
        }
    }
}

/// Sixteen numbers at once.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// `None` where the processor has no AVX-512 with bytes, short vectors and double words.
    #[inline]
    pub fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        detected.then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl LookUp for Avx512 {
    #[inline(always)]
    fn look_up(self, table: &[f32; 16], order: Order, bytes: &[u8], out: &mut [f32]) {
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn sixteens(table: &[f32; 16], order: Order, words: &[[u8; 8]], out: &mut [[f32; 16]]) {
            let [a, b, c, d, e, f, g, h] = order.shifts();
            let shifts = _mm512_setr_epi32(a, b, c, d, e, f, g, h, a, b, c, d, e, f, g, h);
            // SAFETY: the table is sixteen floats.
            let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
            for (out, [a, b, c, d, e, f, g, h]) in out.iter_mut().zip(words) {
                let first = _mm512_set1_epi32(i32::from_le_bytes([*a, *b, *c, *d]));
                let both = _mm512_mask_set1_epi32(first, 0xff00, i32::from_le_bytes([*e, *f, *g, *h]));
                // the permutation looks at the low four bits of each lane alone
                let numbers = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), table);
                // SAFETY: room for sixteen floats.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), numbers) };
            }
        }
        let bytes = &bytes[..out.len().div_ceil(2)];
        let (whole, rest) = out.as_chunks_mut();
        // SAFETY: this was made where the processor has the feature.
        unsafe { sixteens(table, order, bytes.as_chunks().0, whole) };
        Plain.look_up(table, order, &bytes[8 * whole.len()..], rest);
    }

    #[inline(always)]
    fn scale_by_place(self, [scales, zeros]: [&[u32]; 2], places: &[u32], out: &mut [f32]) {
        /// Those whose places are in tables of up to 32 that begin with place `start`.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn sixteens([scales, zeros]: [&[u32]; 2], start: usize, places: &[[u32; 16]], out: &mut [[f32; 16]]) {
            let half = |table: &[u32], at: usize| {
                let mask = (1u32 << table.len().saturating_sub(at).min(16)) - 1;
                // SAFETY: what the mask leaves out, which may be beyond the table, is not read.
                unsafe { _mm512_maskz_loadu_epi32(mask as u16, table.as_ptr().wrapping_add(at).cast()) }
            };
            let [first, count] = [start, scales.len()].map(|n| _mm512_set1_epi32(n as i32));
            let [scales, zeros] = [scales, zeros].map(|table| (half(table, 0), half(table, 16)));
            for (out, places) in out.iter_mut().zip(places) {
                // SAFETY: sixteen numbers and sixteen floats.
                let (places, numbers) =
                    unsafe { (_mm512_loadu_epi32(places.as_ptr().cast()), _mm512_loadu_ps(out.as_ptr())) };
                let places = _mm512_sub_epi32(places, first);
                let pick = |(low, high)| _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, places, high));
                let scaled = _mm512_mul_ps(pick(scales), _mm512_sub_ps(numbers, pick(zeros)));
                // SAFETY: room for sixteen floats.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), _mm512_cmplt_epu32_mask(places, count), scaled) };
            }
        }
        let (whole, rest) = out.as_chunks_mut();
        let (of_whole, others) = places.split_at(places.len().min(16 * whole.len()));
        for (i, (scales, zeros)) in scales.chunks(32).zip(zeros.chunks(32)).enumerate() {
            // SAFETY: this was made where the processor has the feature.
            unsafe { sixteens([scales, zeros], 32 * i, of_whole.as_chunks().0, whole) };
        }
        Plain.scale_by_place([scales, zeros], others, rest);
    }

    #[inline(always)]
    fn rounded(self, dtype: DType, table: [f32; 16]) -> [f32; 16] {
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn to_f16(table: [f32; 16]) -> [f32; 16] {
            // SAFETY: sixteen floats are 64 bytes, whatever they are.
            let floats = unsafe { std::mem::transmute::<[f32; 16], __m512>(table) };
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(floats);
            // SAFETY: as above.
            unsafe { std::mem::transmute(_mm512_cvtph_ps(halves)) }
        }
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn to_bf16(table: [f32; 16]) -> [f32; 16] {
            // SAFETY: sixteen floats are 64 bytes, whatever they are.
            let floats = unsafe { std::mem::transmute::<[f32; 16], __m512>(table) };
            let (bits, one) = (_mm512_castps_si512(floats), _mm512_set1_epi32(1));
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), one);
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let numbers = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(floats, floats);
            let rounded = _mm512_mask_and_epi32(bits, numbers, up, _mm512_set1_epi32(!0xffff));
            // SAFETY: as above.
            unsafe { std::mem::transmute(rounded) }
        }
        // SAFETY: this was made where the processor has the feature.
        unsafe {
            match dtype {
                DType::F32 => table,
                DType::F16 => to_f16(table),
                DType::BF16 => to_bf16(table),
            }
        }
    }
}

/// Eight numbers at once.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// `None` where the processor has no AVX2.
    #[inline]
    pub fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl LookUp for Avx2 {
    #[inline(always)]
    fn look_up(self, table: &[f32; 16], order: Order, bytes: &[u8], out: &mut [f32]) {
        #[inline]
        #[target_feature(enable = "avx2")]
        fn eights(table: &[f32; 16], order: Order, words: &[[u8; 4]], out: &mut [[f32; 8]]) {
            let [a, b, c, d, e, f, g, h] = order.shifts();
            let shifts = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
            // SAFETY: the table is twice eight floats.
            let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
            for (out, word) in out.iter_mut().zip(words) {
                let numbers = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*word)), shifts);
                // a permutation looks at the low three bits of each lane; the fourth, as a sign, picks the half
                let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(numbers));
                let [low, high] = [low, high].map(|half| _mm256_permutevar8x32_ps(half, numbers));
                // SAFETY: room for eight floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(low, high, half)) };
            }
        }
        let bytes = &bytes[..out.len().div_ceil(2)];
        let (whole, rest) = out.as_chunks_mut();
        // SAFETY: this was made where the processor has the feature.
        unsafe { eights(table, order, bytes.as_chunks().0, whole) };
        Plain.look_up(table, order, &bytes[4 * whole.len()..], rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_look_up_is_the_definition() {
        let (table, bytes) = (std::array::from_fn(|i| i as f32), [0x10, 0x32, 0xf4]);
        for (order, expected) in
            [(Order::LowFirst, [0.0, 1.0, 2.0, 3.0, 4.0]), (Order::HighFirst, [1.0, 0.0, 3.0, 2.0, 15.0])]
        {
            let mut out = [0.0; 5];
            Plain.look_up(&table, order, &bytes, &mut out);
            assert_eq!(out, expected, "{order:?}");
        }
    }

    #[test]
    fn plain_scaling_is_the_definition() {
        let tables = [[0.5f32, 2.0, -1.5], [1.0, 0.0, 4.0]].map(|table| table.map(f32::to_bits));
        let mut out = [7.0, 7.0, 7.0, 7.0, 3.0];
        Plain.scale_by_place([&tables[0], &tables[1]], &[2, 0, 1, 3, 0], &mut out);
        assert_eq!(out, [-4.5, 3.0, 14.0, 7.0, 1.0]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_scale_by_place_as_plain_code_does() {
        let Some(way) = Avx512::detect() else { return };
        for size in [1, 2, 15, 16, 17, 32, 33, 64, 100] {
            let table = |factor: f32| -> Vec<u32> { (1..=size).map(|i| (i as f32 * factor).to_bits()).collect() };
            let (scales, zeros) = (table(0.1), table(1.7));
            // one beyond the tables, too
            let places: Vec<u32> = (0..71).map(|i| i * i * 7 % (size + 1)).collect();
            for length in [0, 1, 15, 16, 33, 71] {
                let mut ours: Vec<f32> = (0..length).map(|i| i as f32 * 0.3).collect();
                let mut plain = ours.clone();
                way.scale_by_place([&scales, &zeros], &places, &mut ours);
                Plain.scale_by_place([&scales, &zeros], &places, &mut plain);
                assert_eq!(ours, plain, "{size} {length}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_look_up_what_plain_code_does() {
        fn held(way: impl LookUp) {
            let table = std::array::from_fn(|i| i as f32 - 7.5);
            let bytes: Vec<u8> = (0..200u32).map(|i| ((i * i * 37 + i * 11) >> 2) as u8).collect();
            let floats = (0..1u32 << 12).flat_map(|i| {
                [0, 0xfff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000].map(|low| (i << 20) + low)
            });
            let floats: Vec<f32> = floats.map(f32::from_bits).filter(|x| !x.is_nan()).collect();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                for table in floats.as_chunks().0 {
                    let (ours, plain) = (way.rounded(dtype, *table), Plain.rounded(dtype, *table));
                    assert_eq!(ours.map(f32::to_bits), plain.map(f32::to_bits), "{dtype} {table:?}");
                }
                assert!(way.rounded(dtype, [f32::NAN; 16])[15].is_nan());
            }
            for order in [Order::LowFirst, Order::HighFirst] {
                for length in (0..70).chain([399, 400]) {
                    let (mut ours, mut plain) = (vec![0.0; length], vec![0.0; length]);
                    way.look_up(&table, order, &bytes, &mut ours);
                    Plain.look_up(&table, order, &bytes, &mut plain);
                    assert_eq!(ours, plain, "{order:?} {length}");
                }
            }
        }
        if let Some(way) = Avx512::detect() {
            held(way);
        }
        if let Some(way) = Avx2::detect() {
            held(way);
        }
    }
}
