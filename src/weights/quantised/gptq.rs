//! GPTQ (Frantar et al. 2022), 4 and 8 bit: `scale · (q − zero)` in groups of inputs.
//!
//! The matrix is stored with its inputs outermost, packed along them; they may be in groups in any order (act-order).

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
pub(super) const BAND: usize = 32;

/// Most groups in a part of a row whose words are turned at once.
const GROUPS: usize = LINES * 8 / RUN;

/// Scales and zeros of a band of rows in one group.
#[derive(Clone, Copy, Default)]
pub(super) struct Group {
    scales: [f32; BAND],
    zeros: [f32; BAND],
}

impl Group {
    /// Reads those of `band`, of which `scales` lie together from row 0 at `from` on.
    #[inline(always)]
    pub fn read(&mut self, scales: &parts::View, from: usize, band: Range<usize>, zero: impl Fn(usize) -> f32) {
        scales.read(from + band.start, &mut self.scales[..band.len()]);
        self.zeros.iter_mut().zip(band).for_each(|(out, row)| *out = zero(row));
    }

    /// Scale and zero of row `i` of the band.
    #[inline(always)]
    pub fn of(&self, i: usize) -> (f32, f32) {
        (self.scales[i], self.zeros[i])
    }
}

/// Takes every GPTQ matrix; how many there were.
pub(super) fn gather(section: &Keys, parts: &mut Parts) -> Result<usize> {
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

pub(super) fn scales(parts: &mut Parts, module: &str, outputs: usize) -> Result<(Floats, usize)> {
    let name = format!("{module}.scales");
    let (scales, shape) = parts.any_floats(&name)?;
    match shape[..] {
        [groups, stated] if groups > 0 && stated == outputs => Ok((scales, groups)),
        _ => Err(parts.misfit(&name, &shape, &[1, outputs])),
    }
}

pub(super) fn zeros(parts: &mut Parts, module: &str, due: [usize; 2]) -> Result<MappedBytes> {
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
        let (mut words, mut groups) = ([0; LINES * BAND], [Group::default(); GROUPS]);
        for part in columns.clone().step_by(LINES * Self::PER_WORD) {
            let part = part..columns.end.min(part + LINES * Self::PER_WORD);
            let lines = part.start / Self::PER_WORD..part.end.div_ceil(Self::PER_WORD);
            for first in rows.clone().step_by(BAND) {
                let band = first..rows.end.min(first + BAND);
                if self.order.is_none() {
                    let numbers = part.start / self.matrix.size..(part.end - 1) / self.matrix.size + 1;
                    for (group, number) in groups.iter_mut().zip(numbers) {
                        let zero = |row| self.zero(row, number);
                        group.read(&self.scales, number * self.matrix.outputs, band.clone(), zero);
                    }
                }
                let turned = turn(&self.matrix.words, self.matrix.outputs, lines.clone(), band.clone(), &mut words);
                for (i, (row, words)) in band.zip(turned).enumerate() {
                    let mut bytes = [[0; 4]; LINES];
                    bytes.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
                    let out = &mut out[(row - rows.start) * width + part.start - columns.start..][..part.len()];
                    match self.order {
                        None => self.in_order(lookup, part.start, (&groups, i), bytes.as_flattened(), out),
                        Some(order) => self.by_order(order, row, part.start, bytes.as_flattened(), out),
                    }
                }
            }
        }
    }

    /// A part of row `i` of a band, from column `start` on, whose numbers `bytes` hold and whose groups follow one another.
    #[inline(always)]
    fn in_order(
        &self,
        lookup: impl LookUp,
        start: usize,
        (groups, i): (&[Group; GROUPS], usize),
        bytes: &[u8],
        out: &mut [f32],
    ) {
        let first = start / self.matrix.size;
        by_group(start, self.matrix.size, out, |group, column, out| {
            let (scale, zero) = groups[group - first].of(i);
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
            let group = word(order, start + i) as usize;
            let scale = self.scales.at(group * self.matrix.outputs + row);
            *out = scale * (f32::from(number) - self.zero(row, group));
        }
    }

    #[inline(always)]
    fn zero(&self, row: usize, group: usize) -> f32 {
        let words = self.matrix.outputs.div_ceil(Self::PER_WORD);
        let packed = word(self.zeros, group * words + row / Self::PER_WORD) >> (row % Self::PER_WORD * BITS);
        (packed.wrapping_add(self.matrix.zero_offset) & Self::MASK) as i32 as f32
    }
}

impl Gptq {
    #[inline(always)]
    fn view<const BITS: usize>(&self) -> View<'_, BITS> {
        let (zeros, order) = (&*self.zeros, self.order.as_deref());
        View { matrix: self, zeros, scales: self.scales.view(), order }
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
