//! ggml's number formats: their sizes, and their blocks as f32.
//!
//! Each decoder yields a run of 32 numbers, which every format can begin anew at, with the operations of gguf-py's
//! `quants.py` in their order: the results are equal bit for bit.

use std::fmt;
use std::ops::Range;

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

/// Runs of a row, block by block: in each, `$decode` is given which of its runs to put where. A macro, since a function
/// that is passed on may not be compiled with what it is passed to.
macro_rules! runs {
    ($row:ident, $first:ident, $out:ident, $decode:ident, $bytes:literal bytes, $runs:literal runs) => {{
        let (blocks, _) = $row.as_chunks::<$bytes>();
        let (mut outs, _) = $out.as_chunks_mut::<RUN>();
        let (mut block, mut run) = ($first / $runs, $first % $runs);
        while !outs.is_empty() {
            let (now, later) = outs.split_at_mut(outs.len().min($runs - run));
            $decode(&blocks[block], run..run + now.len(), now);
            (block, run, outs) = (block + 1, 0, later);
        }
    }};
}

/// As [`runs`], for blocks of one run.
macro_rules! blocks {
    ($row:ident, $first:ident, $out:ident, $decode:ident, $bytes:literal bytes) => {{
        let (blocks, _) = $row.as_chunks::<$bytes>();
        let (outs, _) = $out.as_chunks_mut::<RUN>();
        for (block, out) in blocks[$first..][..outs.len()].iter().zip(outs) {
            $decode(block, out);
        }
    }};
}

multiversion! {
    fn decode(kind: GgmlType, row: &[u8], first: usize, out: &mut [f32]) {
        match kind {
            GgmlType::Q4_0 => blocks!(row, first, out, q4_0, 18 bytes),
            GgmlType::Q4_1 => blocks!(row, first, out, q4_1, 20 bytes),
            GgmlType::Q5_0 => blocks!(row, first, out, q5_0, 22 bytes),
            GgmlType::Q5_1 => blocks!(row, first, out, q5_1, 24 bytes),
            GgmlType::Q8_0 => blocks!(row, first, out, q8_0, 34 bytes),
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

/// Bytes of a block from a place on.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a place in the block")
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
fn q4_0(block: &[u8; 18], out: &mut [f32; RUN]) {
    let d = scale(block, 0);
    nibbles(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; RUN]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    nibbles(&block[4..], out, |_, q| d * f32::from(q) + m);
}

/// The fifth bits: bit i belongs to number i.
#[inline(always)]
fn fifth(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; RUN]) {
    let (d, high) = (scale(block, 0), fifth(block, 2));
    nibbles(&block[6..], out, |i, q| d * ((i32::from(q) | ((high >> i & 1) as i32 * 16)) as f32 - 16.0));
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; RUN]) {
    let (d, m, high) = (scale(block, 0), scale(block, 2), fifth(block, 4));
    nibbles(&block[8..], out, |i, q| d * (i32::from(q) | ((high >> i & 1) as i32 * 16)) as f32 + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; RUN]) {
    let d = scale(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(*q as i8) * d;
    }
}

/// Two bits: 16 scales, 64 bytes of quarters, d, dmin. A run is two scales.
#[inline(always)]
fn q2_k(block: &[u8; 84], runs: Range<usize>, out: &mut [[f32; RUN]]) {
    let (d, dmin) = (scale(block, 80), scale(block, 82));
    let (dl, ml): ([f32; 16], [f32; 16]) = (
        std::array::from_fn(|i| d * f32::from(block[i] & 15)),
        std::array::from_fn(|i| dmin * f32::from(block[i] >> 4)),
    );
    for (run, out) in runs.zip(out) {
        let (quarters, shift) = (part::<32>(block, 16 + run / 4 * 32), run % 4 * 2);
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (dl, ml) = (dl[run * 2 + half], ml[run * 2 + half]);
            for (out, quarters) in out.iter_mut().zip(part::<16>(quarters, half * 16)) {
                *out = dl * (i32::from(*quarters) >> shift & 3) as f32 - ml;
            }
        }
    }
}

/// Three bits: 32 bytes of high bits, 64 bytes of quarters, 12 bytes of sixteen 6-bit scales, d.
#[inline(always)]
fn q3_k(block: &[u8; 110], runs: Range<usize>, out: &mut [[f32; RUN]]) {
    let d = scale(block, 108);
    let (high, scales) = (part::<32>(block, 0), part::<12>(block, 96));
    let dl: [f32; 16] = std::array::from_fn(|s| {
        let low = scales[s % 8] >> (s / 8 * 4) & 15;
        let six = low | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4;
        d * (f32::from(six) - 32.0)
    });
    for (run, out) in runs.zip(out) {
        let (quarters, shift) = (part::<32>(block, 32 + run / 4 * 32), run % 4 * 2);
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (quarters, high) = (part::<16>(quarters, half * 16), part::<16>(high, half * 16));
            for (out, (quarters, high)) in out.iter_mut().zip(quarters.iter().zip(high)) {
                let q = (i32::from(*quarters) >> shift & 3) - (!i32::from(*high) >> run & 1) * 4;
                *out = dl[run * 2 + half] * q as f32;
            }
        }
    }
}

/// Scales and minima of six bits, eight each, from 12 bytes.
#[inline(always)]
fn scales_and_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for i in 0..4 {
        let (d, m, both) = (packed[i], packed[i + 4], packed[i + 8]);
        (scales[i], mins[i]) = (d & 63, m & 63);
        (scales[i + 4], mins[i + 4]) = ((both & 15) | (d >> 2 & 48), (both >> 4) | (m >> 2 & 48));
    }
    (scales, mins)
}

/// Four bits: d, dmin, 12 bytes of eight scales and minima, 128 bytes: two runs in the halves of 32 bytes.
#[inline(always)]
fn q4_k(block: &[u8; 144], runs: Range<usize>, out: &mut [[f32; RUN]]) {
    let (scales, mins) = scales_and_mins(part(block, 4));
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let (d, dm) = (scales.map(|s| d * f32::from(s)), mins.map(|m| dmin * f32::from(m)));
    for (run, out) in runs.zip(out) {
        let shift = run % 2 * 4;
        for (out, byte) in out.iter_mut().zip(part::<32>(block, 16 + run / 2 * 32)) {
            *out = d[run] * (i32::from(*byte) >> shift & 15) as f32 - dm[run];
        }
    }
}

/// Five bits: as four, with 32 bytes of fifth bits before: bit `run` of byte i.
#[inline(always)]
fn q5_k(block: &[u8; 176], runs: Range<usize>, out: &mut [[f32; RUN]]) {
    let (scales, mins) = scales_and_mins(part(block, 4));
    let (d, dmin) = (scale(block, 0), scale(block, 2));
    let (d, dm) = (scales.map(|s| d * f32::from(s)), mins.map(|m| dmin * f32::from(m)));
    let high = part::<32>(block, 16);
    for (run, out) in runs.zip(out) {
        let (low, shift) = (part::<32>(block, 48 + run / 2 * 32), run % 2 * 4);
        for i in 0..RUN {
            let q = (i32::from(low[i]) >> shift & 15) | (i32::from(high[i]) >> run & 1) << 4;
            out[i] = d[run] * q as f32 - dm[run];
        }
    }
}

/// Six bits: 128 bytes of low halves, 64 of high quarters, 16 signed scales, d.
#[inline(always)]
fn q6_k(block: &[u8; 210], runs: Range<usize>, out: &mut [[f32; RUN]]) {
    let d = scale(block, 208);
    let dl: [f32; 16] = std::array::from_fn(|i| d * f32::from(block[192 + i] as i8));
    for (run, out) in runs.zip(out) {
        let (half_block, within) = (run / 4, run % 4);
        let low = part::<32>(block, half_block * 64 + within % 2 * 32);
        let high = part::<32>(block, 128 + half_block * 32);
        let (low_shift, high_shift) = (within / 2 * 4, within * 2);
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (low, high) = (part::<16>(low, half * 16), part::<16>(high, half * 16));
            for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
                let q = (i32::from(*low) >> low_shift & 15) | (i32::from(*high) >> high_shift & 3) << 4;
                *out = dl[run * 2 + half] * (q as f32 - 32.0);
            }
        }
    }
}
