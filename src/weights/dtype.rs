//! The number formats of stored weights, and their bytes as f32 and back.
//!
//! Bytes are little-endian and need no alignment: a safetensors file promises none.

use std::fmt;

use half::{bf16, f16};

use crate::kernels::simd::multiversion;

/// A format that weights are read from and written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single: its range, 8 bits of precision.
    BF16,
}

impl DType {
    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        }
    }

    /// The name in `config.json` (`torch_dtype`, `dtype`).
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// The format that [`DType`]'s `Display` calls by this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|dtype| dtype.to_string() == name)
    }

    /// Whether a value is finite and stays so when it is rounded to this format.
    pub fn holds(self, value: f32) -> bool {
        match self {
            Self::F32 => value.is_finite(),
            Self::F16 => f16::from_f32(value).is_finite(),
            Self::BF16 => bf16::from_f32(value).is_finite(),
        }
    }

    /// Widens `bytes` into `out`. Exact for every format.
    ///
    /// # Panics
    /// When `bytes` does not hold exactly `out.len()` elements.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "as many bytes as elements");
        widen(self, bytes, out);
    }

    /// The same as part of what is compiled for the processor's vector units already.
    #[inline(always)]
    pub(super) fn decode_here(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F16 => each(bytes, out, |b| half_to_f32(u16::from_le_bytes(b))),
            Self::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        }
    }

    /// Number `index` of `bytes`.
    ///
    /// # Panics
    /// When they do not hold it.
    #[inline(always)]
    pub(super) fn at(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes(bytes.as_chunks().0[index]),
            Self::F16 => half_to_f32(u16::from_le_bytes(bytes.as_chunks().0[index])),
            Self::BF16 => f32::from_bits(u32::from(u16::from_le_bytes(bytes.as_chunks().0[index])) << 16),
        }
    }

    /// The nearest number that this format holds, ties to even; a number beyond its range becomes infinite.
    #[inline(always)]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => to_f16(value),
            Self::BF16 => to_bf16(value),
        }
    }

    /// Rounds every one of `values`.
    #[inline(always)]
    pub(super) fn round_all(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::F16 => values.iter_mut().for_each(|value| *value = to_f16(*value)),
            Self::BF16 => values.iter_mut().for_each(|value| *value = to_bf16(*value)),
        }
    }

    /// Appends `values` to `out`, rounded to the nearest representable value, ties to even. A value that the
    /// format does not hold becomes infinite: see [`DType::holds`].
    pub fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        out.reserve(values.len() * self.size());
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Self::F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
            Self::BF16 => out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        }
    }
}

impl From<DType> for candle_core::DType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        })
    }
}

multiversion! {
    fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
        dtype.decode_here(bytes, out);
    }
}

/// The value of an IEEE half's bits. Unlike the `half` crate's it asks nothing about the processor, so loops of it
/// become vector code.
#[inline(always)]
pub(super) fn half_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    // the fields moved to a single's places, and 2^112 for the difference of the exponents' biases
    let fields = (bits & 0x7fff) << 13;
    let scaled = f32::from_bits(fields) * f32::from_bits(0x7780_0000);
    let infinite_or_nan = if fields >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | infinite_or_nan | (bits & 0x8000) << 16)
}

#[inline(always)]
fn to_bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    f32::from_bits(if value.is_nan() { bits } else { rounded })
}

#[inline(always)]
fn to_f16(value: f32) -> f32 {
    let (size, sign) = (value.abs(), value.to_bits() & 0x8000_0000);
    let bits = size.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x0fff + (bits >> 13 & 1)) & 0xffff_e000);
    // below 2^-14 numbers stand 2^-24 apart, which is what a sum with one half is rounded to
    let rounded = if size < 0.5f32.powi(14) { (size + 0.5) - 0.5 } else { rounded };
    let rounded = if rounded > 65504.0 { f32::INFINITY } else { rounded };
    f32::from_bits(if value.is_nan() { value.to_bits() } else { rounded.to_bits() | sign })
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], widen: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, element) in out.iter_mut().zip(elements) {
        *out = widen(*element);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_value_survives_widening_and_rounding() {
        for dtype in [DType::F16, DType::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0f32; 1 << 16];
            dtype.decode(&bytes, &mut values);
            let mut back = Vec::new();
            dtype.encode(&values, &mut back);
            for (i, value) in values.iter().enumerate() {
                let again = u16::from_le_bytes([back[2 * i], back[2 * i + 1]]);
                assert!(value.is_nan() || again == i as u16, "{dtype} {i:#06x} came back as {again:#06x}");
            }
        }
    }

    #[test]
    fn halves_are_those_of_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
    }

    #[test]
    fn rounding_in_place_is_rounding_to_the_format_and_back() {
        let halves =
            (0..1u32 << 16).flat_map(|i| [0, 0x0fff, 0x1000, 0x1001, 0x8000, 0x7fff, 0x8001].map(|d| (i << 16) + d));
        for value in halves.map(f32::from_bits) {
            for (dtype, theirs) in [
                (DType::F16, f16::from_f32(value).to_f32()),
                (DType::BF16, bf16::from_f32(value).to_f32()),
                (DType::F32, value),
            ] {
                let ours = dtype.round(value);
                assert!(
                    ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
                    "{dtype} {value:e}: {ours:e}"
                );
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let bits = |dtype: DType, value: f32| {
            let mut out = Vec::new();
            dtype.encode(&[value], &mut out);
            u16::from_le_bytes([out[0], out[1]])
        };
        // One unit in the last place of 1.0 is 2^-7 in bf16 and 2^-10 in f16.
        assert_eq!(bits(DType::BF16, 1.0 + 0.5f32.powi(8)), 0x3f80);
        assert_eq!(bits(DType::BF16, 1.0 + 3.0 * 0.5f32.powi(8)), 0x3f82);
        assert_eq!(bits(DType::BF16, 1.0 + 0.5f32.powi(8) + 0.5f32.powi(20)), 0x3f81);
        assert_eq!(bits(DType::F16, 1.0 + 0.5f32.powi(11)), 0x3c00);
        assert_eq!(bits(DType::F16, 1.0 + 3.0 * 0.5f32.powi(11)), 0x3c02);
    }

    #[test]
    fn unaligned_bytes_decode() {
        let mut bytes = vec![0xff];
        DType::F32.encode(&[1.5, -2.0], &mut bytes);
        let mut out = [0f32; 2];
        DType::F32.decode(&bytes[1..], &mut out);
        assert_eq!(out, [1.5, -2.0]);
    }
}
