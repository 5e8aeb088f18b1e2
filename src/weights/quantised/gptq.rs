//! GPTQ (Frantar et al. 2022), 4 and 8 bit, and AWQ (Lin et al. 2023), 4 bit: `scale · (q − zero)` in groups of inputs.
//!
//! Both store the matrix with its inputs outermost. GPTQ packs along the inputs and may give them to groups in any
//! order (act-order); AWQ packs along the outputs, in an order of its own.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{LookUp, Order, SIXTEEN};
use super::parts::{self, Floats, Parts};
use super::tiles::{ByTiles, LINES, RUN, Tiles, by_group, turn, word};
use crate::Result;
use crate::keys::Keys;
use crate::weights::mapped::MappedBytes;
use crate::weights::stored::StoredTensor;

/// Rows whose words are turned at once.
const BAND: usize = 32;

/// Most groups in a part of a row whose words are turned at once.
const GROUPS: usize = LINES * 8 / RUN;

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

/// A matrix of numbers of so many bits, at hand.
struct View<'a, const BITS: usize> {
    matrix: &'a Gptq,
    words: &'a [u8],
    zeros: &'a [u8],
    scales: parts::View<'a>,
    order: Option<&'a [u8]>,
}

impl<const BITS: usize> View<'_, BITS> {
    const PER_WORD: usize = 32 / BITS;
    const MASK: u32 = (1 << BITS) - 1;

    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let width = columns.len();
        let (mut words, mut groups) = ([[0; LINES]; BAND], [[(0.0, 0.0); GROUPS]; BAND]);
        for part in columns.clone().step_by(LINES * Self::PER_WORD) {
            let part = part..columns.end.min(part + LINES * Self::PER_WORD);
            let lines = part.start / Self::PER_WORD..part.end.div_ceil(Self::PER_WORD);
            for first in rows.clone().step_by(BAND) {
                let band = first..rows.end.min(first + BAND);
                turn(self.words, self.matrix.outputs, lines.clone(), band.clone(), &mut words);
                if self.order.is_none() {
                    self.groups(&part, &band, &mut groups);
                }
                for (i, (row, words)) in band.zip(&words).enumerate() {
                    let bytes = words.map(u32::to_le_bytes);
                    let out = &mut out[(row - rows.start) * width + part.start - columns.start..][..part.len()];
                    match self.order {
                        None => self.in_order(lookup, part.start, &groups[i], bytes.as_flattened(), out),
                        Some(order) => self.by_order(order, row, part.start, bytes.as_flattened(), out),
                    }
                }
            }
        }
    }

    /// Scale and zero of each row of a band in each group that a part of its columns lies in.
    #[inline(always)]
    fn groups(&self, part: &Range<usize>, band: &Range<usize>, groups: &mut [[(f32, f32); GROUPS]; BAND]) {
        let first = part.start / self.matrix.size;
        for group in first..(part.end - 1) / self.matrix.size + 1 {
            for (groups, row) in groups.iter_mut().zip(band.clone()) {
                groups[group - first] = self.group(row, group);
            }
        }
    }

    /// A part of a row, from column `start` on, whose numbers `bytes` hold and whose groups follow one another.
    #[inline(always)]
    fn in_order(
        &self,
        lookup: impl LookUp,
        start: usize,
        groups: &[(f32, f32); GROUPS],
        bytes: &[u8],
        out: &mut [f32],
    ) {
        let first = start / self.matrix.size;
        by_group(start, self.matrix.size, out, |group, column, out| {
            let (scale, zero) = groups[group - first];
            let bytes = &bytes[(column - start) * BITS / 8..];
            match BITS {
                4 => lookup.look_up(&SIXTEEN.map(|number| scale * (number - zero)), Order::LowFirst, bytes, out),
                _ => out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = scale * (f32::from(*byte) - zero)),
            }
        });
    }

    /// A part of row `row` whose inputs are in groups by `order`.
    #[inline(always)]
    fn by_order(&self, order: &[u8], row: usize, start: usize, bytes: &[u8], out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let number = bytes[i * BITS / 8] >> (i * BITS % 8) & Self::MASK as u8;
            let (scale, zero) = self.group(row, word(order, start + i) as usize);
            *out = scale * (f32::from(number) - zero);
        }
    }

    /// Scale and zero of a group of a row.
    #[inline(always)]
    fn group(&self, row: usize, group: usize) -> (f32, f32) {
        let outputs = self.matrix.outputs;
        let packed = word(self.zeros, group * outputs.div_ceil(Self::PER_WORD) + row / Self::PER_WORD);
        let zero = (packed >> (row % Self::PER_WORD * BITS)).wrapping_add(self.matrix.zero_offset) & Self::MASK;
        (self.scales.at(group * outputs + row), zero as i32 as f32)
    }
}

impl Gptq {
    #[inline(always)]
    fn view<const BITS: usize>(&self) -> View<'_, BITS> {
        let (words, zeros, order) = (&*self.words, &*self.zeros, self.order.as_deref());
        View { matrix: self, words, zeros, scales: self.scales.view(), order }
    }
}

impl Tiles for Gptq {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        match self.bits {
            4 => self.view::<4>().tile(lookup, rows, columns, out),
            _ => self.view::<8>().tile(lookup, rows, columns, out),
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
        let (words, zeros, scales) = (&*self.words, &*self.zeros, self.scales.view());
        let (mut turned, mut groups) = ([[0; LINES]; BAND], [(0.0, 0.0); BAND]);
        for first in rows.clone().step_by(BAND) {
            let band = first..rows.end.min(first + BAND);
            let places = band.start / AWQ_WORD..band.end.div_ceil(AWQ_WORD);
            let mut start = columns.start;
            while start < columns.end {
                let group = start / self.size;
                let part = start..columns.end.min(start + LINES).min((group + 1) * self.size);
                start = part.end;
                for (of, row) in groups.iter_mut().zip(band.clone()) {
                    let zeros = word(zeros, group * stride + row / AWQ_WORD);
                    let zero = zeros >> (4 * AWQ_NIBBLES[row % AWQ_WORD]) & 15;
                    *of = (scales.at(group * self.outputs + row), zero as i32 as f32);
                }
                turn(words, stride, part.clone(), places.clone(), &mut turned);
                for (row, (scale, zero)) in band.clone().zip(groups) {
                    let (place, shift) = (row / AWQ_WORD, 4 * AWQ_NIBBLES[row % AWQ_WORD]);
                    let out = &mut out[(row - rows.start) * width + part.start - columns.start..][..part.len()];
                    for (out, word) in out.iter_mut().zip(&turned[place - places.start]) {
                        *out = scale * ((word >> shift & 15) as i32 as f32 - zero);
                    }
                }
            }
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.words, &self.zeros, &self.scales.bytes]
    }
}
