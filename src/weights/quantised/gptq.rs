//! GPTQ (Frantar et al. 2022), 4 and 8 bit, and AWQ (Lin et al. 2023), 4 bit: `scale · (q − zero)` in groups of inputs.
//!
//! Both store the matrix with its inputs outermost. GPTQ packs along the inputs and may give them to groups in any
//! order (act-order); AWQ packs along the outputs, in an order of its own.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{LookUp, Order, SIXTEEN};
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, LINES, RUN, Tiles, by_group, turn, word};
use crate::Result;
use crate::keys::Keys;
use crate::weights::mapped::MappedBytes;
use crate::weights::stored::StoredTensor;

/// Rows whose words are turned at once.
const BAND: usize = 32;

/// Takes every GPTQ matrix; how many there were.
pub(super) fn gather_gptq(section: &Keys, parts: &mut Parts) -> Result<usize> {
    let bits = match section.size("bits")? {
        bits @ (4 | 8) => bits,
        other => return Err(section.bad("bits", &format!("{other} is not read; 4 and 8 are"))),
    };
    // the first version of the format stores zeros less one
    let zero_offset = match section.text("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => return Err(section.bad("checkpoint_format", &format!("{other:?} is not read; gptq and gptq_v2 are"))),
    };
    let modules = parts.modules(".qweight");
    let found = modules.len();
    for module in modules {
        let per_word = 32 / bits;
        let (words, [word_rows, outputs]) = parts.raw_matrix(&format!("{module}.qweight"), "I32")?;
        let inputs = word_rows * per_word;
        let (scales, groups) = scales(parts, &module, outputs)?;
        let zeros = zeros(parts, &module, [groups, outputs.div_ceil(per_word)])?;
        let name = format!("{module}.g_idx");
        let size = inputs.div_ceil(groups);
        let order = match parts.has(&name) {
            true => group_order(parts, &name, inputs, groups, size)?,
            false => None,
        };
        if order.is_none() && groups > 1 && !size.is_multiple_of(RUN) {
            return Err(parts.bad(&name, &format!("would make groups of {size}; multiples of {RUN} are read")));
        }
        let matrix = Gptq { words, zeros, scales, order, size, bits, zero_offset, outputs };
        let tensor = StoredTensor::new(vec![outputs, inputs], format!("gptq {bits} bit"), Arc::new(ByTiles(matrix)));
        parts.put(format!("{module}.weight"), tensor)?;
    }
    Ok(found)
}

fn scales(parts: &mut Parts, module: &str, outputs: usize) -> Result<(Floats, usize)> {
    let name = format!("{module}.scales");
    let (scales, shape) = parts.any_floats(&name)?;
    match shape[..] {
        [groups, stated] if groups > 0 && stated == outputs => Ok((scales, groups)),
        _ => Err(parts.misfit(&name, &shape, &[1, outputs])),
    }
}

fn zeros(parts: &mut Parts, module: &str, due: [usize; 2]) -> Result<MappedBytes> {
    let name = format!("{module}.qzeros");
    let (zeros, stated) = parts.raw_matrix(&name, "I32")?;
    if stated == due { Ok(zeros) } else { Err(parts.misfit(&name, &stated, &due)) }
}

/// The group of each input; `None` where they are in order.
fn group_order(
    parts: &mut Parts,
    name: &str,
    inputs: usize,
    groups: usize,
    size: usize,
) -> Result<Option<MappedBytes>> {
    let raw = parts.raw(name, "I32")?;
    if raw.shape != [inputs] {
        return Err(parts.misfit(name, &raw.shape, &[inputs]));
    }
    if let Some(at) = (0..inputs).find(|i| word(&raw.bytes, *i) as usize >= groups) {
        return Err(parts.bad(name, &format!("sends input {at} to a group beyond the {groups} that there are")));
    }
    let in_order = (0..inputs).all(|i| word(&raw.bytes, i) as usize == i / size);
    Ok((!in_order).then_some(raw.bytes))
}

#[derive(Debug)]
struct Gptq {
    /// `[inputs / per word, outputs]`.
    words: MappedBytes,
    /// `[groups, outputs / per word]`.
    zeros: MappedBytes,
    /// `[groups, outputs]`.
    scales: Floats,
    /// `[inputs]`: the group of each, where they are not in order.
    order: Option<MappedBytes>,
    /// Inputs of a group.
    size: usize,
    bits: usize,
    zero_offset: u32,
    outputs: usize,
}

impl Gptq {
    #[inline(always)]
    fn group(&self, row: usize, group: usize) -> (f32, f32) {
        let (per_word, mask) = (32 / self.bits, (1u32 << self.bits) - 1);
        let packed = word(&self.zeros, group * self.outputs.div_ceil(per_word) + row / per_word);
        let zero = (packed >> (row % per_word * self.bits)).wrapping_add(self.zero_offset) & mask;
        (self.scales.at(group * self.outputs + row), zero as f32)
    }

    /// A part of row `row`, from column `start` on, whose numbers `bytes` hold.
    #[inline(always)]
    fn stretch(&self, lookup: impl LookUp, row: usize, start: usize, bytes: &[u8], out: &mut [f32]) {
        let number = |i: usize| match self.bits {
            4 => bytes[i / 2] >> (i % 2 * 4) & 15,
            _ => bytes[i],
        };
        if let Some(order) = &self.order {
            for (i, out) in out.iter_mut().enumerate() {
                let (scale, zero) = self.group(row, word(order, start + i) as usize);
                *out = scale * (f32::from(number(i)) - zero);
            }
            return;
        }
        by_group(start, self.size, out, |group, column, out| {
            let (scale, zero) = self.group(row, group);
            let bytes = &bytes[(column - start) * self.bits / 8..];
            match self.bits {
                4 => lookup.look_up(&SIXTEEN.map(|code| scale * (code - zero)), Order::LowFirst, bytes, out),
                _ => out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = scale * (f32::from(*byte) - zero)),
            }
        });
    }
}

impl Tiles for Gptq {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (per_word, width) = (32 / self.bits, columns.len());
        let mut words = [[0; LINES]; BAND];
        for part in columns.clone().step_by(LINES * per_word) {
            let end = columns.end.min(part + LINES * per_word);
            for first in rows.clone().step_by(BAND) {
                let band = first..rows.end.min(first + BAND);
                turn(&self.words, self.outputs, part / per_word..end.div_ceil(per_word), band.clone(), &mut words);
                for (row, words) in band.zip(&words) {
                    let bytes = words.map(u32::to_le_bytes);
                    let out = &mut out[(row - rows.start) * width + part - columns.start..][..end - part];
                    self.stretch(lookup, row, part, bytes.as_flattened(), out);
                }
            }
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        let order = self.order.iter();
        [&self.words, &self.zeros, &self.scales.bytes].into_iter().chain(order).collect()
    }
}

/// Numbers of a word of AWQ.
const AWQ_WORD: usize = 8;
/// Which nibble of a word holds output 0, 1, … of its eight: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
const AWQ_NIBBLES: [usize; AWQ_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Takes every AWQ matrix; how many there were.
pub(super) fn gather_awq(section: &Keys, parts: &mut Parts) -> Result<usize> {
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
    let modules = parts.modules(".qweight");
    let found = modules.len();
    for module in modules {
        let (words, [inputs, word_columns]) = parts.raw_matrix(&format!("{module}.qweight"), "I32")?;
        let outputs = word_columns * AWQ_WORD;
        let (scales, groups) = scales(parts, &module, outputs)?;
        let zeros = zeros(parts, &module, [groups, word_columns])?;
        let size = inputs.div_ceil(groups);
        if groups > 1 && !size.is_multiple_of(RUN) {
            return Err(
                parts.bad(&format!("{module}.scales"), &format!("makes groups of {size}, not multiples of {RUN}"))
            );
        }
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
        let (stride, width) = (self.outputs / AWQ_WORD, columns.len());
        let places = rows.start / AWQ_WORD..rows.end.div_ceil(AWQ_WORD);
        let mut words = [[0; LINES]; BAND];
        for start in columns.clone().step_by(LINES) {
            let (part, group) = (start..columns.end.min(start + LINES), start / self.size);
            for first in places.clone().step_by(BAND) {
                let band = first..places.end.min(first + BAND);
                turn(&self.words, stride, part.clone(), band.clone(), &mut words);
                for (place, words) in band.zip(&words) {
                    let zeros = word(&self.zeros, group * stride + place);
                    for row in rows.start.max(place * AWQ_WORD)..rows.end.min((place + 1) * AWQ_WORD) {
                        let shift = 4 * AWQ_NIBBLES[row % AWQ_WORD];
                        let (scale, zero) = (self.scales.at(group * self.outputs + row), (zeros >> shift & 15) as f32);
                        let out = &mut out[(row - rows.start) * width + start - columns.start..][..part.len()];
                        for (out, word) in out.iter_mut().zip(words) {
                            *out = scale * ((word >> shift & 15) as f32 - zero);
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
