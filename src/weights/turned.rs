//! A matrix that is stored turned, `[inputs, outputs]`, as GPT-2's `Conv1D` layers are.

use std::{
    cell::RefCell,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::mapped::{ALIGN, MappedBytes, StoredMatrix};

/// A stored matrix as its transpose.
#[derive(Debug)]
pub struct Turned {
    stored: Arc<dyn StoredMatrix>,
    /// Columns of the stored matrix: rows of this one.
    rows: usize,
    /// No other has it.
    id: u64,
}

/// A decoded tile of the stored matrix. A product of the backward pass asks for one row after the other, and a row's
/// neighbours lie beside it: the tile of one serves the next.
#[derive(Default)]
struct Tile {
    /// Whose it is, and its columns and rows there.
    of: Option<(u64, Range<usize>, Range<usize>)>,
    values: Vec<f32>,
}

thread_local! {
    static TILE: RefCell<Tile> = RefCell::default();
}

impl Turned {
    /// The transpose of `stored[.., rows]`.
    pub fn new(stored: Arc<dyn StoredMatrix>, rows: usize) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        Self { stored, rows, id: IDS.fetch_add(1, Ordering::Relaxed) }
    }
}

impl StoredMatrix for Turned {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        // the stored tile's columns are widened to the borders that formats need
        let band = rows.start / ALIGN * ALIGN..rows.end.next_multiple_of(ALIGN).min(self.rows);
        let width = columns.len();
        TILE.with_borrow_mut(|tile| {
            let wanted = Some((self.id, band.clone(), columns.clone()));
            if tile.of != wanted {
                tile.values.resize(width * band.len(), 0.0);
                self.stored.decode(columns, band.clone(), &mut tile.values);
                tile.of = wanted;
            }
            for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
                for (out, stored) in out.iter_mut().zip(tile.values[row - band.start..].iter().step_by(band.len())) {
                    *out = *stored;
                }
            }
        });
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.stored.parts()
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
            let turned = Arc::new(Turned::new(Arc::new(stored), outputs));
            let matrix = FrozenMatrix::new(turned, outputs, inputs, &Device::Cpu, Compute::F32).unwrap();
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
