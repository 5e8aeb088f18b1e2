//! FP8 (e4m3) with a scale for the whole matrix, for each row, or for each block of it: `q · scale`, in the type of the
//! scales.

use std::sync::Arc;

use super::parts::{Floats, Parts};
use super::runs::{ByRuns, RUN, Runs};
use crate::Result;
use crate::weights::dtype::DType;
use crate::weights::mapped::MappedBytes;
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
        // without a stated size, blocks are even
        let block = match block {
            Some(block) if grid != [1, 1] && grid != [rows, 1] => block,
            _ => [rows.div_ceil(grid[0]), columns.div_ceil(grid[1])],
        };
        let covered = rows.div_ceil(block[0]) == grid[0] && columns.div_ceil(block[1]) == grid[1];
        if !covered || (grid[1] > 1 && !block[1].is_multiple_of(RUN)) {
            return Err(parts.misfit(&scales_name, &shape, &[rows.div_ceil(block[0]), columns.div_ceil(block[1])]));
        }
        let matrix = Fp8 { bytes, dtype: scales.dtype, scales, values: values(), across: grid[1], block, columns };
        parts.put(name, StoredTensor::new(vec![rows, columns], "fp8 e4m3", Arc::new(ByRuns(matrix))))?;
        parts.drop_part(&format!("{module}.input_scale"));
        found += 1;
    }
    Ok(found)
}

/// The 256 values: a sign, four bits of exponent biased by 7, three of mantissa; all ones mean NaN, none infinity.
fn values() -> Box<[f32; 256]> {
    let value = |byte: usize| {
        let (exponent, mantissa) = (byte >> 3 & 15, (byte & 7) as f32);
        let size = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 8.0 * 0.5f32.powi(6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent as i32 - 7),
        };
        if byte < 128 { size } else { -size }
    };
    Box::new(std::array::from_fn(value))
}

#[derive(Debug)]
struct Fp8 {
    bytes: MappedBytes,
    /// `[down, across]`.
    scales: Floats,
    values: Box<[f32; 256]>,
    /// What the product is rounded to.
    dtype: DType,
    across: usize,
    /// Rows and columns under one scale.
    block: [usize; 2],
    columns: usize,
}

impl Runs for Fp8 {
    #[inline(always)]
    fn run(&self, row: usize, start: usize, out: &mut [f32]) {
        let scale = self.scales.at(row / self.block[0] * self.across + start / self.block[1]);
        for (out, byte) in out.iter_mut().zip(&self.bytes[row * self.columns + start..]) {
            *out = self.dtype.round(self.values[usize::from(*byte)] * scale);
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes, &self.scales.bytes]
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }
}
