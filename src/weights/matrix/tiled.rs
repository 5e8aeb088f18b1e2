//! Frozen matrices in the tile unit: all of one input are multiplied in one sweep.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};

use super::{
    FrozenMatrix, Place,
    sides::{Straight, Transposed, with_decoded},
};
use crate::{
    kernels::{
        amx::{self, SIDE, Terms},
        compute::Compute,
        gemm::Out,
        host::{floats, matrix, operand, operand_mut},
        tiles::{
            DECODED_COLUMNS, Left, Right, Side, digits,
            pack::{self, Rows},
            panel_of, products, transposed,
        },
    },
    weights::mapped::{ALIGN, StoredMatrix},
};

/// How tiles multiply these matrices of one model, where they do: as the least exact of them in bf16 wants it.
pub fn terms(matrices: &[&FrozenMatrix]) -> Option<Terms> {
    let mut terms = None;
    for matrix in matrices.iter().filter(|_| amx::available()) {
        terms = match (&matrix.place, terms) {
            (Place::Device(_), _) => return None,
            (Place::Mapped(_, Compute::Bf16), _) => Some(Terms::One),
            (Place::Mapped(w, Compute::F32), None | Some(Terms::Three)) if w.exact_in_bf16() => Some(Terms::Three),
            (Place::Mapped(_, Compute::F32), _) => Some(Terms::Eight),
        };
    }
    terms
}

fn mapped(matrix: &FrozenMatrix) -> Result<(&dyn StoredMatrix, Compute)> {
    match &matrix.place {
        Place::Mapped(w, compute) => Ok((&**w, *compute)),
        Place::Device(_) => bail!("a matrix on a device does not multiply in tiles"),
    }
}

fn transposed_side(matrix: &FrozenMatrix) -> Result<Transposed<'_>> {
    let (w, compute) = mapped(matrix)?;
    Ok(Transposed { w, inputs: matrix.inputs, compute })
}

fn straight_side(matrix: &FrozenMatrix) -> Result<Straight<'_>> {
    let (w, compute) = mapped(matrix)?;
    Ok(Straight { w, outputs: matrix.outputs, inputs: matrix.inputs, compute })
}

/// `x · Wᵀ` of each.
pub fn apply_all(matrices: &[&FrozenMatrix], x: &Tensor, terms: Terms) -> Result<Vec<Tensor>> {
    let (tokens, inputs) = x.dims2()?;
    if matrices.iter().any(|w| w.inputs != inputs) {
        bail!("x {:?} does not fit matrices of other inputs", x.shape());
    }
    let x = floats(x)?;
    let sides = matrices.iter().map(|w| transposed_side(w)).collect::<Result<Vec<_>>>()?;
    let mut ys: Vec<_> = matrices.iter().map(|w| Vec::with_capacity(tokens * w.outputs)).collect();
    let mut rights = Vec::with_capacity(matrices.len());
    for ((w, side), y) in matrices.iter().zip(&sides).zip(&mut ys) {
        let out = Out::fresh(&mut y.spare_capacity_mut()[..tokens * w.outputs], w.outputs);
        rights.push(Right { sides: vec![side], n: w.outputs, out });
    }
    products(tokens, &[Left { x: &x, k: inputs }], rights, terms);
    let filled = |(w, mut y): (&&FrozenMatrix, Vec<f32>)| {
        // SAFETY: the product wrote every element.
        unsafe { y.set_len(tokens * w.outputs) };
        matrix(y, tokens, w.outputs)
    };
    matrices.iter().zip(ys).map(filled).collect()
}

/// `Σ dy · W`.
pub fn backward_all(matrices: &[&FrozenMatrix], dys: &[&Tensor], terms: Terms) -> Result<Tensor> {
    let (tokens, inputs) = (dys[0].dim(0)?, matrices[0].inputs);
    let fits = |(w, dy): (&&FrozenMatrix, &&Tensor)| w.inputs == inputs && dy.dims() == [tokens, w.outputs];
    if matrices.len() != dys.len() || !matrices.iter().zip(dys).all(fits) {
        bail!("gradients do not fit matrices of {inputs} inputs");
    }
    let dys = dys.iter().map(|dy| floats(dy)).collect::<Result<Vec<_>>>()?;
    let lefts: Vec<_> = dys.iter().zip(matrices).map(|(dy, w)| Left { x: dy, k: w.outputs }).collect();
    let sides = matrices.iter().map(|w| straight_side(w)).collect::<Result<Vec<_>>>()?;
    let sides = sides.iter().map(|side| side as &dyn Side).collect();
    let mut dx = Vec::with_capacity(tokens * inputs);
    let out = Out::fresh(&mut dx.spare_capacity_mut()[..tokens * inputs], inputs);
    products(tokens, &lefts, vec![Right { sides, n: inputs, out }], terms);
    // SAFETY: the product wrote every element.
    unsafe { dx.set_len(tokens * inputs) };
    matrix(dx, tokens, inputs)
}

/// `dx += dy · W`.
pub struct Backward<'a> {
    /// `[outputs, inputs]`.
    pub matrix: &'a FrozenMatrix,
    /// How tiles multiply it.
    pub terms: Terms,
}

impl InplaceOp2 for Backward<'_> {
    fn name(&self) -> &'static str {
        "frozen-backward"
    }

    fn cpu_fwd(&self, dx: &mut CpuStorage, dx_at: &Layout, dy: &CpuStorage, dy_at: &Layout) -> Result<()> {
        let (FrozenMatrix { inputs, outputs, .. }, tokens) = (self.matrix, dx_at.shape().dims2()?.0);
        if dx_at.dims() != [tokens, *inputs] || dy_at.dims() != [tokens, *outputs] {
            bail!("dx {:?} and dy {:?} do not fit the matrix", dx_at.shape(), dy_at.shape());
        }
        let left = Left { x: operand(dy, dy_at)?, k: *outputs };
        let side = straight_side(self.matrix)?;
        let out = Out::new(operand_mut(dx, dx_at)?, *inputs, true);
        products(tokens, &[left], vec![Right { sides: vec![&side], n: *inputs, out }], self.terms);
        Ok(())
    }
}

/// Numbers of a row-major matrix of bf16 from row `row` and column `column` on.
fn halves(bytes: &[u8], inputs: usize, row: usize, column: usize) -> &[[u8; 2]] {
    bytes[2 * (row * inputs + column)..].as_chunks().0
}

impl Side for Transposed<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, terms: Terms, out: &mut [u32]) {
        let size = panel_of(k.len(), terms);
        for (panel, start) in out.chunks_exact_mut(size).zip(n.clone().step_by(SIDE)) {
            let rows = start..n.end.min(start + SIDE);
            let (count, width) = (rows.len(), k.len());
            match self.w.bf16() {
                Some(bytes) if terms != Terms::Eight => {
                    let data = halves(bytes, self.inputs, start, k.start);
                    pack::transposed(Rows { data, stride: self.inputs, width }, count, panel);
                }
                _ => with_decoded(count * width, |data| {
                    self.w.decode(rows, k.clone(), data);
                    transposed(Rows { data, stride: width, width }, count, terms, panel);
                }),
            }
        }
    }
}

impl Side for Straight<'_> {
    fn pack(&self, k: Range<usize>, n: Range<usize>, terms: Terms, out: &mut [u32]) {
        let size = panel_of(k.len(), terms);
        // formats decode whole blocks of columns; panels begin where blocks do
        let whole = |n: &Range<usize>| n.start..n.end.next_multiple_of(ALIGN).min(self.inputs);
        if terms == Terms::Eight {
            for (start, out) in n.clone().step_by(DECODED_COLUMNS).zip(out.chunks_mut(DECODED_COLUMNS / SIDE * size)) {
                let n = start..n.end.min(start + DECODED_COLUMNS);
                let stride = whole(&n).len();
                with_decoded(k.len() * stride, |data| {
                    self.w.decode(k.clone(), whole(&n), data);
                    digits::across(Rows { data, stride, width: n.len() }, k.len(), out);
                });
            }
            return;
        }
        let (width, columns) = (n.len(), whole(&n));
        let stride = columns.len();
        for (register, start) in k.clone().step_by(terms.depth()).enumerate() {
            let rows = start..k.end.min(start + terms.depth());
            let count = rows.len();
            match self.w.bf16() {
                Some(bytes) => {
                    let data = halves(bytes, self.inputs, start, n.start);
                    pack::across(Rows { data, stride: self.inputs, width }, count, register, size, out);
                }
                None => with_decoded(count * stride, |data| {
                    self.w.decode(rows, columns.clone(), data);
                    pack::across(Rows { data, stride, width }, count, register, size, out);
                }),
            }
        }
    }
}
