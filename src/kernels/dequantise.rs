//! A frozen matrix on a device in the form that it has on disk, and the products with it.
//!
//! A quantised matrix stays its stored bytes; a product decodes the whole of it into one scratch, which is freed with
//! the product. Here everything is composed of candle's operations ([`plain`]), which any device has; a kernel of a
//! device's own takes over in [`dequantise`], [`apply`] or [`add_backward`], and has the plain form as its test.

use candle_core::{DType, Result, Tensor, bail};

use super::compute::Compute;

pub mod plain;

/// A matrix `[rows, columns]` on a device.
#[derive(Debug, Clone)]
pub struct Form {
    /// Rows: outputs.
    pub rows: usize,
    /// Columns: inputs.
    pub columns: usize,
    /// Its numbers.
    pub numbers: Numbers,
}

/// How the numbers lie.
#[derive(Debug, Clone)]
pub enum Numbers {
    /// f32, f16 or bf16, `[rows, columns]`.
    Plain(Tensor),
    /// ggml's blocks.
    Blocks(Blocks),
    /// bitsandbytes' 4-bit codes.
    FourBit(FourBit),
}

/// ggml's blocks, row after row.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// u8, `[rows, bytes of a row]`.
    pub bytes: Tensor,
    /// What the blocks are.
    pub kind: Block,
    /// Where a head's rows are stored as `[half, 2]` for what is `[2, half]` (a Llama's q and k): rows of a head, even.
    pub halves: Option<usize>,
}

/// ggml's formats that have a device form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)] // ggml's own names
pub enum Block {
    Q4_0,
    Q8_0,
    Q4_K,
    Q6_K,
}

impl Block {
    /// Numbers and bytes of a block.
    pub fn size(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q6_K => (256, 210),
        }
    }
}

/// Blocks of the flattened matrix, two codes a byte, the first in the high half. A number is `code · absmax` of its
/// block, rounded to `round`.
#[derive(Debug, Clone)]
pub struct FourBit {
    /// u8, `[⌈rows · columns / 2⌉]`.
    pub bytes: Tensor,
    /// The sixteen values that a code may mean: f32, `[16]`.
    pub codes: Tensor,
    /// The largest absolute value of each block.
    pub absmax: Absmax,
    /// Numbers in a block; a power of two.
    pub block: usize,
    /// What bitsandbytes rounds to: f32, f16 or bf16.
    pub round: DType,
}

/// Scales of blocks.
#[derive(Debug, Clone)]
pub enum Absmax {
    /// f32, `[blocks]`.
    Plain(Tensor),
    /// Quantised in their turn: `map[bytes[i]] · absmax[i / block] + offset`.
    Nested {
        /// u8, `[blocks]`.
        bytes: Tensor,
        /// f32, `[256]`.
        map: Tensor,
        /// f32, `[⌈blocks / block⌉]`.
        absmax: Tensor,
        /// Blocks under one of its scales.
        block: usize,
        /// f32.
        offset: f32,
    },
}

impl Form {
    /// All that it is made of.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match &self.numbers {
            Numbers::Plain(w) => vec![w],
            Numbers::Blocks(blocks) => vec![&blocks.bytes],
            Numbers::FourBit(FourBit { bytes, codes, absmax: Absmax::Plain(absmax), .. }) => vec![bytes, codes, absmax],
            Numbers::FourBit(FourBit {
                bytes,
                codes,
                absmax: Absmax::Nested { bytes: scales, map, absmax, .. },
                ..
            }) => vec![bytes, codes, scales, map, absmax],
        }
    }

    /// Bytes that it takes on its device.
    pub fn bytes(&self) -> usize {
        self.tensors().iter().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }
}

/// The matrix as numbers of `dtype` (f32 or bf16), contiguous `[rows, columns]`: the scratch of one product. f32 has
/// the bits of the CPU's decoder; bf16 is that rounded to nearest.
///
/// # Errors
/// Where the device has no room.
pub fn dequantise(form: &Form, dtype: DType) -> Result<Tensor> {
    match &form.numbers {
        Numbers::Plain(w) => w.to_dtype(dtype),
        #[cfg(any(feature = "cuda", feature = "metal"))]
        _ if super::gpu::dequantise::serves(form) => super::gpu::dequantise::decoded(form, dtype),
        _ => plain::dequantise(form, dtype),
    }
}

/// What [`apply`] takes of `x` when it multiplies in `compute`: made once for several matrices.
///
/// # Errors
/// Where the device has no room.
pub fn side(x: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::F32 => Ok(x.clone()),
        Compute::Bf16 => x.to_dtype(DType::BF16),
    }
}

/// `x[tokens, inputs] · Wᵀ`: f32, `[tokens, outputs]`. With bf16 both sides are rounded to it; sums are f32.
///
/// # Errors
/// Where shapes do not fit or the device has no room.
pub fn apply(form: &Form, x: &Tensor, compute: Compute) -> Result<Tensor> {
    if x.dims2()?.1 != form.columns {
        bail!("x {:?} does not fit a matrix of {} inputs", x.shape(), form.columns);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let dtype = numbers(compute);
        let y = super::gpu::launch::room((x.dim(0)?, form.rows), x)?;
        super::cuda::cublas::product(&y, 1.0, &x.to_dtype(dtype)?, &dequantise(form, dtype)?.t()?, 0.0, compute)?;
        return Ok(y);
    }
    operand(x, compute)?.matmul(&weight(form, compute)?.t()?)
}

/// `dx[tokens, inputs] += dy[tokens, outputs] · W`, in place; `dx` f32, contiguous, perhaps a view.
///
/// # Errors
/// As [`apply`].
pub fn add_backward(form: &Form, dx: &Tensor, dy: &Tensor, compute: Compute) -> Result<()> {
    if dy.dims2()?.1 != form.rows || dx.dims2()? != (dy.dim(0)?, form.columns) {
        bail!("dx {:?} and dy {:?} do not fit the matrix", dx.shape(), dy.shape());
    }
    #[cfg(feature = "cuda")]
    if dx.device().is_cuda() {
        let dtype = numbers(compute);
        return super::cuda::cublas::product(dx, 1.0, &dy.to_dtype(dtype)?, &dequantise(form, dtype)?, 1.0, compute);
    }
    dx.slice_set(&(dx + operand(dy, compute)?.matmul(&weight(form, compute)?)?)?, 0, 0)
}

/// Bytes that a product with a matrix of so many numbers takes beside operands and result: the decoded matrix, and its
/// widened copy.
pub fn scratch(numbers: usize, compute: Compute) -> usize {
    match compute {
        Compute::F32 => numbers * 4,
        Compute::Bf16 => numbers * (2 + 4),
    }
}

/// What the numbers of a product's sides are.
#[cfg(feature = "cuda")]
fn numbers(compute: Compute) -> DType {
    match compute {
        Compute::F32 => DType::F32,
        Compute::Bf16 => DType::BF16,
    }
}

/// A side of a product whose operands are of `compute`, widened: products of two bf16 numbers are exact in f32.
fn operand(x: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::F32 => Ok(x.clone()),
        Compute::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32),
    }
}

fn weight(form: &Form, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::F32 => dequantise(form, DType::F32),
        Compute::Bf16 => dequantise(form, DType::BF16)?.to_dtype(DType::F32),
    }
}
