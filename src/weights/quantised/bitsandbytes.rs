//! bitsandbytes (Dettmers et al. 2022, 2023): 4-bit NF4 and FP4, with and without a second quantisation of their
//! scales, and 8-bit LLM.int8.

use candle_core::DType as Kind;
use serde_json::Value;

use super::lookup::{LookUp, Order};
use super::parts::{Floats, Parts};
use super::tiles::{ByTiles, Tiles, by_group};
use crate::Result;
use crate::kernels::dequantise::{self, Form, Numbers};
use crate::weights::dtype::DType;
use crate::weights::mapped::{MappedBytes, fetch};
use crate::weights::stored::StoredTensor;
use crate::weights::upload::Uploader;
use std::ops::Range;
use std::sync::Arc;

/// The sixteen values of NF4: quantiles of a normal distribution, scaled to −1 … 1 (QLoRA, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Numbers under one scale where nothing else is said.
pub const NF4_BLOCK: usize = 64;

/// What bitsandbytes multiplies 8-bit numbers with, beside a row's largest: 1/127 as it writes it.
const PER_127: f32 = 7.874_016e-3;

/// Takes every 4-bit and 8-bit matrix; how many there were.
pub(super) fn gather(parts: &mut Parts) -> Result<usize> {
    let mut found = 0;
    for kind in ["nf4", "fp4"] {
        let state = format!(".quant_state.bitsandbytes__{kind}");
        for name in parts.modules(&state) {
            let tensor = four_bit(parts, &name, &format!("{name}{state}"), kind)?;
            parts.put(name, tensor)?;
            found += 1;
        }
    }
    for module in parts.modules(".SCB") {
        let name = format!("{module}.weight");
        let (bytes, [rows, columns]) = parts.raw_matrix(&name, "I8")?;
        let largest = parts.floats(&format!("{module}.SCB"), &[rows])?;
        let format = format!("{module}.weight_format");
        // older versions saved what a forward pass had tiled for the tensor cores
        if parts.has(&format) && parts.raw(&format, "U8")?.bytes.iter().any(|layout| *layout != 0) {
            return Err(parts.unread(&format, "says that the weight's rows do not follow each other"));
        }
        let matrix = ByTiles(EightBit { bytes, largest, columns });
        parts.put(name, StoredTensor::new(vec![rows, columns], "int8", Arc::new(matrix)))?;
        found += 1;
    }
    Ok(found)
}

fn four_bit(parts: &mut Parts, name: &str, state: &str, kind: &'static str) -> Result<StoredTensor> {
    let text = parts.raw(state, "U8")?.bytes;
    let json: Value = serde_json::from_slice(&text).map_err(|e| parts.bad(state, &format!("is not JSON: {e}")))?;
    let bad = |parts: &Parts, field: &str| parts.bad(state, &format!("says {field}: {}", json[field]));
    let size = |field: &str| json[field].as_u64().filter(|n| (1..=1 << 24).contains(n)).map(|n| n as usize);

    let shape: Option<Vec<usize>> = json["shape"].as_array().and_then(|dims| {
        dims.iter().map(|dim| dim.as_u64().filter(|n| (1..=1 << 24).contains(n)).map(|n| n as usize)).collect()
    });
    let Some(&[rows, columns]) =
        shape.as_deref().and_then(|shape| shape.first_chunk::<2>().filter(|_| shape.len() == 2))
    else {
        return Err(bad(parts, "shape"));
    };
    let dtype = match json["dtype"].as_str() {
        Some("float32") => DType::F32,
        Some("float16") => DType::F16,
        Some("bfloat16") => DType::BF16,
        _ => return Err(bad(parts, "dtype")),
    };
    let block = size("blocksize").filter(|block| block.is_power_of_two()).ok_or_else(|| bad(parts, "blocksize"))?;
    let elements = rows * columns;
    // `bnb_4bit_quant_storage` may call them numbers of another type
    let packed = parts.bytes(name)?;
    if packed.bytes.len() != elements.div_ceil(2) {
        return Err(parts.bad(name, &format!("has {} bytes for {elements} numbers of four bits", packed.bytes.len())));
    }
    let blocks = elements.div_ceil(block);
    let part = |suffix: &str| format!("{name}.{suffix}");
    let mut codes = [0f32; 16];
    let map = parts.floats(&part("quant_map"), &[16])?;
    codes.iter_mut().enumerate().for_each(|(i, code)| *code = map.at(i));
    let absmax = match json.get("nested_blocksize").is_some() {
        false => Absmax::Plain(parts.floats(&part("absmax"), &[blocks])?),
        true => {
            let nested_block = size("nested_blocksize").ok_or_else(|| bad(parts, "nested_blocksize"))?;
            let offset = json["nested_offset"].as_f64().ok_or_else(|| bad(parts, "nested_offset"))? as f32;
            let quantised = parts.raw(&part("absmax"), "U8")?;
            if quantised.bytes.len() != blocks {
                return Err(parts.misfit(&part("absmax"), &quantised.shape, &[blocks]));
            }
            let map = parts.floats(&part("nested_quant_map"), &[256])?;
            let absmax = parts.floats(&part("nested_absmax"), &[blocks.div_ceil(nested_block)])?;
            Absmax::Nested { bytes: quantised.bytes, map, absmax, block: nested_block, offset }
        }
    };
    let matrix = ByTiles(FourBit { bytes: packed.bytes, codes, absmax, block, dtype, columns });
    Ok(StoredTensor::new(vec![rows, columns], kind, Arc::new(matrix)))
}

/// Blocks of the flattened matrix, two numbers a byte, the first in the high half.
#[derive(Debug)]
struct FourBit {
    bytes: MappedBytes,
    codes: [f32; 16],
    absmax: Absmax,
    block: usize,
    /// What bitsandbytes rounds to.
    dtype: DType,
    columns: usize,
}

/// The largest absolute value of each block.
#[derive(Debug)]
enum Absmax {
    Plain(Floats),
    /// Quantised by blocks in their turn.
    Nested {
        bytes: MappedBytes,
        map: Floats,
        absmax: Floats,
        block: usize,
        offset: f32,
    },
}

impl Absmax {
    /// Where loops take them from.
    #[inline(always)]
    fn at(&self) -> impl Fn(usize) -> f32 {
        let (absmax, nested) = match self {
            Self::Plain(absmax) => (absmax.view(), None),
            Self::Nested { bytes, map, absmax, block, offset } => {
                (absmax.view(), Some((&**bytes, map.view(), *block, *offset)))
            }
        };
        move |index| match nested {
            None => absmax.at(index),
            Some((bytes, map, block, offset)) => map.at(bytes[index].into()) * absmax.at(index / block) + offset,
        }
    }
}

impl Tiles for FourBit {
    #[inline(always)]
    fn tile(&self, lookup: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (bytes, absmax): (&[u8], _) = (&self.bytes, self.absmax.at());
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.columns;
            fetch(&self.bytes, (below + columns.start) / 2..(below + columns.end) / 2);
            by_group(row * self.columns + columns.start, self.block, out, |block, at, out| {
                let absmax = absmax(block);
                let values = lookup.rounded(self.dtype, self.codes.map(|code| code * absmax));
                // a row of an odd length may end between two halves of a byte
                let out = match at % 2 {
                    0 => out,
                    _ => {
                        let (first, out) = out.split_at_mut(1);
                        first[0] = values[usize::from(bytes[at / 2] & 15)];
                        out
                    }
                };
                lookup.look_up(&values, Order::HighFirst, &bytes[at.div_ceil(2)..], out);
            });
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        match &self.absmax {
            Absmax::Plain(absmax) => vec![&self.bytes, &absmax.bytes],
            Absmax::Nested { bytes, map, absmax, .. } => vec![&self.bytes, bytes, &map.bytes, &absmax.bytes],
        }
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }

    fn on_device(&self, rows: usize, uploader: &Uploader) -> candle_core::Result<Option<Form>> {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => dequantise::Absmax::Plain(absmax.on_device(uploader)?),
            Absmax::Nested { bytes, map, absmax, block, offset } => dequantise::Absmax::Nested {
                bytes: uploader.raw(bytes, Kind::U8)?,
                map: map.on_device(uploader)?,
                absmax: absmax.on_device(uploader)?,
                block: *block,
                offset: *offset,
            },
        };
        let four_bit = dequantise::FourBit {
            bytes: uploader.raw(&self.bytes, Kind::U8)?,
            codes: uploader.floats(&self.codes)?,
            absmax,
            block: self.block,
            round: self.dtype.into(),
        };
        Ok(Some(Form { rows, columns: self.columns, numbers: Numbers::FourBit(four_bit) }))
    }

    fn device_bytes(&self) -> Option<usize> {
        let as_f32 = |floats: &Floats| floats.bytes.len() / floats.dtype.size() * size_of::<f32>();
        let scales = match &self.absmax {
            Absmax::Plain(absmax) => as_f32(absmax),
            Absmax::Nested { bytes, map, absmax, .. } => bytes.len() + as_f32(map) + as_f32(absmax),
        };
        Some(self.bytes.len() + size_of_val(&self.codes) + scales)
    }
}

/// Signed bytes and the largest absolute value of each row.
#[derive(Debug)]
struct EightBit {
    bytes: MappedBytes,
    largest: Floats,
    columns: usize,
}

impl Tiles for EightBit {
    #[inline(always)]
    fn tile(&self, _: impl LookUp, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.columns;
            fetch(&self.bytes, below + columns.start..below + columns.end);
            let largest = self.largest.at(row);
            for (out, byte) in out.iter_mut().zip(&self.bytes[row * self.columns + columns.start..]) {
                *out = f32::from(*byte as i8) * largest * PER_127;
            }
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes, &self.largest.bytes]
    }
}
