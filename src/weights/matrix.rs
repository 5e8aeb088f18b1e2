//! A frozen matrix that multiplies without a copy of itself: on the CPU it decodes panels straight from the map.

use std::sync::Arc;

use candle_core::{Device, Tensor, bail};
use rayon::prelude::*;

use super::{
    conveyor::Memory,
    mapped::{MappedBytes, StoredMatrix},
    resident::Resident,
    upload::Uploader,
};
use crate::kernels::{
    compute::Compute,
    dequantise,
    gemm::{Lhs, Out, Rhs, Right, Threads, products},
    host::{floats, matrix},
    profile::{Part, Timed},
};
use sides::{Straight, Transposed};

mod sides;
#[cfg(target_arch = "x86_64")]
mod tiled;

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
    /// In its file, for the CPU, which multiplies it in this type.
    Mapped(Arc<dyn StoredMatrix>, Compute),
    /// For an accelerator, in the form it has on disk.
    Device(Arc<Resident>),
}

impl FrozenMatrix {
    /// A matrix `[outputs, inputs]` as it is stored, multiplied in `compute`: where it lies on the CPU, uploaded at its
    /// first use elsewhere.
    pub fn new(
        stored: Arc<dyn StoredMatrix>,
        outputs: usize,
        inputs: usize,
        device: &Device,
        compute: Compute,
    ) -> Self {
        match device.is_cpu() {
            true => Self { place: Place::Mapped(stored, compute), outputs, inputs },
            false => Self::uploaded(stored, outputs, inputs, Uploader::new(device, compute)),
        }
    }

    /// A matrix that is uploaded at its first use, whatever the device is: on the CPU it goes the way of an
    /// accelerator's.
    pub fn uploaded(stored: Arc<dyn StoredMatrix>, outputs: usize, inputs: usize, uploader: Uploader) -> Self {
        let resident = Resident::new(stored, outputs, inputs, uploader);
        Self { place: Place::Device(Arc::new(resident)), outputs, inputs }
    }

    /// The type in which it multiplies.
    pub fn compute(&self) -> Compute {
        match &self.place {
            Place::Mapped(_, compute) => *compute,
            Place::Device(resident) => resident.uploader.compute,
        }
    }

    /// Asks the system to read the matrix ahead; for a device, begins to upload it.
    pub fn will_need(&self) {
        match &self.place {
            Place::Mapped(w, _) => w.parts().into_iter().for_each(MappedBytes::will_need),
            Place::Device(resident) => resident.will_need(),
        }
    }

    /// Lets go of the matrix's pages, or of its copy on the device, whose memory stays for the next matrix of its size.
    pub fn done_with(&self) {
        self.let_go(Memory::Kept);
    }

    /// The same, but the memory goes back to the device.
    pub fn free(&self) {
        self.let_go(Memory::Freed);
    }

    fn let_go(&self, memory: Memory) {
        match &self.place {
            Place::Mapped(w, _) => w.parts().into_iter().for_each(MappedBytes::done_with),
            Place::Device(resident) => resident.done_with(memory),
        }
    }

    /// Bytes that it takes in its files.
    pub fn stored_bytes(&self) -> usize {
        self.stored().stored_bytes()
    }

    /// Bytes that the matrix takes on a device, multiplying in `compute` there.
    pub fn device_bytes(&self, compute: Compute) -> usize {
        self.stored().device_bytes(self.outputs * self.inputs, compute)
    }

    /// Bytes that a product in `compute` on a card decodes it to: none where its numbers lie there as the product takes
    /// them.
    pub fn device_scratch(&self, compute: Compute) -> usize {
        let numbers = self.outputs * self.inputs;
        match self.stored().is_plain_on_device(numbers, compute) {
            true => 0,
            false => numbers * compute.size(),
        }
    }

    fn stored(&self) -> &dyn StoredMatrix {
        match &self.place {
            Place::Mapped(stored, _) => &**stored,
            Place::Device(resident) => &*resident.stored,
        }
    }

    /// `x[tokens, inputs] · Wᵀ`: `[tokens, outputs]`.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(Self::apply_all(&[self], x)?.remove(0))
    }

    /// [`FrozenMatrix::apply`] of several matrices of the same input.
    pub fn apply_all(matrices: &[&Self], x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        let _timed = Timed::start(Part::Products);
        #[cfg(target_arch = "x86_64")]
        if let Some(terms) = tiled::terms(matrices) {
            return tiled::apply_all(matrices, x, terms);
        }
        if let Some(compute) = Self::mapped(matrices) {
            return Self::apply_mapped(matrices, x, compute);
        }
        let side = match matrices {
            [Self { place: Place::Device(w), .. }, _, ..] => Some(dequantise::side(x, w.uploader.compute)?),
            _ => None,
        };
        matrices.iter().map(|matrix| matrix.apply_alone(side.as_ref().unwrap_or(x))).collect()
    }

    fn apply_alone(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match &self.place {
            Place::Device(w) => dequantise::apply(&*w.form()?, x, w.uploader.compute),
            Place::Mapped(_, compute) => Ok(Self::apply_mapped(&[self], x, *compute)?.remove(0)),
        }
    }

    /// The type in which they multiply, where all are for the CPU and multiply in one.
    fn mapped(matrices: &[&Self]) -> Option<Compute> {
        let of = |matrix: &&Self| match &matrix.place {
            Place::Mapped(_, compute) => Some(*compute),
            Place::Device(_) => None,
        };
        let first = of(matrices.first()?)?;
        matrices.iter().all(|matrix| of(matrix) == Some(first)).then_some(first)
    }

    /// Products of matrices for the CPU with one input.
    fn apply_mapped(matrices: &[&Self], x: &Tensor, compute: Compute) -> candle_core::Result<Vec<Tensor>> {
        let (tokens, inputs) = x.dims2()?;
        if matrices.iter().any(|matrix| matrix.inputs != inputs) {
            bail!("x {:?} does not fit a matrix of other inputs", x.shape());
        }
        let x = floats(x)?;
        let sides: Vec<_> = matrices.iter().map(|w| Transposed { w: w.stored(), inputs, compute }).collect();
        let sides: Vec<_> = sides.iter().map(|side| [side as &dyn Rhs]).collect();
        let mut ys: Vec<_> = matrices.iter().map(|w| Vec::with_capacity(tokens * w.outputs)).collect();
        let rights = matrices.iter().zip(&sides).zip(&mut ys).map(|((w, sides), y)| {
            let out = Out::fresh(&mut y.spare_capacity_mut()[..tokens * w.outputs], w.outputs);
            Right { sides, n: w.outputs, out }
        });
        let rights: Vec<_> = rights.collect();
        products(tokens, 1.0, &[(Lhs { data: &x, row: inputs, col: 1 }, inputs)], &rights, Threads::All);
        drop(rights);
        let filled = |(w, mut y): (&&Self, Vec<f32>)| {
            // SAFETY: the product wrote every element.
            unsafe { y.set_len(tokens * w.outputs) };
            matrix(y, tokens, w.outputs)
        };
        matrices.iter().zip(ys).map(filled).collect()
    }

    /// `dx[tokens, inputs] += dy[tokens, outputs] · W`, in place.
    pub fn add_backward(&self, dx: &Tensor, dy: &Tensor) -> candle_core::Result<()> {
        let _timed = Timed::start(Part::Products);
        #[cfg(target_arch = "x86_64")]
        if let Some(terms) = tiled::terms(&[self]) {
            return dx.inplace_op2(dy, &tiled::Backward { matrix: self, terms });
        }
        self.add_backward_alone(dx, dy)
    }

    /// `Σ dy[tokens, outputs] · W` of several matrices of the same input: the gradient that reaches it.
    pub fn backward_all(matrices: &[&Self], dys: &[&Tensor]) -> candle_core::Result<Tensor> {
        let _timed = Timed::start(Part::Products);
        #[cfg(target_arch = "x86_64")]
        if let Some(terms) = tiled::terms(matrices) {
            return tiled::backward_all(matrices, dys, terms);
        }
        if let Some(compute) = Self::mapped(matrices) {
            return Self::backward_mapped(matrices, dys, compute);
        }
        let (Some(first), Some(dy)) = (matrices.first(), dys.first()) else { bail!("a gradient of no product") };
        let dx = Tensor::zeros((dy.dim(0)?, first.inputs), dy.dtype(), dy.device())?;
        matrices.iter().zip(dys).try_for_each(|(matrix, dy)| matrix.add_backward_alone(&dx, dy))?;
        Ok(dx)
    }

    /// [`FrozenMatrix::backward_all`] of matrices for the CPU.
    fn backward_mapped(matrices: &[&Self], dys: &[&Tensor], compute: Compute) -> candle_core::Result<Tensor> {
        let (tokens, inputs) = (dys[0].dim(0)?, matrices[0].inputs);
        let fits = |(w, dy): (&&Self, &&Tensor)| w.inputs == inputs && dy.dims() == [tokens, w.outputs];
        if matrices.len() != dys.len() || !matrices.iter().zip(dys).all(fits) {
            bail!("gradients do not fit matrices of {inputs} inputs");
        }
        let dys = dys.iter().map(|dy| floats(dy)).collect::<candle_core::Result<Vec<_>>>()?;
        let lefts = dys.iter().zip(matrices).map(|(dy, w)| (Lhs { data: dy, row: w.outputs, col: 1 }, w.outputs));
        let lefts: Vec<_> = lefts.collect();
        let sides: Vec<_> =
            matrices.iter().map(|w| Straight { w: w.stored(), outputs: w.outputs, inputs, compute }).collect();
        let sides: Vec<_> = sides.iter().map(|side| side as &dyn Rhs).collect();
        let mut dx = Vec::with_capacity(tokens * inputs);
        let out = Out::fresh(&mut dx.spare_capacity_mut()[..tokens * inputs], inputs);
        products(tokens, 1.0, &lefts, &[Right { sides: &sides, n: inputs, out }], Threads::All);
        // SAFETY: the product wrote every element.
        unsafe { dx.set_len(tokens * inputs) };
        matrix(dx, tokens, inputs)
    }

    fn add_backward_alone(&self, dx: &Tensor, dy: &Tensor) -> candle_core::Result<()> {
        match &self.place {
            Place::Device(w) => dequantise::add_backward(&*w.form()?, dx, dy, w.uploader.compute),
            Place::Mapped(w, compute) => {
                let (outputs, inputs) = (self.outputs, self.inputs);
                dx.inplace_op2(dy, &Straight { w: &**w, outputs, inputs, compute: *compute })
            }
        }
    }

    /// The rows `ids`, as f32: `[ids, inputs]`. Every id is below `outputs`. For a device they are taken from the file
    /// too, so that an embedding takes no room there.
    pub fn rows(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        let (stored, device) = match &self.place {
            Place::Mapped(stored, _) => (stored, &Device::Cpu),
            Place::Device(resident) => (&resident.stored, &resident.uploader.device),
        };
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.outputs) {
            bail!("row {id} of a matrix of {} rows", self.outputs);
        }
        let mut rows = vec![0f32; ids.len() * self.inputs];
        rows.par_chunks_mut(self.inputs).zip(ids).for_each(|(row, &id)| {
            let id = id as usize;
            stored.decode(id..id + 1, 0..self.inputs, row);
        });
        matrix(rows, ids.len(), self.inputs)?.to_device(device)
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
        Self::new(Arc::new(mapped), outputs, inputs, &Device::Cpu, Compute::F32)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::DType as Kind;

    use super::*;
    use crate::kernels::oracle::{random, worst};

    const TYPES: [Kind; 3] = [Kind::F32, Kind::F16, Kind::BF16];

    /// Numbers in memory: what Miri, which maps no files, can multiply with.
    #[test]
    fn matrices_of_two_types_are_multiplied_together() -> candle_core::Result<()> {
        let ([narrow, _], narrow_w) = both(40, 75, Kind::BF16);
        let ([wide, _], wide_w) = both(40, 75, Kind::F32);
        let (x, dy) = (random((5, 75), 2), random((5, 40), 3));
        let ys = FrozenMatrix::apply_all(&[&narrow, &wide], &x)?;
        for (y, w) in ys.iter().zip([&narrow_w, &wide_w]) {
            assert!(worst(y, &x.matmul(&w.t()?)?) < 1e-4);
        }
        let dx = FrozenMatrix::backward_all(&[&narrow, &wide], &[&dy, &dy])?;
        assert!(worst(&dx, &dy.matmul(&(narrow_w + wide_w)?)?) < 1e-4);
        Ok(())
    }

    #[derive(Debug)]
    struct Held(Tensor);

    impl StoredMatrix for Held {
        fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
            let part = self.0.narrow(0, rows.start, rows.len()).unwrap().narrow(1, columns.start, columns.len());
            out.copy_from_slice(&part.unwrap().flatten_all().unwrap().to_vec1().unwrap());
        }

        fn parts(&self) -> Vec<&MappedBytes> {
            Vec::new()
        }
    }

    #[test]
    fn a_product_fills_the_memory_that_it_takes() -> candle_core::Result<()> {
        let (w, x, dy) = (random((18, 35), 1), random((3, 35), 2), random((3, 18), 3));
        let ours = FrozenMatrix::new(Arc::new(Held(w.clone())), 18, 35, &Device::Cpu, Compute::F32);
        let y = ours.apply(&x)?;
        let sum =
            |i: usize, j: usize| -> candle_core::Result<f32> { (x.get(i)? * w.get(j)?)?.sum_all()?.to_scalar::<f32>() };
        for (i, j) in [(0, 0), (0, 17), (2, 0), (2, 17), (1, 9)] {
            assert!((y.get(i)?.get(j)?.to_scalar::<f32>()? - sum(i, j)?).abs() < 1e-5, "{i} {j}");
        }
        let dx = Tensor::zeros((3, 35), Kind::F32, &Device::Cpu)?;
        ours.add_backward(&dx, &dy)?;
        let expected = (dy.get(2)? * w.t()?.get(34)?)?.sum_all()?.to_scalar::<f32>()?;
        assert!((dx.get(2)?.get(34)?.to_scalar::<f32>()? - expected).abs() < 1e-5);
        Ok(())
    }

    /// The same numbers mapped, on a device, and as a plain f32 tensor.
    fn both(outputs: usize, inputs: usize, dtype: Kind) -> ([FrozenMatrix; 2], Tensor) {
        let w = random((outputs, inputs), 1).to_dtype(dtype).unwrap();
        let mapped = FrozenMatrix::of(&w);
        let Place::Mapped(stored, compute) = &mapped.place else { panic!("a mapped matrix") };
        // a buffer that is smaller than the matrix
        let uploader = Uploader { staging: 64, ..Uploader::new(&Device::Cpu, *compute) };
        let device = FrozenMatrix::uploaded(Arc::clone(stored), outputs, inputs, uploader);
        ([mapped, device], w.to_dtype(Kind::F32).unwrap())
    }

    #[test]
    fn products_equal_those_of_a_plain_tensor() -> candle_core::Result<()> {
        for dtype in TYPES {
            for (outputs, inputs) in [(1, 1), (40, 33), (17, 600), (600, 17)] {
                let (matrices, w) = both(outputs, inputs, dtype);
                for w_ours in &matrices {
                    let (x, dy) = (random((5, inputs), 2), random((5, outputs), 3));
                    // in tiles where there are any, and by the general product
                    for tiles in [true, false] {
                        let y = if tiles { w_ours.apply(&x)? } else { w_ours.apply_alone(&x)? };
                        assert!(worst(&y, &x.matmul(&w.t()?)?) < 2e-6 * inputs as f64, "{dtype:?} {outputs} {inputs}");
                        // a view in the middle of a larger tensor, whose neighbours stay as they are
                        let whole = random((7, inputs), 4);
                        let (before, dx) = (whole.copy()?, whole.narrow(0, 1, 5)?);
                        match tiles {
                            true => w_ours.add_backward(&dx, &dy)?,
                            false => w_ours.add_backward_alone(&dx, &dy)?,
                        }
                        let expected = (before.narrow(0, 1, 5)? + dy.matmul(&w)?)?;
                        assert!(worst(&dx, &expected) < 2e-6 * outputs as f64, "{dtype:?} {outputs} {inputs}");
                        for edge in [0, 6] {
                            assert_eq!(worst(&whole.narrow(0, edge, 1)?, &before.narrow(0, edge, 1)?), 0.0);
                        }
                    }
                    // of several matrices at once
                    let ys = FrozenMatrix::apply_all(&[w_ours, w_ours], &x)?;
                    assert_eq!((worst(&ys[0], &ys[1]), worst(&ys[0], &w_ours.apply(&x)?)), (0.0, 0.0));
                    let dx = FrozenMatrix::backward_all(&[w_ours, w_ours], &[&dy, &dy])?;
                    // sums of twice as many
                    let expected = (dy.matmul(&w)? * 2.0)?;
                    assert!(worst(&dx, &expected) < 2e-6 * (2 * outputs) as f64, "{dtype:?} {outputs} {inputs}");
                }
            }
        }
        Ok(())
    }

    /// A product in f64 of operands that are rounded to bf16.
    fn of_rounded(a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
        let round = |x: &Tensor| x.to_dtype(Kind::BF16)?.to_dtype(Kind::F64);
        round(a)?.matmul(&round(b)?)?.to_dtype(Kind::F32)
    }

    #[test]
    fn bf16_products_equal_sums_of_rounded_operands_in_f64() -> candle_core::Result<()> {
        if Compute::bf16_or_f32() != Compute::Bf16 {
            return Ok(());
        }
        for dtype in TYPES {
            for (outputs, inputs, tokens) in
                [(1, 1, 1), (40, 33, 5), (33, 40, 5), (17, 1100, 3), (1101, 17, 13), (96, 64, 40)]
            {
                let ([mut ours, _], w) = both(outputs, inputs, dtype);
                let Place::Mapped(_, compute) = &mut ours.place else { panic!("a mapped matrix") };
                *compute = Compute::Bf16;
                let (x, dy) = (random((tokens, inputs), 2), random((tokens, outputs), 3));
                let case = format!("{dtype:?} {outputs} {inputs}");
                // in tiles where there are any, and by the general product
                for tiles in [true, false] {
                    let apply = |x: &Tensor| if tiles { ours.apply(x) } else { ours.apply_alone(x) };
                    let y = apply(&x)?;
                    assert!(worst(&y, &of_rounded(&x, &w.t()?)?) < 1e-6 * (inputs as f64).sqrt(), "{case}");
                    let dx = random((tokens, inputs), 4);
                    let expected = (&dx + of_rounded(&dy, &w)?)?;
                    match tiles {
                        true => ours.add_backward(&dx, &dy)?,
                        false => ours.add_backward_alone(&dx, &dy)?,
                    }
                    assert!(worst(&dx, &expected) < 1e-6 * (outputs as f64).sqrt(), "{case}");
                    // a row's bits are those that it has alone
                    for i in [0, tokens - 1] {
                        let one = apply(&x.narrow(0, i, 1)?)?;
                        assert_eq!(worst(&one, &y.narrow(0, i, 1)?), 0.0, "{case}");
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
