//! Numbers of a card in the host's memory for a while. They are copied there and back in the order of what is computed,
//! so that nobody waits; memory that the card reaches without the host (pinned) makes that possible.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{
            CudaContext, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits,
            result::{memcpy_dtoh_async, memcpy_htod_async},
        },
    },
    op::BackpropOp,
};

use super::device::pointer;

/// Numbers by which it grows: 64 MiB.
const UNIT: usize = 16 << 20;

/// What the last one had, for the next: to pin memory takes longer than to copy into it.
static SPARE: Mutex<Option<PinnedHostSlice<f32>>> = Mutex::new(None);

/// Numbers of the host in memory that cards reach, all zero. Not write-combined: the host may read them.
///
/// # Errors
/// Where the system does not have it to be pinned.
pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(
    context: &Arc<CudaContext>,
    numbers: usize,
) -> Result<PinnedHostSlice<T>> {
    // SAFETY: it is filled with zeros before anyone reads it.
    let mut memory = unsafe { context.alloc_pinned_with_flags::<T>(numbers, 0) }.w()?;
    let start = memory.as_mut_ptr().w()?;
    // SAFETY: `start` points to that many numbers, which nobody else has, and zero is one.
    unsafe { start.write_bytes(0, numbers) };
    Ok(memory)
}

fn exchange(memory: Option<PinnedHostSlice<f32>>) -> Option<PinnedHostSlice<f32>> {
    std::mem::replace(&mut SPARE.lock().unwrap_or_else(PoisonError::into_inner), memory)
}

/// Tensors by the order in which they were put in.
pub struct Pinned {
    card: CudaDevice,
    /// None once it is given back.
    memory: Option<PinnedHostSlice<f32>>,
    /// Where it begins.
    start: *mut f32,
    used: usize,
    /// The first number of each, and its shape.
    entries: Vec<(usize, Shape)>,
}

impl Pinned {
    /// Room for so many numbers.
    ///
    /// # Errors
    /// Where the system does not have it to be pinned.
    pub fn new(card: &CudaDevice, numbers: usize) -> Result<Self> {
        let stream = card.cuda_stream();
        let fits = |memory: &PinnedHostSlice<f32>| memory.len() >= numbers && memory.context() == stream.context();
        let mut memory = match exchange(None) {
            Some(memory) if fits(&memory) => memory,
            other => {
                // a copy may still read it
                stream.synchronize().w()?;
                drop(other);
                zeros(stream.context(), numbers.next_multiple_of(UNIT))?
            }
        };
        let start = memory.as_mut_ptr().w()?;
        Ok(Self { card: card.clone(), memory: Some(memory), start, used: 0, entries: Vec::new() })
    }

    /// Queues the copy of an f32 tensor to the host.
    ///
    /// # Errors
    /// Where there is no room, and where the card fails.
    pub fn put(&mut self, tensor: &Tensor) -> Result<()> {
        let numbers = tensor.elem_count();
        if self.used + numbers > self.memory.as_ref().map_or(0, |memory| memory.len()) {
            bail!("{numbers} numbers more than there is pinned memory for");
        }
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a tensor that is not on the card is kept on the host") };
        if tensor.dtype() != DType::F32 || !layout.is_contiguous() {
            bail!("a contiguous f32 tensor is kept on the host, not {:?} {layout:?}", tensor.dtype());
        }
        let stream = self.card.cuda_stream();
        let (from, _guard) = pointer(storage, layout, &stream)?;
        // SAFETY: the room was looked at, no other entry has it, and whoever reads it does so in this stream's order.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.start.add(self.used), numbers);
            memcpy_dtoh_async(to, from, stream.cu_stream()).w()?;
        }
        self.entries.push((self.used, layout.shape().clone()));
        self.used += numbers;
        Ok(())
    }

    /// Queues the copy of the `index`-th tensor back to the card.
    ///
    /// # Errors
    /// Where the card has no room.
    ///
    /// # Panics
    /// Where there is none.
    pub fn get(&self, index: usize) -> Result<Tensor> {
        let (at, shape) = &self.entries[index];
        let stream = self.card.cuda_stream();
        // SAFETY: the copy behind it in the same stream fills all of it.
        let slice = unsafe { self.card.alloc::<f32>(shape.elem_count()) }?;
        // SAFETY: as above; the host's memory stays until the stream is past the copy, as `drop` and `new` see to.
        unsafe {
            let from = std::slice::from_raw_parts(self.start.add(*at), shape.elem_count());
            memcpy_htod_async(slice.device_ptr(&stream).0, from, stream.cu_stream()).w()?;
        }
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.card.clone()));
        Ok(Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // the next one's copies come behind this one's in the stream
        if let Some(other) = exchange(self.memory.take()) {
            // two were in use at once; a card that fails here fails elsewhere too
            self.card.cuda_stream().synchronize().ok();
            drop(other);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::kernels::cuda::device;

    #[test]
    fn what_is_put_comes_back_in_any_order() {
        let Ok(on) = device::open(0) else {
            assert!(std::env::var_os("DPO_LORA_REQUIRE_ALL").is_none(), "no card");
            return eprintln!("skipped: no card");
        };
        let Device::Cuda(card) = &on else { panic!("a card is a card") };
        for round in 0..3 {
            let numbers = |i: usize| (0..6 * (i + 1)).map(|x| (100 * round + 10 * i + x) as f32).collect::<Vec<_>>();
            let mut pinned = Pinned::new(card, 36).unwrap();
            for i in 0..3 {
                let tensor = Tensor::from_vec(numbers(i), (2, 3 * (i + 1)), &on).unwrap();
                pinned.put(&tensor).unwrap();
            }
            let back: Vec<_> = [1, 0, 2].into_iter().map(|i| (i, pinned.get(i).unwrap())).collect();
            drop(pinned);
            for (i, tensor) in back {
                assert_eq!(tensor.dims(), [2, 3 * (i + 1)]);
                assert_eq!(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(), numbers(i), "round {round}");
            }
        }
        let mut pinned = Pinned::new(card, UNIT).unwrap();
        let bytes = Tensor::zeros(1, DType::U8, &on).unwrap();
        assert!(pinned.put(&bytes).is_err(), "not f32");
        pinned.used = UNIT;
        let one = Tensor::zeros(1, DType::F32, &on).unwrap();
        assert!(pinned.put(&one).is_err(), "no room");
    }
}
