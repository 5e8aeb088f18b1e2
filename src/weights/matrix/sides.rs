//! The two sides of a frozen matrix, as right-hand sides that decode themselves while they are packed.

use std::{cell::RefCell, ops::Range};

use candle_core::{CpuStorage, InplaceOp2, Layout, bail};

use crate::{
    kernels::{
        compute::Compute,
        gemm::{Lhs, Out, Rhs, Threads, gemm},
        host::{operand, operand_mut},
        pack::{self, Floats, Pairs, Rounded, Step, Widened, transpose},
        simd::{self, Cache},
        words::Words,
    },
    weights::mapped::{ALIGN, StoredMatrix},
};

thread_local! {
    /// Rows of a format that is decoded before it is packed.
    static DECODED: RefCell<Words> = const { RefCell::new(Words::new()) };
}

/// Gives `work` scratch of `n` floats, whatever they hold.
pub(super) fn with_decoded(n: usize, work: impl FnOnce(&mut [f32])) {
    DECODED.with_borrow_mut(|decoded| work(decoded.floats(n)));
}

/// Rows before one that is packed in which its part is asked for once more: many have left the near caches since
/// [`Rhs::fetch`], and short parts of rows are no run that a processor would foresee.
const AHEAD: usize = 8;

/// Asks for columns of some rows, where they lie as bf16.
fn fetch(w: &dyn StoredMatrix, inputs: usize, rows: impl Iterator<Item = usize>, columns: &Range<usize>) {
    if let Some(bytes) = w.bf16() {
        rows.for_each(|row| {
            simd::fetch(&bytes[2 * (row * inputs + columns.start)..][..2 * columns.len()], Cache::Second)
        });
    }
}

/// The matrix as the right-hand side `[inputs, outputs]` of the forward product: k runs along its rows.
pub(super) struct Transposed<'a> {
    pub(super) w: &'a dyn StoredMatrix,
    pub(super) inputs: usize,
    pub(super) compute: Compute,
}

impl Rhs for Transposed<'_> {
    fn compute(&self) -> Compute {
        self.compute
    }

    fn fetch(&self, k: Range<usize>, n: Range<usize>, part: usize, parts: usize) {
        fetch(self.w, self.inputs, n.skip(part).step_by(parts), &k);
    }

    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]) {
        let size = nr * k.len().div_ceil(self.compute.per_step());
        for (panel, start) in out.chunks_exact_mut(size).zip(n.clone().step_by(nr)) {
            let rows = start..n.end.min(start + nr);
            let count = rows.len();
            let stored = self.w.bf16().map(|bytes| Widened {
                bytes: &bytes[2 * (start * self.inputs + k.start)..],
                stride: self.inputs,
                k: k.len(),
            });
            match (self.compute, stored) {
                (Compute::F32, Some(stored)) => transpose(stored, count, nr, panel),
                (Compute::Bf16, Some(stored)) if k.len().is_multiple_of(2) => {
                    transpose(Pairs(stored), count, nr, panel)
                }
                (compute, _) => with_decoded(count * k.len(), |decoded| {
                    self.w.decode(rows, k.clone(), decoded);
                    let floats = Floats { data: decoded, stride: k.len(), k: k.len(), alpha: 1.0 };
                    match compute {
                        Compute::F32 => transpose(floats, count, nr, panel),
                        Compute::Bf16 => transpose(Rounded(floats), count, nr, panel),
                    }
                }),
            }
        }
    }
}

/// The matrix as the right-hand side `[outputs, inputs]` of the backward product: k runs across its rows.
pub(super) struct Straight<'a> {
    pub(super) w: &'a dyn StoredMatrix,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) compute: Compute,
}

impl Rhs for Straight<'_> {
    fn compute(&self) -> Compute {
        self.compute
    }

    fn fetch(&self, k: Range<usize>, n: Range<usize>, part: usize, parts: usize) {
        fetch(self.w, self.inputs, k.skip(part).step_by(parts), &n);
    }

    fn pack(&self, k: Range<usize>, n: Range<usize>, nr: usize, out: &mut [u32]) {
        let size = nr * k.len().div_ceil(self.compute.per_step());
        let steps = k.clone().step_by(self.compute.per_step()).enumerate();
        if let Some(bytes) = self.w.bf16() {
            let (elements, _) = bytes.as_chunks::<2>();
            // what stands beside the last row of an odd number
            let nothing = vec![[0; 2]; if k.len().is_multiple_of(2) { 0 } else { n.len() }];
            let row = |p: usize| &elements[p * self.inputs + n.start..][..n.len()];
            for (step, p) in steps {
                let ahead = (p + AHEAD..k.end).take(self.compute.per_step());
                ahead.for_each(|p| simd::fetch(row(p).as_flattened(), Cache::First));
                let to = Step { nr, size, step };
                match self.compute {
                    Compute::F32 => pack::widen(row(p), to, out),
                    Compute::Bf16 if p + 1 == k.end => pack::interleave(row(p), &nothing, to, out),
                    Compute::Bf16 => pack::interleave(row(p), row(p + 1), to, out),
                }
            }
            return;
        }
        // formats decode whole blocks of columns: the run is widened to their borders
        let columns = n.start / ALIGN * ALIGN..n.end.next_multiple_of(ALIGN).min(self.inputs);
        let (cut, width) = (n.start - columns.start..n.end - columns.start, columns.len());
        // blocks of k start at multiples of ALIGN: a stored matrix that is transposed decodes whole blocks too
        with_decoded(ALIGN * width, |decoded| {
            for first in k.clone().step_by(ALIGN) {
                let rows = first..k.end.min(first + ALIGN);
                self.w.decode(rows.clone(), columns.clone(), &mut decoded[..rows.len() * width]);
                if !rows.len().is_multiple_of(2) {
                    // what stands beside the last row of an odd number
                    decoded[rows.len() * width..][..width].fill(0.0);
                }
                let row = |p: usize| &decoded[(p - first) * width..][cut.clone()];
                for p in rows.step_by(self.compute.per_step()) {
                    let to = Step { nr, size, step: (p - k.start) / self.compute.per_step() };
                    match self.compute {
                        Compute::F32 => pack::copy(row(p), to, out),
                        Compute::Bf16 => pack::round(row(p), row(p + 1), to, out),
                    }
                }
            }
        });
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
        let out = Out::new(operand_mut(dx, dx_at)?, inputs, true);
        let dy = Lhs { data: operand(dy, dy_at)?, row: outputs, col: 1 };
        gemm([tokens, inputs, outputs], 1.0, dy, self, out, Threads::All);
        Ok(())
    }
}
