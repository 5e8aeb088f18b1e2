//! Products of dense f32 tensors of any strides, which is what the thin LoRA matrices need.

use std::borrow::Cow;

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};

use super::{
    compute::Compute,
    gemm::{Dense, Lhs, Out, Rhs, SERIAL, Threads, gemm},
    host::operand_mut,
    profile::{Part, Timed},
    thin::{self, LOW_ROWS, Place, THIN_COLUMNS, THIN_ROWS, Wide},
};

/// `c[m, n] += alpha · a[m, k] · b[k, n]` in place; `c` is contiguous and may be a view, `a` and `b` may be transposed.
/// Everywhere in f32, but on CUDA in a run that multiplies in bf16.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // other devices know one arithmetic
pub fn add_product(c: &Tensor, alpha: f64, a: &Tensor, b: &Tensor, compute: Compute) -> Result<()> {
    let _timed = Timed::start(Part::Lora);
    if c.device().is_cpu() {
        return c.inplace_op3(a, b, &Product { alpha: alpha as f32, add: true });
    }
    #[cfg(feature = "cuda")]
    if c.device().is_cuda() {
        return super::cuda::cublas::product(c, alpha as f32, a, b, 1.0, compute);
    }
    c.slice_set(&(c + plain(alpha, a, b)?)?, 0, 0)
}

/// `alpha · a[m, k] · b[k, n]`, in the same arithmetic.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))] // other devices know one arithmetic
pub fn product(alpha: f64, a: &Tensor, b: &Tensor, compute: Compute) -> Result<Tensor> {
    let _timed = Timed::start(Part::Lora);
    #[cfg(feature = "cuda")]
    if a.device().is_cuda() {
        let c = super::gpu::launch::room((a.dim(0)?, b.dim(1)?), a)?;
        super::cuda::cublas::product(&c, alpha as f32, a, b, 0.0, compute)?;
        return Ok(c);
    }
    if !a.device().is_cpu() {
        return plain(alpha, a, b);
    }
    let c = Tensor::zeros((a.dim(0)?, b.dim(1)?), a.dtype(), a.device())?;
    c.inplace_op3(a, b, &Product { alpha: alpha as f32, add: false })?;
    Ok(c)
}

/// The same in candle's operations, for devices without a kernel of ours and as the kernel's test.
fn plain(alpha: f64, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.matmul(&b.contiguous()?)? * alpha
}

struct Product {
    alpha: f32,
    add: bool,
}

impl Product {
    /// The product by the kernels for a thin side, where it has one and they are for how the sides lie. Which kernel is
    /// taken does not depend on how many rows there are where the result has a row for each.
    fn thin(&self, [m, n, k]: [usize; 3], a: Lhs, b: Dense, out: &mut [f32]) -> bool {
        if m == 0 || n == 0 || k == 0 || !thin::available() {
            return false;
        }
        let parallel = m * n * k >= SERIAL;
        if n <= THIN_ROWS && a.col == 1 && a.row >= k {
            let x = Wide { data: a.data, rows: m, stride: a.row, width: k };
            let (data, stride) = rows_of(Dense { row: b.col, col: b.row, ..b }, n, k);
            let thin = Wide { data: &data, rows: n, stride, width: k };
            thin::rows(self.alpha, x, thin, out, self.add, parallel);
            return true;
        }
        if k <= LOW_ROWS && a.col == 1 && a.row >= k {
            let left = Wide { data: a.data, rows: m, stride: a.row, width: k };
            let (data, stride) = rows_of(b, k, n);
            let right = Wide { data: &data, rows: k, stride, width: n };
            thin::outer(self.alpha, left, right, out, self.add, parallel);
            return true;
        }
        // sums over the rows of both sides
        if a.row != 1 || b.col != 1 || a.col < m || b.row < n || m.min(n) > THIN_COLUMNS {
            return false;
        }
        let left = Wide { data: a.data, rows: k, stride: a.col, width: m };
        let right = Wide { data: b.data, rows: k, stride: b.row, width: n };
        let (thin, wide, place) = match m <= n {
            true => (left, right, Place { thin: n, wide: 1 }),
            false => (right, left, Place { thin: 1, wide: n }),
        };
        thin::columns(self.alpha, thin, wide, (out, place), self.add, parallel);
        true
    }
}

/// `matrix[rows, width]` as rows without gaps within, and numbers from one to the next: as it lies, or a copy.
fn rows_of(matrix: Dense, rows: usize, width: usize) -> (Cow<[f32]>, usize) {
    if matrix.col == 1 && matrix.row >= width {
        return (matrix.data.into(), matrix.row);
    }
    let mut words = vec![0; rows * width];
    matrix.pack(0..rows, 0..width, width, &mut words);
    (words.into_iter().map(f32::from_bits).collect(), width)
}

impl InplaceOp3 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        c: &mut CpuStorage,
        c_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        let ((m, n), (rows, k), (depth, columns)) =
            (c_layout.shape().dims2()?, a_layout.shape().dims2()?, b_layout.shape().dims2()?);
        if (rows, depth, columns) != (m, k, n) {
            bail!("product: {:?} of {:?} and {:?}", c_layout.shape(), a_layout.shape(), b_layout.shape());
        }
        let (CpuStorage::F32(a), CpuStorage::F32(b)) = (a, b) else { bail!("product: f32 operands are expected") };
        let a = Lhs { data: &a[a_layout.start_offset()..], row: a_layout.stride()[0], col: a_layout.stride()[1] };
        let b = Dense { data: &b[b_layout.start_offset()..], row: b_layout.stride()[0], col: b_layout.stride()[1] };
        let out = operand_mut(c, c_layout)?;
        if !self.thin([m, n, k], a, b, out) {
            gemm([m, n, k], self.alpha, a, &b, Out::new(out, n, self.add), Threads::All);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{random, worst};

    #[test]
    fn kernel_equals_plain_tensors_at_any_strides() -> Result<()> {
        let shapes = [[1, 1, 1], [5, 4, 70], [30, 64, 4], [3, 4, 600], [100, 8, 576], [8, 200, 301], [200, 12, 301]];
        for [m, n, k] in shapes {
            let sides = |transposed: bool, rows, columns, seed| match transposed {
                true => random((columns, rows), seed).t(),
                false => Ok(random((rows, columns), seed)),
            };
            for (a_turned, b_turned) in [(false, false), (true, false), (false, true), (true, true)] {
                let (a, b) = (sides(a_turned, m, k, 1)?, sides(b_turned, k, n, 2)?);
                let tolerance = 1e-6 * k as f64;
                assert!(worst(&product(0.5, &a, &b, Compute::F32)?, &plain(0.5, &a, &b)?) < tolerance);
                // a view in the middle of a larger tensor, whose neighbours stay as they are
                let whole = random((m + 2, n), 3);
                let (before, view) = (whole.copy()?, whole.narrow(0, 1, m)?);
                add_product(&view, -2.0, &a, &b, Compute::F32)?;
                assert!(worst(&view, &(before.narrow(0, 1, m)? + plain(-2.0, &a, &b)?)?) < 4.0 * tolerance);
                for edge in [0, m + 1] {
                    assert_eq!(worst(&whole.narrow(0, edge, 1)?, &before.narrow(0, edge, 1)?), 0.0);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_row_of_a_thin_product_does_not_depend_on_its_batch() -> Result<()> {
        let (x, thin) = (random((50, 700), 1), random((8, 700), 2));
        let all = product(1.5, &x, &thin.t()?, Compute::F32)?;
        for row in [0, 1, 2, 31, 49] {
            let one = product(1.5, &x.narrow(0, row, 1)?, &thin.t()?, Compute::F32)?;
            assert_eq!(worst(&one, &all.narrow(0, row, 1)?), 0.0);
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (a, b) = (random((3, 4), 1), random((5, 6), 2));
        assert!(product(1.0, &a, &b, Compute::F32).is_err());
        assert!(add_product(&random((3, 5), 3), 1.0, &a, &random((4, 6), 4), Compute::F32).is_err());
    }
}
