//! A matrix of ggml blocks, in the rows' order that the model wants.

use std::ops::Range;
use std::sync::Arc;

use candle_core::DType as Kind;

use super::blocks::{GgmlType, RUN};
use super::file::{GgufFile, GgufTensor};
use crate::kernels::compute::Compute;
use crate::kernels::dequantise::{Block, Blocks, Form, Numbers};
use crate::weights::dtype::DType;
use crate::weights::folder::{Held, Unread};
use crate::weights::mapped::{MappedBytes, MappedTensor, StoredMatrix, fetch};
use crate::weights::stored::StoredTensor;
use crate::weights::upload::Uploader;

/// A tensor of a file; with `head_dim`, its rows put back in the order of halves.
pub(in crate::weights) fn held(file: &GgufFile, tensor: &GgufTensor, head_dim: Option<usize>) -> Held {
    let GgufTensor { kind, shape, range } = tensor.clone();
    let bytes = MappedBytes::new(Arc::clone(file.map()), range);
    let quantised = |matrix| Held::Quantised(StoredTensor::new(shape.clone(), kind.to_string(), matrix));
    let dtype = match kind {
        GgmlType::F32 => DType::F32,
        GgmlType::F16 => DType::F16,
        GgmlType::BF16 => DType::BF16,
        GgmlType::Other(name, ..) => {
            let file = file.metadata().path().to_path_buf();
            return Held::Unread(Unread { format: name, shape, bytes, file });
        }
        _ => {
            let (block, size) = kind.block();
            let row_bytes = shape[shape.len() - 1] / block * size;
            let stored = GgufMatrix { bytes, kind, row_bytes };
            return quantised(match head_dim {
                Some(head_dim) => Arc::new(HalvesTogether { stored, head_dim }),
                None => Arc::new(stored),
            });
        }
    };
    let stored = MappedTensor { bytes, dtype, shape: shape.clone() };
    match head_dim {
        Some(head_dim) => {
            let matrix = Arc::new(HalvesTogether { stored, head_dim });
            Held::Quantised(StoredTensor::new(shape, dtype.to_string(), matrix))
        }
        None => Held::Plain(stored),
    }
}

/// A matrix in one of ggml's block formats.
#[derive(Debug)]
pub struct GgufMatrix {
    /// Its blocks, row after row.
    pub bytes: MappedBytes,
    /// What they are.
    pub kind: GgmlType,
    /// Bytes of a row.
    pub row_bytes: usize,
}

impl StoredMatrix for GgufMatrix {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (block, size) = self.kind.block();
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * self.row_bytes;
            fetch(&self.bytes, below + columns.start / block * size..below + columns.end.div_ceil(block) * size);
            let row = &self.bytes[row * self.row_bytes..][..self.row_bytes];
            self.kind.decode(row, columns.start / RUN, out);
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes]
    }

    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        let Some(kind) = on_devices(self.kind) else { return uploader.decoded(self, rows, columns) };
        let bytes = uploader.raw(&self.bytes, Kind::U8)?.reshape((rows, self.row_bytes))?;
        Ok(Form { rows, columns, numbers: Numbers::Blocks(Blocks { bytes, kind, halves: None }) })
    }

    fn device_bytes(&self, numbers: usize, compute: Compute) -> usize {
        on_devices(self.kind).map_or(numbers * compute.size(), |_| self.bytes.len())
    }
}

/// The format as devices have it.
fn on_devices(kind: GgmlType) -> Option<Block> {
    match kind {
        GgmlType::Q4_0 => Some(Block::Q4_0),
        GgmlType::Q8_0 => Some(Block::Q8_0),
        GgmlType::Q4_K => Some(Block::Q4_K),
        GgmlType::Q6_K => Some(Block::Q6_K),
        _ => None,
    }
}

/// The q and k rows of a Llama: llama.cpp turns neighbours where transformers turns halves, so a head's rows
/// `[half, 2]` are stored for what is `[2, half]`.
#[derive(Debug)]
pub struct HalvesTogether<M> {
    /// As it is stored.
    pub stored: M,
    /// Rows of a head; even.
    pub head_dim: usize,
}

/// The row, in the order of halves, that is stored at `place`: the way back from [`HalvesTogether`].
pub fn row_of_halves(place: usize, head_dim: usize) -> usize {
    let (head, within) = (place / head_dim, place % head_dim);
    head * head_dim + within % 2 * (head_dim / 2) + within / 2
}

impl<M: StoredMatrix> HalvesTogether<M> {
    /// Bytes of its blocks, where a device has it in them; plain rows, of two bytes a number or more, are decoded to be
    /// put in order.
    fn blocks(&self, numbers: usize, compute: Compute) -> Option<usize> {
        Some(self.stored.device_bytes(numbers, compute)).filter(|bytes| *bytes < 2 * numbers)
    }
}

impl<M: StoredMatrix> StoredMatrix for HalvesTogether<M> {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let half = self.head_dim / 2;
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            let (head, within) = (row / self.head_dim, row % self.head_dim);
            let stored = head * self.head_dim + within % half * 2 + within / half;
            self.stored.decode(stored..stored + 1, columns.clone(), out);
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.stored.parts()
    }

    fn exact_in_bf16(&self) -> bool {
        self.stored.exact_in_bf16()
    }

    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        if self.blocks(rows * columns, uploader.compute).is_none() {
            return uploader.decoded(self, rows, columns);
        }
        let mut form = self.stored.on_device(rows, columns, uploader)?;
        let Numbers::Blocks(blocks) = &mut form.numbers else { return uploader.decoded(self, rows, columns) };
        blocks.halves = Some(self.head_dim);
        Ok(form)
    }

    fn device_bytes(&self, numbers: usize, compute: Compute) -> usize {
        self.blocks(numbers, compute).unwrap_or(numbers * compute.size())
    }
}
