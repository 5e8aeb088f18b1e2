//! ggml's number formats: their sizes, and their blocks as f32.
//!
//! Each decoder yields a run of 32 numbers, which every format can begin anew at, with the operations of gguf-py's
//! `quants.py` in their order: the results are equal bit for bit.

use std::fmt;

use super::super::dtype::half_to_f32 as half;
use crate::kernels::simd::multiversion;

/// Numbers in a run.
pub const RUN: usize = 32;

/// A number format by ggml's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)] // ggml's own names
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    /// One that is known by its layout and not read: name, elements of a block, bytes of a block.
    Other(&'static str, usize, usize),
}

impl GgmlType {
    /// The format of a number in the file.
    pub fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            9 => Self::Other("Q8_1", 32, 36),
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            15 => Self::Other("Q8_K", 256, 292),
            16 => Self::Other("IQ2_XXS", 256, 66),
            17 => Self::Other("IQ2_XS", 256, 74),
            18 => Self::Other("IQ3_XXS", 256, 98),
            19 => Self::Other("IQ1_S", 256, 50),
            20 => Self::Other("IQ4_NL", 32, 18),
            21 => Self::Other("IQ3_S", 256, 110),
            22 => Self::Other("IQ2_S", 256, 82),
            23 => Self::Other("IQ4_XS", 256, 136),
            24 => Self::Other("I8", 1, 1),
            25 => Self::Other("I16", 1, 2),
            26 => Self::Other("I32", 1, 4),
            27 => Self::Other("I64", 1, 8),
            28 => Self::Other("F64", 1, 8),
            29 => Self::Other("IQ1_M", 256, 56),
            30 => Self::BF16,
            34 => Self::Other("TQ1_0", 256, 54),
            35 => Self::Other("TQ2_0", 256, 66),
            39 => Self::Other("MXFP4", 32, 17),
            _ => return None,
        })
    }

    /// The number in the file of a format that is read.
    pub fn number(self) -> u32 {
        (0..64).find(|number| Self::of(*number) == Some(self)).unwrap_or_default()
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::Other(_, elements, bytes) => (elements, bytes),
        }
    }

    /// Decodes runs of a row, from run number `first` on, until `out` (whole runs) is full.
    ///
    /// # Panics
    /// Where the format is none of blocks, or the row does not hold the runs.
    pub fn decode(self, row: &[u8], first: usize, out: &mut [f32]) {
        decode(self, row, first, out)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Other(name, ..) => f.write_str(name),
            known => fmt::Debug::fmt(known, f),
        }
    }
}

/// Runs of a row. A macro, since a function that is passed on may not be compiled with what it is passed to.
macro_rules! runs {
    ($row:ident, $first:ident, $out:ident, $decode:ident, $bytes:literal bytes, $runs:literal runs) => {{
        let (blocks, _) = $row.as_chunks::<$bytes>();
        let (outs, _) = $out.as_chunks_mut::<RUN>();
        for (number, out) in outs.iter_mut().enumerate() {
            let run = $first + number;
            $decode(&blocks[run / $runs], run % $runs, out);
        }
    }};
}

multiversion! {
    fn decode(kind: GgmlType, row: &[u8], first: usize, out: &mut [f32]) {
        match kind {
            GgmlType::Q4_0 => runs!(row, first, out, q4_0, 18 bytes, 1 runs),
            GgmlType::Q4_1 => runs!(row, first, out, q4_1, 20 bytes, 1 runs),
            GgmlType::Q5_0 => runs!(row, first, out, q5_0, 22 bytes, 1 runs),
            GgmlType::Q5_1 => runs!(row, first, out, q5_1, 24 bytes, 1 runs),
            GgmlType::Q8_0 => runs!(row, first, out, q8_0, 34 bytes, 1 runs),
            GgmlType::Q2_K => runs!(row, first, out, q2_k, 84 bytes, 8 runs),
            GgmlType::Q3_K => runs!(row, first, out, q3_k, 110 bytes, 8 runs),
            GgmlType::Q4_K => runs!(row, first, out, q4_k, 144 bytes, 8 runs),
            GgmlType::Q5_K => runs!(row, first, out, q5_k, 176 bytes, 8 runs),
            GgmlType::Q6_K => runs!(row, first, out, q6_k, 210 bytes, 8 runs),
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Other(..) => {
                unreachable!("{kind} is not decoded by blocks")
            }
        }
    }
}

/// An f16 at a place in a block.
#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Sixteen bytes hold the low halves of numbers 0 to 15 and the high halves of 16 to 31.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [f32; RUN], number: impl Fn(usize, u8) -> f32) {
    for (i, byte) in bytes[..16].iter().enumerate() {
        out[i] = number(i, byte & 15);
        out[i + 16] = number(i + 16, byte >> 4);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], _: usize, out: &mut [f32; RUN]) {
    let d = scale(block, 0);
    nibbles(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
}

#[inline(always)]
fn q4_1(block: &[u8; 20], _: usize, out: &mut [f32; RUN]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    nibbles(&block[4..], out, |_, q| d * f32::from(q) + m);
}

/// The fifth bits: bit i belongs to number i.
#[inline(always)]
fn fifth(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[inline(always)]
fn q5_0(block: &[u8; 22], _: usize, out: &mut [f32; RUN]) {
    let (d, high) = (scale(block, 0), fifth(block, 2));
    nibbles(&block[6..], out, |i, q| d * ((i32::from(q) | ((high >> i & 1) as i32 * 16)) as f32 - 16.0));
}

#[inline(always)]
fn q5_1(block: &[u8; 24], _: usize, out: &mut [f32; RUN]) {
    let (d, m, high) = (scale(block, 0), scale(block, 2), fifth(block, 4));
    nibbles(&block[8..], out, |i, q| d * (i32::from(q) | ((high >> i & 1) as i32 * 16)) as f32 + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], _: usize, out: &mut [f32; RUN]) {
    let d = scale(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(*q as i8) * d;
    }
}

/// Two bits: 16 scales, 64 bytes of quarters, d, dmin. A run is two scales.
#[inline(always)]
fn q2_k(block: &[u8; 84], run: usize, out: &mut [f32; RUN]) {
    let (d, dmin) = (scale(block, 80), scale(block, 82));
    let quarters = &block[16 + run / 4 * 32..][..32];
    let shift = run % 4 * 2;
    for part in 0..2 {
        let packed = block[run * 2 + part];
        let (dl, ml) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
        for i in part * 16..part * 16 + 16 {
            out[i] = dl * f32::from(quarters[i] >> shift & 3) - ml;
        }
    }
}

/// Three bits: 32 bytes of high bits, 64 bytes of quarters, 12 bytes of sixteen 6-bit scales, d.
#[inline(always)]
fn q3_k(block: &[u8; 110], run: usize, out: &mut [f32; RUN]) {
    let d = scale(block, 108);
    let high = &block[..32];
    let quarters = &block[32 + run / 4 * 32..][..32];
    let shift = run % 4 * 2;
    let scales = &block[96..108];
    for part in 0..2 {
        let s = run * 2 + part;
        let low = scales[s % 8] >> (s / 8 * 4) & 15;
        let six = low | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4;
        let dl = d * (f32::from(six) - 32.0);
        for i in part * 16..part * 16 + 16 {
            let q = i32::from(quarters[i] >> shift & 3) - i32::from(!high[i] >> run & 1) * 4;
            out[i] = dl * q as f32;
        }
    }
}

/// The 6-bit scale and minimum of a run, from 12 bytes.
#[inline(always)]
fn scale_and_min(packed: &[u8], run: usize) -> (u8, u8) {
    match run {
        0..4 => (packed[run] & 63, packed[run + 4] & 63),
        _ => {
            let (d, m, both) = (packed[run - 4], packed[run], packed[run + 4]);
            ((both & 15) | (d >> 2 & 48), (both >> 4) | (m >> 2 & 48))
        }
    }
}

/// Four bits: d, dmin, 12 bytes of eight scales and minima, 128 bytes: two runs in the halves of 32 bytes.
#[inline(always)]
fn q4_k(block: &[u8; 144], run: usize, out: &mut [f32; RUN]) {
    let (sc, m) = scale_and_min(&block[4..16], run);
    let (d, dm) = (scale(block, 0) * f32::from(sc), scale(block, 2) * f32::from(m));
    let shift = run % 2 * 4;
    for (out, byte) in out.iter_mut().zip(&block[16 + run / 2 * 32..][..32]) {
        *out = d * f32::from(byte >> shift & 15) - dm;
    }
}

/// Five bits: as four, with 32 bytes of fifth bits before: bit `run` of byte i.
#[inline(always)]
fn q5_k(block: &[u8; 176], run: usize, out: &mut [f32; RUN]) {
    let (sc, m) = scale_and_min(&block[4..16], run);
    let (d, dm) = (scale(block, 0) * f32::from(sc), scale(block, 2) * f32::from(m));
    let shift = run % 2 * 4;
    let (high, low) = (&block[16..48], &block[48 + run / 2 * 32..][..32]);
    for (out, (high, low)) in out.iter_mut().zip(high.iter().zip(low)) {
        *out = d * f32::from((low >> shift & 15) | (high >> run & 1) << 4) - dm;
    }
}

/// Six bits: 128 bytes of low halves, 64 of high quarters, 16 signed scales, d.
#[inline(always)]
fn q6_k(block: &[u8; 210], run: usize, out: &mut [f32; RUN]) {
    let d = scale(block, 208);
    let (half_block, within) = (run / 4, run % 4);
    let low = &block[half_block * 64 + within % 2 * 32..][..32];
    let high = &block[128 + half_block * 32..][..32];
    let (low_shift, high_shift) = (within / 2 * 4, within * 2);
    for part in 0..2 {
        let dl = d * f32::from(block[192 + run * 2 + part] as i8);
        for i in part * 16..part * 16 + 16 {
            let q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
            out[i] = dl * (f32::from(q) - 32.0);
        }
    }
}
