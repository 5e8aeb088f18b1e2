//! Quantised matrices as numbers on a GPU.

use candle_core::{DType, Result, Tensor, bail};

use super::launch::{Launch, a_thread_each, room_for, run};
use crate::kernels::dequantise::{Absmax, Block, Form, FourBit, Numbers};

/// Numbers that a thread decodes, as `dequantise.cu` and `dequantise.metal` have it: they share a scale.
const RUN: usize = 8;

/// Whether there is a kernel for blocks of so many numbers in four bits.
fn takes(block: usize) -> bool {
    block.is_power_of_two() && block >= RUN
}

/// Whether there is a kernel for this matrix, where it lies.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub fn serves(form: &Form) -> bool {
    let bytes = match &form.numbers {
        Numbers::Plain(_) => return false,
        Numbers::Blocks(blocks) => &blocks.bytes,
        Numbers::FourBit(four_bit) if !takes(four_bit.block) => return false,
        Numbers::FourBit(four_bit) => &four_bit.bytes,
    };
    // the kernels count numbers in 32 bits
    super::launch::compiled(bytes.device()) && form.rows * form.columns < 1 << 31
}

/// The matrix in `dtype`, by a kernel that gives it or from one that gives f32.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub fn decoded(form: &Form, dtype: DType) -> Result<Tensor> {
    let given = if cfg!(feature = "cuda") && dtype == DType::BF16 { dtype } else { DType::F32 };
    dequantise(form, given)?.to_dtype(dtype)
}

/// See [`crate::kernels::dequantise::dequantise`]: f32, or bf16 on CUDA, `[rows, columns]`.
pub fn dequantise(form: &Form, dtype: DType) -> Result<Tensor> {
    let narrow = match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        other => bail!("no kernel decodes to {other:?}"),
    };
    let (n, columns) = (form.rows * form.columns, form.columns);
    let groups = a_thread_each(n.div_ceil(RUN));
    match &form.numbers {
        Numbers::Plain(_) => bail!("a plain matrix has nothing to decode"),
        Numbers::Blocks(blocks) => {
            let kind = match blocks.kind {
                Block::Q4_0 => 0,
                Block::Q8_0 => 1,
                Block::Q4_K => 2,
                Block::Q6_K => 3,
            };
            let (row_bytes, halves) = (blocks.bytes.dim(1)?, blocks.halves.unwrap_or(0));
            let (numbers, size) = blocks.kind.size();
            if blocks.bytes.dim(0)? != form.rows || columns / numbers * size != row_bytes {
                bail!("blocks {:?} do not fit a matrix {} by {columns}", blocks.bytes.shape(), form.rows);
            }
            let out = room_for((form.rows, columns), dtype, &blocks.bytes)?;
            let words = [n as u32, columns as u32, row_bytes as u32, kind, halves as u32, narrow];
            run(&Launch { kernel: "dequantise_blocks", groups, words: &words }, &[&blocks.bytes], &[&out])?;
            Ok(out)
        }
        Numbers::FourBit(FourBit { bytes, codes, absmax, block, round }) => {
            let round = match round {
                DType::F32 => 0,
                DType::F16 => 1,
                DType::BF16 => 2,
                other => bail!("4-bit codes are not rounded to {other:?}"),
            };
            // plain scales need neither bytes nor a map: what stands in their place is not read
            let (absmax, absmax_bytes, map, nested, offset) = match absmax {
                Absmax::Plain(absmax) => (absmax, bytes, codes, 0, 0.0),
                Absmax::Nested { bytes, map, absmax, block, offset } => (absmax, bytes, map, *block, *offset),
            };
            let scales = if nested > 0 { absmax_bytes.elem_count() } else { absmax.elem_count() };
            if !takes(*block) {
                bail!("blocks of {block} numbers in 4 bits");
            }
            if bytes.elem_count() < n.div_ceil(2) || scales < n.div_ceil(*block) {
                bail!("{} bytes and {scales} scales for {n} numbers in 4 bits", bytes.elem_count());
            }
            let out = room_for((form.rows, columns), dtype, bytes)?;
            let words = [n as u32, block.trailing_zeros(), nested as u32, offset.to_bits(), round, narrow];
            let launch = Launch { kernel: "dequantise_four_bit", groups, words: &words };
            run(&launch, &[bytes, codes, absmax, absmax_bytes, map], &[&out])?;
            Ok(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{
        super::host::{knows_bf16, on},
        *,
    };
    use crate::kernels::{
        dequantise::{Blocks, plain},
        oracle::random,
    };

    /// Bytes of every value.
    fn bytes(n: usize, seed: u64) -> Vec<u8> {
        let floats = random(n, seed).to_vec1::<f32>().unwrap();
        floats.into_iter().map(|x| ((x + 1.0) * 128.0) as u8).collect()
    }

    fn equal_bits(ours: &Tensor, theirs: &Tensor) -> Result<()> {
        let bits = |x: &Tensor| -> Result<Vec<u32>> {
            Ok(x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        assert_eq!(ours.dims(), theirs.dims());
        assert!(bits(ours)? == bits(theirs)?);
        Ok(())
    }

    /// In f32, and where there are kernels for it in bf16.
    fn equal(there: &Form, here: &Form) -> Result<()> {
        equal_bits(&dequantise(there, DType::F32)?, &plain::dequantise(here, DType::F32)?)?;
        if knows_bf16() {
            let (ours, theirs) = (dequantise(there, DType::BF16)?, plain::dequantise(here, DType::BF16)?);
            equal_bits(&ours.to_dtype(DType::F32)?, &theirs.to_dtype(DType::F32)?)?;
        }
        Ok(())
    }

    #[test]
    fn blocks_have_the_bits_of_the_plain_form() -> Result<()> {
        for (kind, scales) in
            [(Block::Q4_0, &[0][..]), (Block::Q8_0, &[0]), (Block::Q4_K, &[0, 2]), (Block::Q6_K, &[208])]
        {
            let (numbers, size) = kind.size();
            for (rows, blocks, halves) in [(1, 1, None), (12, 3, None), (12, 2, Some(6))] {
                let mut stored = bytes(rows * blocks * size, 7);
                for block in stored.chunks_mut(size) {
                    // scales that are numbers, every seventh of them below the normal ones
                    scales.iter().for_each(|at| {
                        let high = block[at + 1];
                        block[at + 1] = if high % 7 == 0 { high & 0x83 } else { high & 0xbf };
                    });
                }
                let stored = Tensor::from_vec(stored, (rows, blocks * size), &Device::Cpu)?;
                on([&stored], |[there]| {
                    let form = |bytes: &Tensor| Form {
                        rows,
                        columns: blocks * numbers,
                        numbers: Numbers::Blocks(Blocks { bytes: bytes.clone(), kind, halves }),
                    };
                    equal(&form(there), &form(&stored))
                })?;
            }
        }
        Ok(())
    }

    /// A card's own NaN has all bits set.
    #[test]
    fn four_bit_codes_under_a_scale_that_is_no_number_are_none() -> Result<()> {
        let (packed, codes) = (Tensor::from_vec(bytes(32, 1), 32, &Device::Cpu)?, random(16, 2));
        let absmax = Tensor::new(&[f32::from_bits(0x7fff_ffff)], &Device::Cpu)?;
        on([&packed, &codes, &absmax], |[bytes, codes, absmax]| {
            for round in [DType::F32, DType::F16, DType::BF16] {
                let [bytes, codes, absmax] = [bytes, codes, absmax].map(Tensor::clone);
                let four_bit = FourBit { bytes, codes, absmax: Absmax::Plain(absmax), block: 64, round };
                let form = Form { rows: 1, columns: 64, numbers: Numbers::FourBit(four_bit) };
                for dtype in [DType::F32, DType::BF16].into_iter().take(1 + usize::from(knows_bf16())) {
                    let numbers = dequantise(&form, dtype)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                    assert!(numbers.iter().all(|x| x.is_nan()), "{round:?}, {dtype:?}: {numbers:?}");
                }
            }
            Ok(())
        })
    }

    #[test]
    fn four_bit_codes_have_the_bits_of_the_plain_form() -> Result<()> {
        for (rows, columns, block, inner) in [(1, 1, 64, 256), (3, 5, 8, 2), (7, 100, 64, 4), (16, 64, 64, 256)] {
            let n: usize = rows * columns;
            let (blocks, of_u8) = (n.div_ceil(block), |n, seed| {
                let bytes = bytes(n, seed);
                Tensor::from_vec(bytes, n, &Device::Cpu)
            });
            let (codes, map) = (random(16, 1), random(256, 2));
            // of all sizes, so that some round to f16's small numbers, some to nothing, and some are too large
            let absmax = |n: usize| (random(n, 3) * 24.0)?.exp()? * 1e-5;
            let (packed, scales) = (of_u8(n.div_ceil(2), 4)?, of_u8(blocks, 5)?);
            let (plain_absmax, outer) = (absmax(blocks)?, absmax(blocks.div_ceil(inner))?);
            let tensors = [&packed, &codes, &plain_absmax, &scales, &map, &outer];
            on(tensors, |there| {
                for (round, nested) in
                    [DType::F32, DType::F16, DType::BF16].into_iter().flat_map(|r| [(r, false), (r, true)])
                {
                    let form = |[packed, codes, absmax, scales, map, outer]: [&Tensor; 6]| {
                        let absmax = match nested {
                            false => Absmax::Plain(absmax.clone()),
                            true => Absmax::Nested {
                                bytes: scales.clone(),
                                map: map.clone(),
                                absmax: outer.clone(),
                                block: inner,
                                offset: 0.01,
                            },
                        };
                        let (bytes, codes) = (packed.clone(), codes.clone());
                        Form {
                            rows,
                            columns,
                            numbers: Numbers::FourBit(FourBit { bytes, codes, absmax, block, round }),
                        }
                    };
                    equal(&form(there), &form(tensors))?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
