//! A frozen matrix that multiplies without a copy of itself: on the CPU it decodes panels straight from the map.

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, DType as Kind, Device, InplaceOp2, Layout, Tensor, bail};
use rayon::prelude::*;

use super::mapped::{ALIGN, MappedBytes, StoredMatrix};
use crate::{
    Result,
    kernels::{
        gemm::{Lhs, Out, Rhs, Threads, gemm},
        host::{floats, matrix, operand, operand_mut},
    },
};

/// A matrix `[outputs, inputs]` that never learns.
#[derive(Debug, Clone)]
pub struct FrozenMatrix {
    place: Place,
    /// Rows: what it computes.
    pub outputs: usize,
    /// Columns: what it takes.
    pub inputs: usize,
}

#[derive(Debug, Clone)]
enum Place {
    /// In its file, for the CPU.
    Mapped(Arc<dyn StoredMatrix>),
    /// On an accelerator, in the type it has on disk.
    Device(Tensor),
}

impl FrozenMatrix {
    /// A matrix `[outputs, inputs]` as it is stored, uploaded unless `device` is the CPU.
    pub fn new(stored: Arc<dyn StoredMatrix>, outputs: usize, inputs: usize, device: &Device) -> Result<Self> {
        let place = match device.is_cpu() {
            true => Place::Mapped(stored),
            false => Place::Device(stored.upload(outputs, inputs, device)?),
        };
        Ok(Self { place, outputs, inputs })
    }

    /// Asks the system to read the matrix ahead.
    pub fn will_need(&self) {
        self.each_part(|part| part.will_need());
    }

    /// Lets go of the matrix's pages.
    pub fn done_with(&self) {
        self.each_part(|part| part.done_with());
    }

    fn each_part(&self, act: impl Fn(&MappedBytes)) {
        if let Place::Mapped(w) = &self.place {
            w.parts().into_iter().for_each(act);
        }
    }

    /// `x[tokens, inputs] · Wᵀ`: `[tokens, outputs]`.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match &self.place {
            Place::Device(w) => x.matmul(&w.to_dtype(x.dtype())?.t()?),
            Place::Mapped(w) => {
                let (tokens, inputs) = x.dims2()?;
                if inputs != self.inputs {
                    bail!("x {:?} does not fit a matrix of {} inputs", x.shape(), self.inputs);
                }
                let x = floats(x)?;
                let mut y = vec![0f32; tokens * self.outputs];
                let side = Transposed { w: &**w };
                let out = Out { data: &mut y, ld: self.outputs, add: false };
                let x = Lhs { data: &x, row: inputs, col: 1 };
                gemm([tokens, self.outputs, inputs], 1.0, x, &side, out, Threads::All);
                matrix(y, tokens, self.outputs)
            }
        }
    }

    /// `dx[tokens, inputs] += dy[tokens, outputs] · W`, in place.
    pub fn add_backward(&self, dx: &Tensor, dy: &Tensor) -> candle_core::Result<()> {
        match &self.place {
            Place::Device(w) => dx.slice_set(&(dx + dy.matmul(&w.to_dtype(dy.dtype())?)?)?, 0, 0),
            Place::Mapped(w) => dx.inplace_op2(dy, &Straight { w: &**w, outputs: self.outputs, inputs: self.inputs }),
        }
    }

    /// The rows `ids`, as f32: `[ids, inputs]`. Every id is below `outputs`.
    pub fn rows(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        match &self.place {
            Place::Device(w) => w.index_select(&Tensor::new(ids, w.device())?, 0)?.to_dtype(Kind::F32),
            Place::Mapped(w) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= self.outputs) {
                    bail!("row {id} of a matrix of {} rows", self.outputs);
                }
                let mut rows = vec![0f32; ids.len() * self.inputs];
                rows.par_chunks_mut(self.inputs).zip(ids).for_each(|(row, &id)| {
                    let id = id as usize;
                    w.decode(id..id + 1, 0..self.inputs, row);
                });
                matrix(rows, ids.len(), self.inputs)
            }
        }
    }
}

/// The matrix as the right-hand side `[inputs, outputs]` of the forward product.
struct Transposed<'a> {
    w: &'a dyn StoredMatrix,
}

impl Rhs for Transposed<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [f32]) {
        let steps = k.len();
        let mut rows = vec![0f32; nr * steps];
        for (panel, start) in out.chunks_exact_mut(nr * steps).zip(n.clone().step_by(nr)) {
            let width = nr.min(n.end - start);
            rows[width * steps..].fill(0.0);
            self.w.decode(start..start + width, k.clone(), &mut rows[..width * steps]);
            transpose(&rows, nr, steps, panel);
        }
    }
}

/// `to[columns][rows] = from[rows][columns]`, by tiles that stay in the first-level cache.
fn transpose(from: &[f32], rows: usize, columns: usize, to: &mut [f32]) {
    const TILE: usize = 16;
    for c in (0..columns).step_by(TILE) {
        for r in (0..rows).step_by(TILE) {
            for c in c..columns.min(c + TILE) {
                let to = &mut to[c * rows..][r..rows.min(r + TILE)];
                for (to, from) in to.iter_mut().zip(from[r * columns + c..].iter().step_by(columns)) {
                    *to = *from;
                }
            }
        }
    }
}

/// The matrix as the right-hand side `[outputs, inputs]` of the backward product.
struct Straight<'a> {
    w: &'a dyn StoredMatrix,
    outputs: usize,
    inputs: usize,
}

impl Rhs for Straight<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [f32]) {
        // formats decode whole blocks of columns: the run is widened to their borders
        let columns = n.start / ALIGN * ALIGN..n.end.next_multiple_of(ALIGN).min(self.inputs);
        let mut row = vec![0f32; (columns.len() + nr).next_multiple_of(nr)];
        for (step, p) in k.clone().enumerate() {
            self.w.decode(p..p + 1, columns.clone(), &mut row[..columns.len()]);
            for (panel, row) in out.chunks_exact_mut(nr * k.len()).zip(row[n.start - columns.start..].chunks_exact(nr))
            {
                panel[step * nr..][..nr].copy_from_slice(row);
            }
        }
    }
}

impl InplaceOp2 for Straight<'_> {
    fn name(&self) -> &'static str {
        "frozen-backward"
    }

    fn cpu_fwd(&self, dx: &mut CpuStorage, dx_at: &Layout, dy: &CpuStorage, dy_at: &Layout) -> candle_core::Result<()> {
        let ((tokens, inputs), (rows, outputs)) = (dx_at.shape().dims2()?, dy_at.shape().dims2()?);
        if inputs != self.inputs || rows != tokens || outputs != self.outputs {
            bail!("dx {:?} and dy {:?} do not fit the matrix", dx_at.shape(), dy_at.shape());
        }
        let dy = Lhs { data: operand(dy, dy_at)?, row: outputs, col: 1 };
        let out = Out { data: operand_mut(dx, dx_at)?, ld: inputs, add: true };
        gemm([tokens, inputs, outputs], 1.0, dy, self, out, Threads::All);
        Ok(())
    }
}

#[cfg(test)]
impl FrozenMatrix {
    /// A tensor `[outputs, inputs]`, by way of a file that is mapped.
    pub(crate) fn of(tensor: &Tensor) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tensors = std::collections::HashMap::from([("w", tensor.clone())]);
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let mapped = super::ModelFolder::open(folder.path()).unwrap().tensor("w").unwrap();
        let (outputs, inputs) = tensor.dims2().unwrap();
        Self::new(Arc::new(mapped), outputs, inputs, &Device::Cpu).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{random, worst};

    const TYPES: [Kind; 3] = [Kind::F32, Kind::F16, Kind::BF16];

    /// The same numbers mapped, on a device, and as a plain f32 tensor.
    fn both(outputs: usize, inputs: usize, dtype: Kind) -> ([FrozenMatrix; 2], Tensor) {
        let w = random((outputs, inputs), 1).to_dtype(dtype).unwrap();
        let device = FrozenMatrix { place: Place::Device(w.clone()), outputs, inputs };
        ([FrozenMatrix::of(&w), device], w.to_dtype(Kind::F32).unwrap())
    }

    #[test]
    fn products_equal_those_of_a_plain_tensor() -> candle_core::Result<()> {
        for dtype in TYPES {
            for (outputs, inputs) in [(1, 1), (40, 33), (17, 600), (600, 17)] {
                let (matrices, w) = both(outputs, inputs, dtype);
                for w_ours in &matrices {
                    let (x, dy) = (random((5, inputs), 2), random((5, outputs), 3));
                    let y = w_ours.apply(&x)?;
                    assert!(worst(&y, &x.matmul(&w.t()?)?) < 2e-6 * inputs as f64, "{dtype:?} {outputs} {inputs}");
                    // a view in the middle of a larger tensor, whose neighbours stay as they are
                    let whole = random((7, inputs), 4);
                    let (before, dx) = (whole.copy()?, whole.narrow(0, 1, 5)?);
                    w_ours.add_backward(&dx, &dy)?;
                    let expected = (before.narrow(0, 1, 5)? + dy.matmul(&w)?)?;
                    assert!(worst(&dx, &expected) < 2e-6 * outputs as f64, "{dtype:?} {outputs} {inputs}");
                    for edge in [0, 6] {
                        assert_eq!(worst(&whole.narrow(0, edge, 1)?, &before.narrow(0, edge, 1)?), 0.0);
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn rows_are_exact() -> candle_core::Result<()> {
        for dtype in TYPES {
            let (matrices, w) = both(9, 31, dtype);
            for matrix in &matrices {
                let rows = matrix.rows(&[8, 0, 3, 3])?;
                assert_eq!(worst(&rows, &w.index_select(&Tensor::new(&[8u32, 0, 3, 3], &Device::Cpu)?, 0)?), 0.0);
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ([matrix, _], _) = both(9, 31, Kind::F32);
        assert!(matrix.apply(&random((2, 30), 1)).is_err());
        assert!(matrix.add_backward(&random((2, 30), 1), &random((2, 9), 2)).is_err());
        assert!(matrix.add_backward(&random((2, 31), 1), &random((3, 9), 2)).is_err());
        assert!(matrix.rows(&[9]).is_err());
    }
}
