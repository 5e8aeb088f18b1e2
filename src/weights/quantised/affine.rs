//! MLX's affine quantisation: `scale · q + bias` in groups of a row, computed in the type of the scales.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{LookUp, Order, SIXTEEN};
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, Tiles, by_group, unpack};
use crate::Result;
use crate::keys::Keys;
use crate::weights::dtype::DType;
use crate::weights::mapped::{MappedBytes, fetch};
use crate::weights::stored::StoredTensor;

/// Numbers in the largest group.
const MOST: usize = 128;

/// Takes every matrix that has scales and biases; how many there were.
pub(super) fn gather(section: &Keys, parts: &mut Parts) -> Result<usize> {
    let modules: Vec<String> = parts.modules(".scales");
    let found = modules.len();
    for module in modules {
        // a module may have a setting of its own
        let own = section.raw(&module).filter(|own| own.is_object());
        let own = own.map(|_| section.object(&module)).transpose()?.flatten();
        let keys = own.as_ref().unwrap_or(section);
        if let Some(mode) = keys.text("mode")?.or(section.text("mode")?).filter(|mode| *mode != "affine") {
            return Err(keys.bad("mode", &format!("{mode:?} is not read; affine is")));
        }
        let bits = match keys.size("bits")? {
            bits @ (2 | 3 | 4 | 6 | 8) => bits,
            other => return Err(keys.bad("bits", &format!("{other} is not read; 2, 3, 4, 6 and 8 are"))),
        };
        let group = match keys.size("group_size")? {
            group @ (32 | 64 | MOST) => group,
            other => return Err(keys.bad("group_size", &format!("{other} is not read; 32, 64 and 128 are"))),
        };
        let name = format!("{module}.weight");
        let (bytes, [rows, words]) = parts.raw_matrix(&name, "U32")?;
        let columns = words * 32 / bits;
        if words * 32 % bits != 0 || !columns.is_multiple_of(group) {
            let reason = format!("has {words} words a row, which are no groups of {group} numbers of {bits} bits");
            return Err(parts.bad(&name, &reason));
        }
        let shape = [rows, columns / group];
        let scales = parts.floats(&format!("{module}.scales"), &shape)?;
        let biases = parts.floats(&format!("{module}.biases"), &shape)?;
        if biases.dtype != scales.dtype {
            return Err(parts.bad(&format!("{module}.biases"), "is of another type than the scales"));
        }
        let matrix = Affine { dtype: scales.dtype, bytes, scales, biases, row_bytes: words * 4, bits, group };
        let tensor = StoredTensor::new(vec![rows, columns], format!("mlx {bits} bit"), Arc::new(ByTiles(matrix)));
        parts.put(name, tensor)?;
    }
    Ok(found)
}

#[derive(Debug)]
struct Affine {
    /// Rows of bit streams.
    bytes: MappedBytes,
    /// `[rows, groups]`.
    scales: Floats,
    /// `[rows, groups]`.
    biases: Floats,
    /// What every product and every sum is rounded to.
    dtype: DType,
    row_bytes: usize,
    bits: usize,
    group: usize,
}

impl Tiles for Affine {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let groups = self.row_bytes * 8 / self.bits / self.group;
        let (scales, biases) = (self.scales.view(), self.biases.view());
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.row_bytes;
            fetch(&self.bytes, below + columns.start * self.bits / 8..below + columns.end * self.bits / 8);
            let below = (row + rows.len()) * groups;
            let below = below + columns.start / self.group..below + columns.end.div_ceil(self.group);
            self.scales.fetch(below.clone());
            self.biases.fetch(below);
            let bytes = &self.bytes[row * self.row_bytes..][..self.row_bytes];
            by_group(columns.start, self.group, out, |group, start, out| {
                let (scale, bias) = (scales.at(row * groups + group), biases.at(row * groups + group));
                let bytes = &bytes[start * self.bits / 8..];
                if self.bits == 4 {
                    let scaled = lookup.rounded(self.dtype, SIXTEEN.map(|code| code * scale));
                    let values = lookup.rounded(self.dtype, scaled.map(|scaled| scaled + bias));
                    return lookup.look_up(&values, Order::LowFirst, bytes, out);
                }
                let mut codes = [0; MOST];
                let codes = match self.bits {
                    8 => bytes,
                    bits => {
                        unpack(bits, bytes, &mut codes[..out.len()]);
                        &codes
                    }
                };
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(*code) * scale);
                self.dtype.round_all(out);
                out.iter_mut().for_each(|number| *number += bias);
                self.dtype.round_all(out);
            });
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes, &self.scales.bytes, &self.biases.bytes]
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }
}
