//! compressed-tensors' "pack-quantized": four bits, stored plus 8, `(q − zero) · scale` in the type of the scales.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{LookUp, Order, SIXTEEN};
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, RUN, Tiles, by_group, word};
use crate::Result;
use crate::weights::dtype::DType;
use crate::weights::mapped::{MappedBytes, fetch};
use crate::weights::stored::StoredTensor;

/// Numbers of a word.
const PER_WORD: usize = 8;

/// Takes every packed matrix; how many there were.
pub(super) fn gather(parts: &mut Parts) -> Result<usize> {
    let modules = parts.modules(".weight_packed");
    let found = modules.len();
    for module in modules {
        let part = |suffix: &str| format!("{module}.weight_{suffix}");
        if parts.has(&part("g_idx")) {
            return Err(parts.unread(&part("g_idx"), "puts inputs into groups out of order"));
        }
        if !parts.is(&part("packed"), "I32") {
            return Err(parts.unread(&part("packed"), "is not packed in words of 32 bits (pack-quantized is)"));
        }
        let (bytes, [rows, words]) = parts.raw_matrix(&part("packed"), "I32")?;
        let stated = parts.raw(&part("shape"), "I64")?.bytes;
        let dim = |i: usize| stated.as_chunks::<8>().0.get(i).map(|dim| i64::from_le_bytes(*dim));
        let columns = dim(1).and_then(|columns| usize::try_from(columns).ok()).unwrap_or(0);
        if dim(0) != i64::try_from(rows).ok() || columns == 0 || columns.div_ceil(PER_WORD) != words {
            return Err(parts.unread(&part("shape"), "does not say what is packed in four bits"));
        }
        let (scales, shape) = parts.any_floats(&part("scale"))?;
        let groups = match shape[..] {
            [stated, groups] if stated == rows && groups > 0 && columns.is_multiple_of(groups) => groups,
            _ => return Err(parts.misfit(&part("scale"), &shape, &[rows, 1])),
        };
        let group = columns / groups;
        if groups > 1 && !group.is_multiple_of(RUN) {
            return Err(parts.unread(&part("scale"), &format!("makes groups of {group}, not multiples of {RUN}")));
        }
        let zeros = match parts.has(&part("zero_point")) {
            false => None,
            true => Some(zeros(parts, &part("zero_point"), rows, groups)?),
        };
        let matrix = Packed { dtype: scales.dtype, bytes, scales, zeros, row_bytes: words * 4, groups, group };
        let tensor = StoredTensor::new(vec![rows, columns], "packed 4 bit", Arc::new(ByTiles(matrix)));
        parts.put(format!("{module}.weight"), tensor)?;
    }
    Ok(found)
}

fn zeros(parts: &mut Parts, name: &str, rows: usize, groups: usize) -> Result<Zeros> {
    let plain = parts.is(name, "I8");
    let (format, due) = if plain { ("I8", [rows, groups]) } else { ("I32", [rows.div_ceil(PER_WORD), groups]) };
    let (bytes, stated) = parts.raw_matrix(name, format)?;
    match stated == due {
        true if plain => Ok(Zeros::Plain(bytes)),
        true => Ok(Zeros::Packed(bytes)),
        false => Err(parts.misfit(name, &stated, &due)),
    }
}

/// The codes that mean 0.
#[derive(Debug)]
enum Zeros {
    /// `[rows / 8, groups]`, packed along the rows, stored plus 8 as the numbers are.
    Packed(MappedBytes),
    /// `[rows, groups]`, bytes from -8 to 7, as compressed-tensors stored them before it packed them.
    Plain(MappedBytes),
}

impl Zeros {
    #[inline(always)]
    fn at(&self, row: usize, group: usize, groups: usize) -> f32 {
        match self {
            Self::Packed(words) => (word(words, row / PER_WORD * groups + group) >> (row % PER_WORD * 4) & 15) as f32,
            Self::Plain(bytes) => f32::from(bytes[row * groups + group].cast_signed()) + 8.0,
        }
    }

    fn bytes(&self) -> &MappedBytes {
        match self {
            Self::Packed(bytes) | Self::Plain(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Packed {
    /// Rows of bit streams.
    bytes: MappedBytes,
    /// `[rows, groups]`.
    scales: Floats,
    zeros: Option<Zeros>,
    /// What the product is rounded to.
    dtype: DType,
    row_bytes: usize,
    groups: usize,
    group: usize,
}

impl Tiles for Packed {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let scales = self.scales.view();
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.row_bytes;
            fetch(&self.bytes, below + columns.start / 2..below + columns.end / 2);
            let below = (row + rows.len()) * self.groups;
            self.scales.fetch(below + columns.start / self.group..below + columns.end.div_ceil(self.group));
            let bytes = &self.bytes[row * self.row_bytes..][..self.row_bytes];
            by_group(columns.start, self.group, out, |group, start, out| {
                let scale = scales.at(row * self.groups + group);
                let zero = self.zeros.as_ref().map_or(8.0, |zeros| zeros.at(row, group, self.groups));
                let values = lookup.rounded(self.dtype, SIXTEEN.map(|code| (code - zero) * scale));
                lookup.look_up(&values, Order::LowFirst, &bytes[start / 2..], out);
            });
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        [&self.bytes, &self.scales.bytes].into_iter().chain(self.zeros.as_ref().map(Zeros::bytes)).collect()
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }
}
