//! Stored matrices as a device gets them: bytes as they are, or numbers decoded on the way, through buffers of bounded
//! size, so that the host holds no second copy.

use std::sync::{Arc, OnceLock};

use candle_core::{DType as Kind, Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::{
    DType,
    carrier::Carrier,
    conveyor::Conveyor,
    mapped::{MappedBytes, StoredMatrix},
};
use crate::kernels::{
    compute::Compute,
    dequantise::{Form, Numbers},
};

/// Bytes on their way at once, in large pieces: threads that begin a copy together lose time, and do so once a piece.
pub const STAGING: usize = 96 << 20;
/// Rows that a thread decodes at once; a multiple of what a transposed matrix decodes together.
const ROWS: usize = 32;
/// Bytes that a thread copies at once.
const BYTES: usize = 1 << 20;

/// Where matrices go, and in which type they will multiply. Clones share the way there.
#[derive(Debug, Clone)]
pub struct Uploader {
    /// The device.
    pub device: Device,
    /// The products' type: what a format without a form on devices is decoded to.
    pub compute: Compute,
    /// Bytes on their way at once.
    pub staging: usize,
    pub(crate) way: Arc<OnceLock<Carrier>>,
}

impl Uploader {
    /// To `device` by way of buffers of [`STAGING`] bytes together, which are there from the first matrix on.
    pub fn new(device: &Device, compute: Compute) -> Self {
        Self { device: device.clone(), compute, staging: STAGING, way: Arc::default() }
    }

    /// The same with so many bytes on their way at once.
    pub fn through(self, staging: usize) -> Self {
        Self { staging, ..self }
    }

    /// Who carries it there.
    ///
    /// # Errors
    /// Where the device has no room for another queue, or the system none for a thread.
    pub fn carrier(&self) -> Result<&Carrier> {
        if let Some(carrier) = self.way.get() {
            return Ok(carrier);
        }
        // of two threads that make one, one is dropped unused
        let made = Carrier::to(&self.device)?;
        Ok(self.way.get_or_init(|| made))
    }

    fn way(&self) -> Result<&Conveyor> {
        Ok(&self.carrier()?.conveyor)
    }

    /// What is computed from now on finds everything that was uploaded before.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn ready(&self) -> Result<()> {
        let way = self.way()?;
        way.ready(&way.sent()?)
    }

    /// Stored bytes as they are, as a vector of `kind` on its way to the device.
    ///
    /// # Errors
    /// Where the device has no room, or the file cannot be read.
    pub fn raw(&self, bytes: &MappedBytes, kind: Kind) -> Result<Tensor> {
        let size = kind.size_in_bytes();
        self.way()?.send((bytes.len() / size, kind), (self.staging, 1), |part, out| {
            let copied = out
                .par_chunks_mut(BYTES)
                .enumerate()
                .try_for_each(|(number, out)| bytes.copy(part.start * size + number * BYTES, out));
            copied.map_err(candle_core::Error::wrap)
        })
    }

    /// Stored numbers of `dtype`, as a vector of f32 on its way to the device.
    ///
    /// # Errors
    /// Where the device has no room, or the file cannot be read.
    pub fn widened(&self, bytes: &MappedBytes, dtype: DType) -> Result<Tensor> {
        if dtype == DType::F32 {
            return self.raw(bytes, Kind::F32);
        }
        let size = dtype.size();
        self.way()?.send((bytes.len() / size, Kind::F32), (self.staging, 1), |part, out| {
            let mut floats = vec![0f32; part.len()];
            dtype.decode(&bytes[part.start * size..part.end * size], &mut floats);
            write(&floats, Compute::F32, out);
            Ok(())
        })
    }

    /// These numbers, as a vector of f32 on its way to the device.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn floats(&self, floats: &[f32]) -> Result<Tensor> {
        self.way()?.send((floats.len(), Kind::F32), (self.staging, 1), |part, out| {
            write(&floats[part], Compute::F32, out);
            Ok(())
        })
    }

    /// A matrix `[rows, columns]` decoded here, in the products' type: what formats without a form on devices become.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn decoded(&self, stored: &(impl StoredMatrix + ?Sized), rows: usize, columns: usize) -> Result<Form> {
        let (kind, size) = match self.compute {
            Compute::F32 => (Kind::F32, 4),
            Compute::Bf16 => (Kind::BF16, 2),
        };
        let unit = ROWS * columns;
        let numbers = self.way()?.send((rows * columns, kind), (self.staging, unit), |part, out| {
            out.par_chunks_mut(unit * size).enumerate().for_each(|(number, out)| {
                let start = part.start / columns + number * ROWS;
                let mut floats = vec![0f32; out.len() / size];
                stored.decode(start..start + floats.len() / columns, 0..columns, &mut floats);
                write(&floats, self.compute, out);
            });
            Ok(())
        })?;
        stored.parts().into_iter().for_each(MappedBytes::done_with);
        Ok(Form { rows, columns, numbers: Numbers::Plain(numbers.reshape((rows, columns))?) })
    }
}

/// Numbers as bytes of the type in which they multiply.
fn write(floats: &[f32], compute: Compute, out: &mut [u8]) {
    match compute {
        Compute::F32 => {
            out.chunks_exact_mut(4).zip(floats).for_each(|(out, x)| out.copy_from_slice(&x.to_ne_bytes()));
        }
        Compute::Bf16 => {
            let rounded = |x: &f32| bf16::from_f32(*x).to_ne_bytes();
            out.chunks_exact_mut(2).zip(floats).for_each(|(out, x)| out.copy_from_slice(&rounded(x)));
        }
    }
}
