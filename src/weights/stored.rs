//! A tensor in whatever format it is stored.

use std::ops::Range;
use std::sync::Arc;

use super::mapped::{MappedBytes, MappedTensor, StoredMatrix};
use super::transposed::TransposedMatrix;
use super::upload::Uploader;
use crate::kernels::compute::Compute;
use crate::kernels::dequantise::Form;

/// A tensor of a model, plain or quantised. A clone is another view of the same bytes.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What its format is called, as in `bf16`, `Q4_K` or `nf4`.
    pub format: String,
    matrix: Arc<dyn StoredMatrix>,
}

impl StoredTensor {
    /// A tensor whose numbers `matrix` decodes: its rows are all dimensions but the last.
    pub fn new(shape: Vec<usize>, format: impl Into<String>, matrix: Arc<dyn StoredMatrix>) -> Self {
        Self { shape, format: format.into(), matrix }
    }

    /// Columns: the last dimension.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: the product of the others.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rows)| rows.iter().product())
    }

    /// The transpose of a matrix, another view of the same bytes.
    pub fn transposed(&self) -> Self {
        let (rows, columns) = (self.rows(), self.columns());
        let matrix = TransposedMatrix::new(Arc::clone(&self.matrix), columns);
        Self { shape: vec![columns, rows], format: self.format.clone(), matrix: Arc::new(matrix) }
    }

    /// A widened copy, for small tensors.
    pub fn to_f32(&self) -> Vec<f32> {
        let (rows, columns) = (self.rows(), self.columns());
        let mut out = vec![0.0; rows * columns];
        if !out.is_empty() {
            self.matrix.decode(0..rows, 0..columns, &mut out);
        }
        out
    }
}

impl From<MappedTensor> for StoredTensor {
    fn from(tensor: MappedTensor) -> Self {
        Self { shape: tensor.shape.clone(), format: tensor.dtype.to_string(), matrix: Arc::new(tensor) }
    }
}

impl StoredMatrix for StoredTensor {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        self.matrix.decode(rows, columns, out);
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        self.matrix.parts()
    }

    fn bf16(&self) -> Option<&[u8]> {
        self.matrix.bf16()
    }

    fn exact_in_bf16(&self) -> bool {
        self.matrix.exact_in_bf16()
    }

    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        self.matrix.on_device(rows, columns, uploader)
    }

    fn device_bytes(&self, numbers: usize, compute: Compute) -> usize {
        self.matrix.device_bytes(numbers, compute)
    }

    fn is_plain_on_device(&self, numbers: usize, compute: Compute) -> bool {
        self.matrix.is_plain_on_device(numbers, compute)
    }
}
