//! Norms that llama.cpp's converter stored with one added, as Gemma's are: what is computed with is `1 + w`.
//!
//! The difference is exact where what is stored is 0.5 or more, and below that rounded to f32 as any other.

use std::ops::Range;
use std::sync::Arc;

use super::blocks::GgmlType;
use super::file::{GgufFile, GgufTensor};
use crate::weights::dtype::DType;
use crate::weights::folder::Held;
use crate::weights::mapped::{MappedBytes, MappedTensor, StoredMatrix};
use crate::weights::stored::StoredTensor;

/// A tensor of plain numbers less one each; `None` where the numbers are in blocks.
pub(in crate::weights) fn held(file: &GgufFile, tensor: &GgufTensor) -> Option<Held> {
    let dtype = match tensor.kind {
        GgmlType::F32 => DType::F32,
        GgmlType::F16 => DType::F16,
        GgmlType::BF16 => DType::BF16,
        _ => return None,
    };
    let (shape, bytes) = (tensor.shape.clone(), MappedBytes::new(Arc::clone(file.map()), tensor.range.clone()));
    let stored = LessOne { stored: MappedTensor { bytes, dtype, shape: shape.clone() } };
    Some(Held::Quantised(StoredTensor::new(shape, dtype.to_string(), Arc::new(stored))))
}

/// The numbers of another less one each.
#[derive(Debug)]
pub struct LessOne<M> {
    /// As they are stored.
    pub stored: M,
}

impl<M: StoredMatrix> StoredMatrix for LessOne<M> {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        self.stored.decode(rows, columns, out);
        out.iter_mut().for_each(|x| *x -= 1.0);
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.stored.parts()
    }
}
