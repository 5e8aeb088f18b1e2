//! Products by cuBLAS, which counts columns where candle counts rows: `c = a · b` is asked for as `cᵀ = bᵀ · aᵀ`, whose
//! matrices lie in memory as these do.

use candle_core::{Result, Shape, bail};

/// A product as cuBLAS takes it; its first operand is `b`, its second `a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Rows and columns of `cᵀ`, and what is summed over.
    pub sizes: [usize; 3],
    /// Whether the operands are transposed.
    pub transposed: [bool; 2],
    /// From column to column of the operands and of `cᵀ`.
    pub leading: [usize; 3],
}

/// How `c[m, n] = a[m, k] · b[k, n]` is asked for, given the shapes and strides of `a` and `b`; `c` is contiguous.
///
/// # Errors
/// Where the shapes do not fit or a side has neither its rows nor its columns in one piece.
pub fn call(c: &Shape, a: (&Shape, &[usize]), b: (&Shape, &[usize])) -> Result<Call> {
    let ((m, n), (rows, k), (depth, columns)) = (c.dims2()?, a.0.dims2()?, b.0.dims2()?);
    if (rows, depth, columns) != (m, k, n) || [m, n, k].iter().any(|size| *size > i32::MAX as usize) {
        bail!("product: {c:?} of {:?} and {:?}", a.0, b.0);
    }
    let ((b_transposed, b_leading), (a_transposed, a_leading)) = (lies([k, n], b.1)?, lies([m, k], a.1)?);
    Ok(Call { sizes: [n, m, k], transposed: [b_transposed, a_transposed], leading: [b_leading, a_leading, n.max(1)] })
}

/// Whether a matrix has its columns in one piece instead of its rows, and how far it is from one to the next.
fn lies([rows, columns]: [usize; 2], stride: &[usize]) -> Result<(bool, usize)> {
    if stride[1] == 1 || columns == 1 {
        // of a single row the stride says nothing
        Ok((false, if rows == 1 { columns.max(1) } else { stride[0] }))
    } else if stride[0] == 1 || rows == 1 {
        Ok((true, if columns == 1 { rows.max(1) } else { stride[1] }))
    } else {
        bail!("product: a matrix of strides {stride:?}")
    }
}

#[cfg(feature = "cuda")]
mod on_card {
    use std::ffi::c_void;

    use candle_core::{
        DType, Device, Result, Storage, Tensor, bail,
        cuda_backend::cudarc::cublas::{
            result::gemm_ex,
            sys::{
                cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32},
                cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
                cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T},
                cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F},
            },
        },
    };

    use super::super::device::pointer;
    use crate::kernels::compute::Compute;

    /// `c = alpha · a · b + beta · c`, in place, sums in f32: `c` f32 and contiguous, perhaps a view; `a` and `b` both
    /// f32 or both bf16, perhaps transposed. With a `beta` of 0 what `c` held is not read. A run that multiplies in bf16
    /// multiplies f32 in TF32: the matrix unit takes 10 bits of it, more than of bf16.
    ///
    /// # Errors
    /// Where shapes, types or places do not fit, or cuBLAS refuses.
    pub fn product(c: &Tensor, alpha: f32, a: &Tensor, b: &Tensor, beta: f32, compute: Compute) -> Result<()> {
        let Device::Cuda(device) = c.device() else { bail!("product: not on a CUDA card") };
        let operand = match (a.dtype(), b.dtype()) {
            (DType::F32, DType::F32) => CUDA_R_32F,
            (DType::BF16, DType::BF16) => CUDA_R_16BF,
            other => bail!("product: no product of {other:?}"),
        };
        if c.dtype() != DType::F32 || !c.is_contiguous() {
            bail!("product: a result {:?} in {:?}", c.shape(), c.dtype());
        }
        let way = match (operand, compute) {
            (CUDA_R_32F, Compute::Bf16) => CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => CUBLAS_COMPUTE_32F,
        };
        let call = super::call(c.shape(), (a.shape(), a.stride()), (b.shape(), b.stride()))?;
        if c.elem_count() == 0 {
            return Ok(());
        }
        let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
        let held = [b, a, c].map(|tensor| tensor.storage_and_layout());
        let mut pointers = Vec::new();
        for (storage, layout) in &held {
            let Storage::Cuda(storage) = &**storage else { bail!("product: a matrix is not on the card") };
            pointers.push(pointer(storage, layout, &stream)?);
        }
        let transposed = call.transposed.map(|transposed| if transposed { CUBLAS_OP_T } else { CUBLAS_OP_N });
        let ([m, n, k], [ldb, lda, ldc]) = (call.sizes.map(|n| n as i32), call.leading.map(|n| n as i32));
        let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
        // SAFETY: sizes and strides are those of tensors that exist and `held` keeps them until the work is in candle's
        // stream, which the handle works on; the factors are read before the call returns.
        let done = unsafe {
            gemm_ex(
                *blas.handle(),
                transposed[0],
                transposed[1],
                m,
                n,
                k,
                alpha.cast(),
                pointers[0].0 as *const c_void,
                operand,
                ldb,
                pointers[1].0 as *const c_void,
                operand,
                lda,
                beta.cast(),
                pointers[2].0 as *mut c_void,
                CUDA_R_32F,
                ldc,
                way,
                CUBLAS_GEMM_DFALT,
            )
        };
        done.map_err(candle_core::Error::wrap)
    }
}
#[cfg(feature = "cuda")]
pub use on_card::product;

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::kernels::oracle::{random, worst};

    /// What cuBLAS does: `c(i, j) = Σ op(A)(i, l) · op(B)(l, j)`, all by columns.
    fn obey(call: Call, first: &[f32], second: &[f32]) -> Vec<f32> {
        let ([m, n, k], [lda, ldb, ldc]) = (call.sizes, call.leading);
        assert!(
            lda >= if call.transposed[0] { k } else { m } && ldb >= if call.transposed[1] { n } else { k } && ldc >= m
        );
        let at = |transposed: bool, i: usize, j: usize, ld: usize| if transposed { j + i * ld } else { i + j * ld };
        let mut c = vec![0f32; m * n];
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            for l in 0..k {
                c[i + j * ldc] += first[at(call.transposed[0], i, l, lda)] * second[at(call.transposed[1], l, j, ldb)];
            }
        }
        c
    }

    #[test]
    fn what_is_asked_for_is_the_product_at_any_strides() -> Result<()> {
        for [m, n, k] in [[1, 1, 1], [5, 4, 7], [3, 1, 6], [1, 5, 2], [4, 6, 1], [1, 1, 9]] {
            for (a_transposed, b_transposed, wide) in
                [(false, false, 0), (true, false, 0), (false, true, 3), (true, true, 0), (false, false, 2)]
            {
                let side = |rows: usize, columns: usize, transposed: bool, seed: u64| -> Result<(Tensor, Tensor)> {
                    let (r, c) = if transposed { (columns, rows) } else { (rows, columns) };
                    let whole = random((r, c + wide), seed);
                    let part = whole.narrow(1, 0, c)?;
                    Ok((whole, if transposed { part.t()? } else { part }))
                };
                let ((a_whole, a), (b_whole, b)) = (side(m, k, a_transposed, 1)?, side(k, n, b_transposed, 2)?);
                let call = call(&Shape::from((m, n)), (a.shape(), a.stride()), (b.shape(), b.stride()))?;
                let (first, second) = (b_whole.flatten_all()?.to_vec1()?, a_whole.flatten_all()?.to_vec1()?);
                let ours = Tensor::from_vec(obey(call, &first, &second), (m, n), &Device::Cpu)?;
                assert!(worst(&ours, &a.contiguous()?.matmul(&b.contiguous()?)?) < 1e-5, "{m} {n} {k} {call:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let shape = |m: usize, n: usize| Shape::from((m, n));
        assert!(call(&shape(2, 3), (&shape(2, 4), &[4, 1]), (&shape(5, 3), &[3, 1])).is_err());
        assert!(call(&shape(2, 3), (&shape(2, 4), &[8, 2]), (&shape(4, 3), &[3, 1])).is_err());
    }
}
