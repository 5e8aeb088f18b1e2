//! How quantised matrices decode: tile after tile, compiled for the vector units that the processor turns out to have.

use std::fmt::Debug;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::lookup::{Avx2, Avx512};
use super::lookup::{LookUp, Plain};
use crate::kernels::compute::Compute;
use crate::kernels::dequantise::Form;
use crate::kernels::pack::{Pairs, Widened, transpose};
use crate::weights::mapped::{ALIGN, MappedBytes, StoredMatrix, fetch};
use crate::weights::upload::Uploader;

/// Tiles start at multiples of this many columns; every group is a multiple of it, or the whole row.
pub const RUN: usize = ALIGN;

/// A matrix that decodes tiles of itself.
pub trait Tiles: Debug + Send + Sync {
    /// Fills `out` with `rows` × `columns`, row after row. `columns` is not empty and starts at a multiple of [`RUN`].
    /// Always inlined, so that it is compiled for what `lookup` was.
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

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

/// Makes a stored matrix of tiles.
#[derive(Debug)]
pub struct ByTiles<T>(pub T);

impl<T: Tiles> StoredMatrix for ByTiles<T> {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if columns.is_empty() {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(lookup) = Avx512::detect() {
                // SAFETY: the processor has the features.
                return unsafe { avx512(&self.0, lookup, rows, columns, out) };
            }
            if let Some(lookup) = Avx2::detect() {
                // SAFETY: the processor has the feature.
                return unsafe { avx2(&self.0, lookup, rows, columns, out) };
            }
        }
        self.0.tile(Plain, rows, columns, out);
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

/// The same code, compiled for the widest registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn avx512<T: Tiles>(matrix: &T, lookup: Avx512, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
    matrix.tile(lookup, rows, columns, out);
}

/// The same code, compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<T: Tiles>(matrix: &T, lookup: Avx2, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
    matrix.tile(lookup, rows, columns, out);
}

/// Cuts a stretch of a row, `out` from column `start` on, at the borders of groups of `size` columns, and gives `each`
/// the group's number in the row, the first column and the part of `out`.
#[inline(always)]
pub fn by_group(start: usize, size: usize, mut out: &mut [f32], mut each: impl FnMut(usize, usize, &mut [f32])) {
    let (mut group, mut column) = (start / size, start);
    while !out.is_empty() {
        let (now, later) = out.split_at_mut(out.len().min((group + 1) * size - column));
        let count = now.len();
        each(group, column, now);
        (group, column, out) = (group + 1, column + count, later);
    }
}

/// Most lines that are turned at once where rows come in bands: what is turned stays in the first-level cache.
pub const LINES: usize = 64;

/// Turns words that lie across rows, in lines `stride` words apart: word `row` of each of `lines`, for one of `rows`
/// after the other. `out` begins with the result.
pub fn turn<'a>(
    words: &[u8],
    stride: usize,
    lines: Range<usize>,
    rows: Range<usize>,
    out: &'a mut [u32],
) -> impl Iterator<Item = &'a [u32]> {
    let (count, width) = (lines.len(), rows.len());
    let out = &mut out[..count * width];
    // a word is as wide as two bf16
    let bytes = &words[4 * (lines.start * stride + rows.start)..];
    transpose(Pairs(Widened { bytes, stride: 2 * stride, k: 2 * width }), count, count, out);
    for line in lines {
        // the rows below, which most often come next
        let below = line * stride + rows.end;
        fetch(words, 4 * below..4 * (below + width));
    }
    out.chunks_exact(count)
}

/// Takes `out.len()` numbers of `bits` bits each, low bits first, from a stream of bytes that begins with them.
#[inline(always)]
pub fn unpack(bits: usize, bytes: &[u8], out: &mut [u8]) {
    // eight numbers take `bits` whole bytes
    for (out, bytes) in out.chunks_mut(8).zip(bytes.chunks(bits)) {
        let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        for (i, out) in out.iter_mut().enumerate() {
            *out = (word >> (i * bits)) as u8 & ((1u16 << bits) - 1) as u8;
        }
    }
}

/// A little-endian 32-bit word.
#[inline(always)]
pub fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes.as_chunks().0[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_every_width_come_apart() {
        for bits in [2, 3, 6] {
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

    #[test]
    fn words_are_turned_where_they_lie() {
        let stride = 40;
        let words: Vec<u8> = (0..50 * stride as u32).flat_map(u32::to_le_bytes).collect();
        for (lines, rows) in [(3..35, 4..36), (0..1, 0..1), (49..50, 39..40), (18..50, 31..40), (7..12, 0..40)] {
            let mut out = [u32::MAX; 40 * LINES];
            let turned = turn(&words, stride, lines.clone(), rows.clone(), &mut out);
            assert_eq!(turned.size_hint().0, rows.len());
            for (row, turned) in rows.zip(turned) {
                let expected: Vec<u32> = lines.clone().map(|line| (line * stride + row) as u32).collect();
                assert_eq!(turned, expected);
            }
        }
    }

    #[test]
    fn stretches_are_cut_at_the_borders_of_groups() {
        let mut seen = Vec::new();
        by_group(96, 64, &mut [0.0; 100], |group, start, out| seen.push((group, start, out.len())));
        assert_eq!(seen, [(1, 96, 32), (2, 128, 64), (3, 192, 4)]);
    }
}
