//! Products of dense f32 tensors of any strides, which is what the thin LoRA matrices need.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, bail};

use super::{
    gemm::{Dense, Lhs, Out, Threads, gemm},
    host::operand_mut,
};

/// `c[m, n] += alpha · a[m, k] · b[k, n]` in place; `c` is contiguous and may be a view, `a` and `b` may be transposed.
pub fn add_product(c: &Tensor, alpha: f64, a: &Tensor, b: &Tensor) -> Result<()> {
    if c.device().is_cpu() {
        return c.inplace_op3(a, b, &Product { alpha: alpha as f32, add: true });
    }
    let sum = (c + (a.contiguous()?.matmul(&b.contiguous()?)? * alpha)?)?;
    c.slice_set(&sum, 0, 0)
}

/// `alpha · a[m, k] · b[k, n]`.
pub fn product(alpha: f64, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a.contiguous()?.matmul(&b.contiguous()?)? * alpha;
    }
    let c = Tensor::zeros((a.dim(0)?, b.dim(1)?), a.dtype(), a.device())?;
    c.inplace_op3(a, b, &Product { alpha: alpha as f32, add: false })?;
    Ok(c)
}

struct Product {
    alpha: f32,
    add: bool,
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
        let out = Out { data: operand_mut(c, c_layout)?, ld: n, add: self.add };
        gemm([m, n, k], self.alpha, a, &b, out, Threads::All);
        Ok(())
    }
}
