//! AWQ (Lin et al. 2023), 4 bit: `scale · (q − zero)` in groups of inputs.
//!
//! The matrix is stored with its inputs outermost, packed along the outputs in an order of its own.

use std::ops::Range;
use std::sync::Arc;

use super::gptq::{BAND, Group, group_size, scales, zeros};
use super::lookup::LookUp;
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, LINES, Tiles, turn, word};
use crate::Result;
use crate::keys::Keys;
use crate::weights::mapped::MappedBytes;
use crate::weights::stored::StoredTensor;

/// Numbers of a word.
const PER_WORD: usize = 8;
/// Which nibble of a word holds output 0, 1, … of its eight: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
const NIBBLES: [usize; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Takes every AWQ matrix; how many there were.
pub(super) fn gather(section: &Keys, parts: &mut Parts) -> Result<usize> {
    let bits = match section.optional_size("bits")? {
        Some(bits) => bits,
        None => section.optional_size("w_bit")?.unwrap_or(4),
    };
    if bits != 4 {
        return Err(section.bad("bits", &format!("{bits} is not read; 4 is")));
    }
    if let Some(version) = section.text("version")?.filter(|version| !version.eq_ignore_ascii_case("gemm")) {
        return Err(section.bad("version", &format!("{version:?} is not read; gemm is")));
    }
    if let Some(module) = parts.modules(".act.scales").first() {
        return Err(parts.unread(&format!("{module}.act.scales"), "divides what an activation gives"));
    }
    let modules = parts.modules(".qweight");
    let found = modules.len();
    for module in modules {
        let (words, [inputs, word_columns]) = parts.raw_matrix(&format!("{module}.qweight"), "I32")?;
        let outputs = word_columns * PER_WORD;
        let (scales, groups) = scales(parts, &module, outputs)?;
        let zeros = zeros(parts, &module, [groups, word_columns])?;
        let size = group_size(section, parts, &module, inputs, groups)?;
        let matrix = ByTiles(Awq { words, zeros, scales, size, outputs });
        let tensor = StoredTensor::new(vec![outputs, inputs], "awq 4 bit", Arc::new(matrix));
        parts.put(format!("{module}.weight"), tensor)?;
    }
    Ok(found)
}

#[derive(Debug)]
struct Awq {
    /// `[inputs, outputs / 8]`.
    words: MappedBytes,
    /// `[groups, outputs / 8]`.
    zeros: MappedBytes,
    /// `[groups, outputs]`.
    scales: Floats,
    /// Inputs of a group.
    size: usize,
    outputs: usize,
}

impl Tiles for Awq {
    #[inline(always)]
    fn tile(&self, _: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (stride, width) = (self.outputs / PER_WORD, columns.len());
        let (zeros, scales) = (&*self.zeros, self.scales.view());
        let (mut turned, mut group) = ([0; LINES * BAND], Group::default());
        for first in rows.clone().step_by(BAND) {
            let band = first..rows.end.min(first + BAND);
            let places = band.start / PER_WORD..band.end.div_ceil(PER_WORD);
            let mut start = columns.start;
            while start < columns.end {
                let number = start / self.size;
                let part = start..columns.end.min(start + LINES).min((number + 1) * self.size);
                start = part.end;
                let of_rows = group.read(&scales, number * self.outputs + band.start, band.len());
                for (row, zero) in band.clone().zip(of_rows) {
                    let zeros = word(zeros, number * stride + row / PER_WORD);
                    *zero = (zeros >> (4 * NIBBLES[row % PER_WORD]) & 15) as i32 as f32;
                }
                let turned = turn(&self.words, stride, part.clone(), places.clone(), &mut turned);
                for (place, words) in places.clone().zip(turned) {
                    for row in band.start.max(place * PER_WORD)..band.end.min((place + 1) * PER_WORD) {
                        let ((scale, zero), shift) = (group.of(row - band.start), 4 * NIBBLES[row % PER_WORD]);
                        let out = &mut out[(row - rows.start) * width + part.start - columns.start..][..part.len()];
                        for (out, word) in out.iter_mut().zip(words) {
                            *out = scale * ((word >> shift & 15) as i32 as f32 - zero);
                        }
                    }
                }
            }
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.words, &self.zeros, &self.scales.bytes]
    }
}
