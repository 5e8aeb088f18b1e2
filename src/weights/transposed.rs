//! A matrix that is stored transposed, `[inputs, outputs]`, as GPT-2's `Conv1D` layers are.

use std::{ops::Range, sync::Arc};

use super::mapped::{ALIGN, MappedBytes, StoredMatrix};

/// A stored matrix as its transpose.
#[derive(Debug)]
pub struct TransposedMatrix {
    stored: Arc<dyn StoredMatrix>,
    /// Columns of the stored matrix: rows of this one.
    rows: usize,
}

impl TransposedMatrix {
    /// The transpose of `stored[.., rows]`.
    pub fn new(stored: Arc<dyn StoredMatrix>, rows: usize) -> Self {
        Self { stored, rows }
    }
}

impl StoredMatrix for TransposedMatrix {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        // the stored tile's columns are widened to the borders that formats need
        let band = rows.start / ALIGN * ALIGN..rows.end.next_multiple_of(ALIGN).min(self.rows);
        let mut tile = vec![0f32; columns.len() * band.len()];
        self.stored.decode(columns.clone(), band.clone(), &mut tile);
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            for (out, stored) in out.iter_mut().zip(tile[row - band.start..].iter().step_by(band.len())) {
                *out = *stored;
            }
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.stored.parts()
    }

    fn exact_in_bf16(&self) -> bool {
        self.stored.exact_in_bf16()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        kernels::{
            compute::Compute,
            oracle::{random, worst},
        },
        weights::{ModelFolder, matrix::FrozenMatrix},
    };

    #[test]
    fn products_are_those_of_the_transpose() -> candle_core::Result<()> {
        for (outputs, inputs) in [(1, 1), (40, 33), (17, 600), (600, 17), (65, 70)] {
            let (w, folder) = (random((inputs, outputs), 1), tempfile::tempdir().unwrap());
            let tensors = std::collections::HashMap::from([("w", w.clone())]);
            candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
            let stored = ModelFolder::open(folder.path()).unwrap().tensor("w").unwrap();
            let transposed = Arc::new(TransposedMatrix::new(Arc::new(stored), outputs));
            let matrix = FrozenMatrix::new(transposed, outputs, inputs, &Device::Cpu, Compute::F32);
            let plain = FrozenMatrix::of(&w.t()?.contiguous()?);
            let (x, dy) = (random((5, inputs), 2), random((5, outputs), 3));
            assert_eq!(worst(&matrix.apply(&x)?, &plain.apply(&x)?), 0.0, "{outputs} {inputs}");
            let (ours, theirs) = (x.zeros_like()?, x.zeros_like()?);
            matrix.add_backward(&ours, &dy)?;
            plain.add_backward(&theirs, &dy)?;
            assert_eq!(worst(&ours, &theirs), 0.0, "{outputs} {inputs}");
            let ids = [outputs as u32 - 1, 0];
            assert_eq!(worst(&matrix.rows(&ids)?, &plain.rows(&ids)?), 0.0);
        }
        Ok(())
    }
}
