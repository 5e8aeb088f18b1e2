//! GPTQ (Frantar et al. 2022), 4 and 8 bit: `scale · (q − zero)` in groups of inputs.
//!
//! The matrix is stored with its inputs outermost, packed along them; they may be in groups in any order (act-order).

use std::cell::Cell;
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

/// Most columns in such a part.
const PART: usize = LINES * 8;

thread_local! {
    /// Scales and zeros of a band in the groups of a tile, as they are read and by row: room for the next tile.
    static TABLES: Cell<(Vec<[u8; 4]>, Vec<u32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// Scales and zeros of a band of rows in one group.
#[derive(Clone, Copy, Default)]
pub(super) struct Group {
    scales: [f32; BAND],
    zeros: [f32; BAND],
}

impl Group {
    /// Reads the scales of so many rows, which lie together from `from` on; their zeros are to be filled in.
    #[inline(always)]
    pub fn read(&mut self, scales: &parts::View, from: usize, rows: usize) -> &mut [f32] {
        scales.read(from, &mut self.scales[..rows]);
        &mut self.zeros[..rows]
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
        let order = match parts.has(&name) {
            true => group_order(parts, &name, inputs, groups)?,
            false => None,
        };
        let size = match order {
            Some(_) => inputs.div_ceil(groups),
            None => group_size(section, parts, &module, inputs, groups)?,
        };
        let matrix = Gptq { words, zeros, scales, order, size, bits, zero_offset, outputs };
        let tensor = StoredTensor::new(vec![outputs, inputs], format!("gptq {bits} bit"), Arc::new(ByTiles(matrix)));
        parts.put(format!("{module}.weight"), tensor)?;
    }
    Ok(found)
}

/// The inputs of a group, where they are in order: equal parts of all of them.
pub(super) fn group_size(section: &Keys, parts: &Parts, module: &str, inputs: usize, groups: usize) -> Result<usize> {
    let size = inputs.div_ceil(groups);
    // 4 groups of 128 inputs stated as 40 are 40, 40, 40 and 8, not 4 times 32
    let stated = section.number("group_size")?.or(section.number("q_group_size")?).filter(|stated| *stated >= 1.0);
    let stated = stated.map(|stated| stated as usize).filter(|stated| inputs.div_ceil(*stated) == groups);
    let uneven = !inputs.is_multiple_of(groups) || stated.is_some_and(|stated| stated != size);
    match groups {
        1 => Ok(size),
        _ if uneven => Err(parts.unread(&format!("{module}.scales"), "makes groups of different sizes")),
        _ if size.is_multiple_of(RUN) => Ok(size),
        _ => Err(parts.unread(&format!("{module}.scales"), &format!("makes groups of {size}, not multiples of {RUN}"))),
    }
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
fn group_order(parts: &mut Parts, name: &str, inputs: usize, groups: usize) -> Result<Option<MappedBytes>> {
    let raw = parts.raw(name, "I32")?;
    if raw.shape != [inputs] {
        return Err(parts.misfit(name, &raw.shape, &[inputs]));
    }
    if let Some(at) = (0..inputs).find(|i| word(&raw.bytes, *i) as usize >= groups) {
        return Err(parts.bad(name, &format!("sends input {at} to a group beyond the {groups} that there are")));
    }
    let size = inputs.div_ceil(groups);
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
}

impl<const BITS: usize> View<'_, BITS> {
    const PER_WORD: usize = 32 / BITS;
    const MASK: u32 = (1 << BITS) - 1;

    /// Rows and columns, whose groups follow one another.
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let width = columns.len();
        let (mut words, mut groups) = ([0; LINES * BAND], [Group::default(); GROUPS]);
        for part in columns.clone().step_by(LINES * Self::PER_WORD) {
            let part = part..columns.end.min(part + LINES * Self::PER_WORD);
            let lines = part.start / Self::PER_WORD..part.end.div_ceil(Self::PER_WORD);
            for first in rows.clone().step_by(BAND) {
                let band = first..rows.end.min(first + BAND);
                let numbers = part.start / self.matrix.size..(part.end - 1) / self.matrix.size + 1;
                for (group, number) in groups.iter_mut().zip(numbers) {
                    self.read(group, number, band.clone());
                }
                let turned = turn(&self.matrix.words, self.matrix.outputs, lines.clone(), band.clone(), &mut words);
                for (i, (row, words)) in band.zip(turned).enumerate() {
                    let mut bytes = [[0; 4]; LINES];
                    bytes.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
                    let out = &mut out[(row - rows.start) * width + part.start - columns.start..][..part.len()];
                    self.part(lookup, part.start, (&groups, i), bytes.as_flattened(), out);
                }
            }
        }
    }

    /// A part of row `i` of a band, from column `start` on, whose numbers `bytes` hold.
    #[inline(always)]
    fn part(
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

    /// As [`View::tile`], where inputs are in groups by `order`: scales and zeros are picked column by column out of
    /// those that the row has.
    #[inline(always)]
    fn tile_by_order(
        &self,
        lookup: impl LookUp,
        order: &[u8],
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [f32],
    ) {
        let width = columns.len();
        let numbers = columns.clone().map(|column| word(order, column) as usize);
        let (least, most) = numbers.fold((usize::MAX, 0), |(least, most), n| (least.min(n), most.max(n)));
        let count = most + 1 - least;
        let mut words = [0; LINES * BAND];
        let mut places = [0; PART];
        let (mut read, mut tables) = TABLES.take();
        read.resize(2 * count * BAND, [0; 4]);
        tables.resize(2 * count * BAND, 0);
        for first in rows.clone().step_by(BAND) {
            let band = first..rows.end.min(first + BAND);
            let (of_scales, of_zeros) = read.split_at_mut(count * BAND);
            let groups = of_scales.as_chunks_mut::<BAND>().0.iter_mut().zip(of_zeros.as_chunks_mut::<BAND>().0);
            for (number, (scales, zeros)) in (least..=most).zip(groups) {
                let mut group = Group::default();
                self.read(&mut group, number, band.clone());
                (*scales, *zeros) = (group.scales.map(f32::to_le_bytes), group.zeros.map(f32::to_le_bytes));
            }
            // a row's scales, and behind them its zeros
            let lines = 0..2 * count;
            turn(read.as_flattened(), BAND, lines, 0..band.len(), &mut tables).for_each(drop);
            for start in columns.clone().step_by(LINES * Self::PER_WORD) {
                let part = start..columns.end.min(start + LINES * Self::PER_WORD);
                let n = part.len();
                places
                    .iter_mut()
                    .zip(part.clone())
                    .for_each(|(place, column)| *place = word(order, column) - least as u32);
                let lines = part.start / Self::PER_WORD..part.end.div_ceil(Self::PER_WORD);
                let turned = turn(&self.matrix.words, self.matrix.outputs, lines, band.clone(), &mut words);
                for ((row, words), table) in band.clone().zip(turned).zip(tables.chunks_exact(2 * count)) {
                    let mut bytes = [[0; 4]; LINES];
                    bytes.iter_mut().zip(words).for_each(|(bytes, word)| *bytes = word.to_le_bytes());
                    let bytes = bytes.as_flattened();
                    let out = &mut out[(row - rows.start) * width + start - columns.start..][..n];
                    match BITS {
                        4 => lookup.look_up(&SIXTEEN, Order::LowFirst, bytes, out),
                        _ => out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = f32::from(*byte)),
                    }
                    let (scales, zeros) = table.split_at(count);
                    lookup.scale_by_place([scales, zeros], &places[..n], out);
                }
            }
        }
        TABLES.set((read, tables));
    }

    /// Scales and zeros of a band in a group.
    #[inline(always)]
    fn read(&self, group: &mut Group, number: usize, band: Range<usize>) {
        let zeros = group.read(&self.scales, number * self.matrix.outputs + band.start, band.len());
        let words = number * self.matrix.outputs.div_ceil(Self::PER_WORD);
        // whole words, for which this is vector code
        let whole = if band.start.is_multiple_of(Self::PER_WORD) { band.len() / Self::PER_WORD } else { 0 };
        let (front, rest) = zeros.split_at_mut(whole * Self::PER_WORD);
        for (i, zeros) in front.chunks_exact_mut(Self::PER_WORD).enumerate() {
            let packed = word(self.zeros, words + band.start / Self::PER_WORD + i);
            zeros.iter_mut().enumerate().for_each(|(lane, out)| *out = self.zero(packed, lane));
        }
        for (row, out) in (band.start + front.len()..).zip(rest) {
            *out = self.zero(word(self.zeros, words + row / Self::PER_WORD), row % Self::PER_WORD);
        }
    }

    /// Zero `lane` of a word.
    #[inline(always)]
    fn zero(&self, packed: u32, lane: usize) -> f32 {
        ((packed >> (lane * BITS)).wrapping_add(self.matrix.zero_offset) & Self::MASK) as i32 as f32
    }
}

impl Gptq {
    #[inline(always)]
    fn view<const BITS: usize>(&self) -> View<'_, BITS> {
        View { matrix: self, zeros: &self.zeros, scales: self.scales.view() }
    }
}

impl Tiles for Gptq {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        match (self.bits, self.order.as_deref()) {
            (4, None) => self.view::<4>().tile(lookup, rows, columns, out),
            (4, Some(order)) => self.view::<4>().tile_by_order(lookup, order, rows, columns, out),
            (_, None) => self.view::<8>().tile(lookup, rows, columns, out),
            (_, Some(order)) => self.view::<8>().tile_by_order(lookup, order, rows, columns, out),
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        let order = self.order.iter();
        [&self.words, &self.zeros, &self.scales.bytes].into_iter().chain(order).collect()
    }
}
