//! FP8 (e4m3) with a scale for the whole matrix, for each row, or for each block of it: `q · scale`, in the type of the
//! scales.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::LookUp;
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, RUN, Tiles, by_group};
use crate::Result;
use crate::weights::dtype::DType;
use crate::weights::mapped::{MappedBytes, fetch};
use crate::weights::stored::StoredTensor;

/// Takes every matrix of F8_E4M3; how many there were. `suffix` ends the name of its scales; `block` is the size of
/// blocks where the config states it.
pub(super) fn gather(parts: &mut Parts, suffix: &str, block: Option<[usize; 2]>) -> Result<usize> {
    let mut found = 0;
    for module in parts.modules(".weight") {
        let name = format!("{module}.weight");
        if !parts.is(&name, "F8_E4M3") {
            continue;
        }
        let (bytes, [rows, columns]) = parts.raw_matrix(&name, "F8_E4M3")?;
        let scales_name = format!("{module}.{suffix}");
        let (scales, shape) = parts.any_floats(&scales_name)?;
        let grid = match shape[..] {
            [] | [1] => [1, 1],
            [down, across] if down > 0 && across > 0 => [down, across],
            [down] if down == rows => [down, 1],
            _ => return Err(parts.misfit(&scales_name, &shape, &[rows, 1])),
        };
        // all of it, whole rows, or equal parts of each; blocks that rows share may be cut off at an edge, so their
        // size is stated
        let block = match block {
            _ if grid == [1, 1] => [rows, columns],
            Some(block) if grid != [rows, 1] => block,
            _ if grid[0] == rows && columns.is_multiple_of(grid[1]) => [1, columns / grid[1]],
            _ => return Err(parts.misfit(&scales_name, &shape, &[rows, 1])),
        };
        let covered = rows.div_ceil(block[0]) == grid[0] && columns.div_ceil(block[1]) == grid[1];
        if !covered || (grid[1] > 1 && !block[1].is_multiple_of(RUN)) {
            return Err(parts.misfit(&scales_name, &shape, &[rows.div_ceil(block[0]), columns.div_ceil(block[1])]));
        }
        let matrix = Fp8 { bytes, dtype: scales.dtype, scales, across: grid[1], block, columns };
        parts.put(name, StoredTensor::new(vec![rows, columns], "fp8 e4m3", Arc::new(ByTiles(matrix))))?;
        parts.drop_part(&format!("{module}.input_scale"));
        found += 1;
    }
    Ok(found)
}

/// A sign, four bits of exponent biased by 7, three of mantissa; all ones mean NaN, none infinity.
#[inline(always)]
fn value(byte: u8) -> f32 {
    let fields = u32::from(byte & 0x7f);
    // exponent and mantissa at a single's places, and the difference of the biases
    let number = f32::from_bits((fields << 20) + (120 << 23));
    // without an exponent there is no leading one
    let number = if fields < 8 { fields as f32 * 0.5f32.powi(9) } else { number };
    let number = if fields == 0x7f { f32::NAN } else { number };
    f32::from_bits(number.to_bits() | u32::from(byte & 0x80) << 24)
}

#[derive(Debug)]
struct Fp8 {
    bytes: MappedBytes,
    /// `[down, across]`.
    scales: Floats,
    /// What the product is rounded to.
    dtype: DType,
    across: usize,
    /// Rows and columns under one scale.
    block: [usize; 2],
    columns: usize,
}

impl Tiles for Fp8 {
    #[inline(always)]
    fn tile(&self, _: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.columns;
            fetch(&self.bytes, below + columns.start..below + columns.end);
            let bytes = &self.bytes[row * self.columns..][..self.columns];
            by_group(columns.start, self.block[1], out, |block, start, out| {
                let scale = self.scales.at(row / self.block[0] * self.across + block);
                out.iter_mut().zip(&bytes[start..]).for_each(|(out, byte)| *out = value(*byte) * scale);
                self.dtype.round_all(out);
            });
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes, &self.scales.bytes]
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_sign_exponent_and_mantissa() {
        for byte in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
            let size = match (exponent, byte & 7) {
                (15, 7) => f32::NAN,
                (0, _) => mantissa * 0.5f32.powi(6),
                _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
            };
            let expected = if byte < 128 { size } else { -size };
            assert_eq!(value(byte).to_bits(), expected.to_bits(), "{byte:#04x}");
        }
    }
}
