//! The way of a stored matrix to a device: through a buffer of bounded size, so that the host holds no second copy.

use candle_core::{DType as Kind, Device, Result, Tensor};
use rayon::prelude::*;

use super::mapped::{MappedBytes, StoredMatrix};
use crate::kernels::{
    compute::Compute,
    dequantise::{Form, Numbers},
};

/// Bytes on their way at once.
pub const STAGING: usize = 64 << 20;
/// Rows that a thread decodes at once; a multiple of what a turned matrix decodes together.
const ROWS: usize = 32;

/// Where matrices go, and in which type they will multiply.
#[derive(Debug, Clone)]
pub struct Uploader {
    /// The device.
    pub device: Device,
    /// The products' type: what a format without a form on devices is decoded to.
    pub compute: Compute,
    /// Bytes on their way at once.
    pub staging: usize,
}

impl Uploader {
    /// To `device` by way of a buffer of [`STAGING`] bytes.
    pub fn new(device: &Device, compute: Compute) -> Self {
        Self { device: device.clone(), compute, staging: STAGING }
    }

    /// Stored bytes as they are, as a vector of `kind` on the device. Their pages are let go of on the way.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn raw(&self, bytes: &MappedBytes, kind: Kind) -> Result<Tensor> {
        let size = kind.size_in_bytes();
        let chunk = (self.staging / size).max(1) * size;
        let send = |part: &[u8]| Tensor::from_raw_buffer(part, kind, &[part.len() / size], &self.device);
        let all = if bytes.len() <= chunk {
            send(bytes)?
        } else {
            let all = Tensor::zeros(bytes.len() / size, kind, &self.device)?;
            for (number, part) in bytes.chunks(chunk).enumerate() {
                all.slice_set(&send(part)?, 0, number * chunk / size)?;
            }
            all
        };
        bytes.done_with();
        Ok(all)
    }

    /// A matrix `[rows, columns]` decoded here, in the products' type: what formats without a form on devices become.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn decoded(&self, stored: &(impl StoredMatrix + ?Sized), rows: usize, columns: usize) -> Result<Form> {
        let kind = match self.compute {
            Compute::F32 => Kind::F32,
            Compute::Bf16 => Kind::BF16,
        };
        let numbers = Tensor::zeros((rows, columns), kind, &self.device)?;
        // f32 numbers and what they become
        let band = (self.staging / (columns * (4 + kind.size_in_bytes())) / ROWS).max(1) * ROWS;
        for first in (0..rows).step_by(band) {
            let count = band.min(rows - first);
            let mut floats = vec![0f32; count * columns];
            floats.par_chunks_mut(ROWS * columns).enumerate().for_each(|(number, out)| {
                let start = first + number * ROWS;
                stored.decode(start..start + out.len() / columns, 0..columns, out);
            });
            let floats = Tensor::from_vec(floats, (count, columns), &Device::Cpu)?.to_dtype(kind)?;
            numbers.slice_set(&floats.to_device(&self.device)?, 0, first)?;
        }
        stored.parts().into_iter().for_each(MappedBytes::done_with);
        Ok(Form { rows, columns, numbers: Numbers::Plain(numbers) })
    }
}
