//! A card's queues: candle's stream computes, a second one copies from memory that the card reads without the host
//! (pinned). Weights live in memory of the second stream.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{
    CudaDevice, CudaStorage, DType, Result, Storage, Tensor, bail,
    cuda_backend::{
        CudaDType, CudaStorageSlice, WrapErr,
        cudarc::driver::{CudaEvent, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, result::memcpy_htod_async},
    },
    op::BackpropOp,
};
use half::{bf16, f16};

use super::{BUFFERS, Event};

/// See the module.
#[derive(Debug)]
pub struct Queues {
    card: CudaDevice,
    copies: Arc<CudaStream>,
    buffers: Mutex<[Option<PinnedHostSlice<u8>>; BUFFERS]>,
}

impl Queues {
    /// A second stream beside candle's.
    ///
    /// # Errors
    /// Where the driver gives none, or candle's is not one stream for all threads.
    pub fn new(card: &CudaDevice) -> Result<Self> {
        // cudarc would order streams by events of its own, a pair for every tensor; `kernels::cuda::device::open` turns it off
        if card.is_event_tracking() {
            bail!("the card was opened another way than by this crate");
        }
        let copies = card.cuda_stream().context().new_stream().w()?;
        Ok(Self { card: card.clone(), copies, buffers: Mutex::default() })
    }

    fn buffers(&self) -> MutexGuard<'_, [Option<PinnedHostSlice<u8>>; BUFFERS]> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn numbers<T: CudaDType + DeviceRepr>(&self, numbers: usize) -> Result<CudaStorage> {
        // SAFETY: whoever computes with the numbers waits for the copies that fill them all; they are plain numbers.
        let slice = unsafe { self.copies.alloc::<T>(numbers) }.w()?;
        Ok(CudaStorage::wrap_cuda_slice(slice, self.card.clone()))
    }
}

/// Where a tensor made by [`Queues::numbers`] begins.
fn address(storage: &CudaStorage, stream: &CudaStream) -> Result<u64> {
    // without cudarc's own events the guards have nothing to do
    Ok(match &storage.slice {
        CudaStorageSlice::U8(slice) => slice.device_ptr(stream).0,
        CudaStorageSlice::F32(slice) => slice.device_ptr(stream).0,
        CudaStorageSlice::F16(slice) => slice.device_ptr(stream).0,
        CudaStorageSlice::BF16(slice) => slice.device_ptr(stream).0,
        _ => bail!("weights are bytes, f32, f16 or bf16 on a card"),
    })
}

impl super::Queues for Queues {
    fn room(&self, numbers: usize, kind: DType) -> Result<Tensor> {
        let storage = match kind {
            DType::U8 => self.numbers::<u8>(numbers),
            DType::F32 => self.numbers::<f32>(numbers),
            DType::F16 => self.numbers::<f16>(numbers),
            DType::BF16 => self.numbers::<bf16>(numbers),
            other => bail!("weights are bytes, f32, f16 or bf16 on a card, not {other:?}"),
        }?;
        Ok(Tensor::from_storage(Storage::Cuda(storage), numbers, BackpropOp::none(), false))
    }

    fn fill(&self, buffer: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let buffer = &mut self.buffers()[buffer];
        if buffer.as_ref().is_none_or(|held| held.len() < bytes) {
            // the smaller one goes first
            *buffer = None;
            // SAFETY: it is filled with zeros before anyone reads it. Not write-combined: formats are decoded in it.
            let mut held = unsafe { self.copies.context().alloc_pinned_with_flags::<u8>(bytes, 0) }.w()?;
            let start = held.as_mut_ptr().w()?;
            // SAFETY: `start` points to that many bytes, which nobody else has.
            unsafe { start.write_bytes(0, bytes) };
            *buffer = Some(held);
        }
        let Some(held) = buffer else { bail!("a buffer that was just made is gone") };
        fill(&mut held.as_mut_slice().w()?[..bytes]);
        Ok(())
    }

    fn copy(&self, buffer: usize, bytes: usize, to: &Tensor, at: usize) -> Result<Event> {
        let buffers = self.buffers();
        let Some(held) = &buffers[buffer] else { bail!("a copy from a buffer that was never filled") };
        let (storage, layout) = to.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a copy to a tensor that is not on the card") };
        if at + bytes > layout.shape().elem_count() * to.dtype().size_in_bytes() || layout.start_offset() != 0 {
            bail!("a copy of {bytes} bytes to byte {at} of {:?}", layout.shape());
        }
        let address = address(storage, &self.copies)? + at as u64;
        let from = &held.as_slice().w()?[..bytes];
        // SAFETY: the tensor has room for them behind `address`, as was looked at; the conveyor neither fills the buffer
        // again nor lets computing begin before the copy is done, and `room` made the memory in this stream's order.
        unsafe { memcpy_htod_async(address, from, self.copies.cu_stream()) }.w()?;
        self.copied()
    }

    fn copied(&self) -> Result<Event> {
        self.copies.record_event(None).map(Event::Cuda).w()
    }

    fn computed(&self) -> Result<Event> {
        self.card.cuda_stream().record_event(None).map(Event::Cuda).w()
    }

    fn host_waits(&self, event: &Event) -> Result<()> {
        of(event)?.synchronize().w()
    }

    fn computing_waits(&self, event: &Event) -> Result<()> {
        self.card.cuda_stream().wait(of(event)?).w()
    }

    fn copying_waits(&self, event: &Event) -> Result<()> {
        self.copies.wait(of(event)?).w()
    }
}

/// A card's own event.
fn of(event: &Event) -> Result<&CudaEvent> {
    match event {
        Event::Cuda(event) => Ok(event),
        Event::Place(_) => bail!("another device's event in a card's queue"),
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // the buffers go next, and a copy may still read one; a card that fails here has failed elsewhere before
        self.copies.synchronize().ok();
    }
}
