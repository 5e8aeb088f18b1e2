//! How quantised matrices decode: a row at a time, in runs of 32 numbers.

use std::fmt::Debug;
use std::ops::Range;

use crate::kernels::compute::Compute;
use crate::kernels::dequantise::Form;
use crate::weights::mapped::{ALIGN, MappedBytes, StoredMatrix};
use crate::weights::upload::Uploader;

/// Numbers in a run; every group and block of the formats here is a multiple of it, or is handled number by number.
pub const RUN: usize = ALIGN;

/// A matrix that decodes runs of its rows.
pub trait Runs: Debug + Send + Sync {
    /// Fills `out`, at most [`RUN`] numbers, from row `row` and column `start`, a multiple of [`RUN`].
    fn run(&self, row: usize, start: usize, out: &mut [f32]);

    /// Everything of it that lies in files.
    fn parts(&self) -> Vec<&MappedBytes>;

    /// Whether every number is a bf16 exactly.
    fn exact_in_bf16(&self) -> bool {
        false
    }

    /// The matrix of so many rows in its stored form on a device, where it has one there.
    fn on_device(&self, _rows: usize, _uploader: &Uploader) -> candle_core::Result<Option<Form>> {
        Ok(None)
    }

    /// Bytes of that form, where there is one.
    fn device_bytes(&self) -> Option<usize> {
        None
    }
}

/// Makes a stored matrix of runs.
#[derive(Debug)]
pub struct ByRuns<T>(pub T);

impl<T: Runs> StoredMatrix for ByRuns<T> {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { decode_avx2(&self.0, rows, columns, out) };
        }
        decode(&self.0, rows, columns, out);
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.0.parts()
    }

    fn exact_in_bf16(&self) -> bool {
        self.0.exact_in_bf16()
    }

    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        match self.0.on_device(rows, uploader)? {
            Some(form) => Ok(form),
            None => uploader.decoded(self, rows, columns),
        }
    }

    fn device_bytes(&self, numbers: usize, compute: Compute) -> usize {
        self.0.device_bytes().unwrap_or(numbers * compute.size())
    }
}

/// The same code, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_avx2<T: Runs>(matrix: &T, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
    decode(matrix, rows, columns, out);
}

#[inline(always)]
fn decode<T: Runs>(matrix: &T, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
    for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
        // runs of a length that the compiler knows, then what is left
        let (whole, rest) = out.as_chunks_mut::<RUN>();
        let last = columns.start + whole.len() * RUN;
        for (number, out) in whole.iter_mut().enumerate() {
            matrix.run(row, columns.start + number * RUN, out);
        }
        if !rest.is_empty() {
            matrix.run(row, last, rest);
        }
    }
}

/// Takes `out.len()` numbers of `bits` bits each, low bits first, from a stream of bytes that begins with them.
#[inline(always)]
pub fn unpack(bits: usize, bytes: &[u8], out: &mut [u8]) {
    match bits {
        8 => out.copy_from_slice(&bytes[..out.len()]),
        4 => {
            let (pairs, rest) = out.as_chunks_mut::<2>();
            if let [last] = rest {
                *last = bytes[pairs.len()] & 15;
            }
            for (pair, byte) in pairs.iter_mut().zip(bytes) {
                *pair = [byte & 15, byte >> 4];
            }
        }
        _ => {
            // eight numbers take `bits` whole bytes
            for (out, bytes) in out.chunks_mut(8).zip(bytes.chunks(bits)) {
                let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
                for (i, out) in out.iter_mut().enumerate() {
                    *out = (word >> (i * bits)) as u8 & ((1u16 << bits) - 1) as u8;
                }
            }
        }
    }
}

/// A little-endian 32-bit word.
#[inline(always)]
pub fn word(bytes: &[u8], index: usize) -> u32 {
    let at = index * 4;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_every_width_come_apart() {
        for bits in [2, 3, 4, 6, 8] {
            let values: Vec<u8> = (0..32u32).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            let mut bytes = vec![0u8; 4 * bits];
            for (i, value) in values.iter().enumerate() {
                for bit in (0..bits).filter(|bit| value >> bit & 1 == 1) {
                    bytes[(i * bits + bit) / 8] |= 1 << ((i * bits + bit) % 8);
                }
            }
            for length in [32, 16, 8] {
                let mut out = vec![0; length];
                unpack(bits, &bytes, &mut out);
                assert_eq!(out, values[..length], "{bits} bits");
            }
        }
    }
}
