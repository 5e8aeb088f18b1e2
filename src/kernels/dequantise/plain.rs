//! Decoders of quantised matrices in candle's operations: slow, on any device, with the bits of the CPU's own decoders.
//!
//! Bytes become f32, in which their halves and quarters are taken apart exactly; every product and difference is the one
//! that the CPU's decoder has, in its order.

use candle_core::{D, DType, Result, Tensor, bail};

use super::{Absmax, Block, Blocks, Form, FourBit, Numbers};

/// Numbers that are decoded at once: what lies between bytes and the result is some ten times as large.
const AT_ONCE: usize = 1 << 22;

/// See [`super::dequantise`].
///
/// # Errors
/// Where the device has no room, or the form's parts do not fit each other.
pub fn dequantise(form: &Form, dtype: DType) -> Result<Tensor> {
    let (rows, columns) = (form.rows, form.columns);
    match &form.numbers {
        Numbers::Plain(w) => w.to_dtype(dtype),
        Numbers::Blocks(blocks) => {
            let out = Tensor::zeros((rows, columns), dtype, blocks.bytes.device())?;
            // whole heads, so that a head's rows can be put in order
            let unit = blocks.halves.unwrap_or(1);
            let band = (AT_ONCE / columns / unit).max(1) * unit;
            for first in (0..rows).step_by(band) {
                let count = band.min(rows - first);
                let bytes = blocks.bytes.narrow(0, first, count)?;
                let decoded = ggml(blocks, &bytes)?.reshape((count, columns))?;
                let decoded = match blocks.halves {
                    None => decoded,
                    Some(head) => decoded
                        .reshape((count / head, head / 2, 2, columns))?
                        .transpose(1, 2)?
                        .contiguous()?
                        .reshape((count, columns))?,
                };
                out.slice_set(&decoded.to_dtype(dtype)?, 0, first)?;
            }
            Ok(out)
        }
        Numbers::FourBit(four_bit) => {
            let elements = rows * columns;
            let out = Tensor::zeros(elements, dtype, four_bit.bytes.device())?;
            let band = AT_ONCE.max(four_bit.block);
            for first in (0..elements).step_by(band) {
                let decoded = codes(four_bit, first, band.min(elements - first))?;
                out.slice_set(&decoded.to_dtype(dtype)?, 0, first)?;
            }
            out.reshape((rows, columns))
        }
    }
}

/// Bits `shift..shift + bits` of bytes that are held as f32.
fn bits(bytes: &Tensor, shift: u32, bits: u32) -> Result<Tensor> {
    let shifted = match shift {
        0 => bytes.clone(),
        _ => (bytes * 0.5f64.powi(shift as i32))?.floor()?,
    };
    let above = (&shifted * 0.5f64.powi(bits as i32))?.floor()?;
    shifted - (above * f64::from(1u32 << bits))?
}

/// Bytes, held as f32, as signed ones.
fn signed(bytes: &Tensor) -> Result<Tensor> {
    let negative = bytes.ge(128.0)?.to_dtype(DType::F32)?;
    bytes - (negative * 256.0)?
}

/// The halves that lie in bytes `at` and `at + 1` of each row, `[rows, 1]`. One that is no number becomes infinite.
fn halves(bytes: &Tensor, at: usize) -> Result<Tensor> {
    let (low, high) = (bytes.narrow(1, at, 1)?, bytes.narrow(1, at + 1, 1)?);
    let exponent = bits(&high, 2, 5)?;
    let mantissa = ((bits(&high, 0, 2)? * 256.0)? + low)?;
    let normal = exponent.ge(1.0)?.to_dtype(DType::F32)?;
    let scales: Vec<f32> = (0..32i32).map(|e| if e == 31 { f32::INFINITY } else { 2f32.powi(e.max(1) - 25) }).collect();
    let index = exponent.flatten_all()?.to_dtype(DType::U32)?;
    let scale = Tensor::new(scales, bytes.device())?.index_select(&index, 0)?.reshape(exponent.shape())?;
    let sign = (bits(&high, 7, 1)? * -2.0)?.affine(1.0, 1.0)?;
    ((mantissa + (normal * 1024.0)?)? * scale)? * sign
}

/// Rows of blocks as numbers, a block a row.
fn ggml(blocks: &Blocks, bytes: &Tensor) -> Result<Tensor> {
    let (_, size) = blocks.kind.size();
    let count = bytes.elem_count() / size;
    let bytes = bytes.contiguous()?.reshape((count, size))?.to_dtype(DType::F32)?;
    match blocks.kind {
        Block::Q4_0 => {
            let packed = bytes.narrow(1, 2, 16)?;
            let q = Tensor::cat(&[bits(&packed, 0, 4)?, bits(&packed, 4, 4)?], 1)?;
            (q - 8.0)?.broadcast_mul(&halves(&bytes, 0)?)
        }
        Block::Q8_0 => signed(&bytes.narrow(1, 2, 32)?)?.broadcast_mul(&halves(&bytes, 0)?),
        Block::Q4_K => q4_k(&bytes),
        Block::Q6_K => q6_k(&bytes),
    }
}

/// Four bits: d, dmin, 12 bytes of eight scales and minima, 128 bytes: two runs in the halves of 32 bytes.
fn q4_k(bytes: &Tensor) -> Result<Tensor> {
    let count = bytes.dim(0)?;
    let part = |at: usize| bytes.narrow(1, 4 + at, 4);
    let low = |at: usize| bits(&part(at)?, 0, 6);
    // runs 4 to 7: four bits of the last bytes, two of the first
    let both = part(8)?;
    let high = |at: usize, shift: u32| bits(&both, shift, 4)? + (bits(&part(at)?, 6, 2)? * 16.0)?;
    let scales = Tensor::cat(&[low(0)?, high(0, 0)?], 1)?.broadcast_mul(&halves(bytes, 0)?)?;
    let minima = Tensor::cat(&[low(4)?, high(4, 4)?], 1)?.broadcast_mul(&halves(bytes, 2)?)?;
    let packed = bytes.narrow(1, 16, 128)?.reshape((count, 4, 1, 32))?;
    let q = Tensor::cat(&[bits(&packed, 0, 4)?, bits(&packed, 4, 4)?], 2)?.reshape((count, 8, 32))?;
    q.broadcast_mul(&scales.unsqueeze(D::Minus1)?)?.broadcast_sub(&minima.unsqueeze(D::Minus1)?)?.reshape((count, 256))
}

/// Six bits: 128 bytes of low halves, 64 of high quarters, 16 signed scales, d.
fn q6_k(bytes: &Tensor) -> Result<Tensor> {
    let count = bytes.dim(0)?;
    let scales = signed(&bytes.narrow(1, 192, 16)?)?.broadcast_mul(&halves(bytes, 208)?)?;
    // of each half block: four runs of 32
    let low = bytes.narrow(1, 0, 128)?.reshape((count, 2, 2, 32))?;
    let low = Tensor::cat(&[bits(&low, 0, 4)?, bits(&low, 4, 4)?], 2)?;
    let high = bytes.narrow(1, 128, 64)?.reshape((count, 2, 1, 32))?;
    let high = Tensor::cat(&[bits(&high, 0, 2)?, bits(&high, 2, 2)?, bits(&high, 4, 2)?, bits(&high, 6, 2)?], 2)?;
    let q = ((low + (high * 16.0)?)? - 32.0)?.reshape((count, 16, 16))?;
    q.broadcast_mul(&scales.unsqueeze(D::Minus1)?)?.reshape((count, 256))
}

/// `count` numbers from number `first`, where a block begins, on.
fn codes(form: &FourBit, first: usize, count: usize) -> Result<Tensor> {
    if !first.is_multiple_of(form.block) || !first.is_multiple_of(2) {
        bail!("codes begin within a block");
    }
    let bytes = form.bytes.narrow(0, first / 2, count.div_ceil(2))?.to_dtype(DType::F32)?.unsqueeze(1)?;
    let indices = Tensor::cat(&[bits(&bytes, 4, 4)?, bits(&bytes, 0, 4)?], 1)?.flatten_all()?.narrow(0, 0, count)?;
    let values = form.codes.index_select(&indices.to_dtype(DType::U32)?, 0)?;
    let (from, blocks) = (first / form.block, count.div_ceil(form.block));
    let absmax = scales(&form.absmax, from, blocks)?.unsqueeze(1)?.broadcast_as((blocks, form.block))?;
    let absmax = absmax.contiguous()?.flatten_all()?.narrow(0, 0, count)?;
    (values * absmax)?.to_dtype(form.round)?.to_dtype(DType::F32)
}

/// The scales of `count` blocks from block `first` on.
fn scales(absmax: &Absmax, first: usize, count: usize) -> Result<Tensor> {
    match absmax {
        Absmax::Plain(absmax) => absmax.narrow(0, first, count),
        Absmax::Nested { bytes, map, absmax, block, offset } => {
            let indices = bytes.narrow(0, first, count)?.to_dtype(DType::U32)?;
            let outer: Vec<u32> = (first..first + count).map(|i| (i / block) as u32).collect();
            let outer = absmax.index_select(&Tensor::new(outer, bytes.device())?, 0)?;
            (map.index_select(&indices, 0)? * outer)? + f64::from(*offset)
        }
    }
}
