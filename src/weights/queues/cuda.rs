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
use crate::kernels::cuda::pinned::zeros;

/// Bytes of the smallest buffer.
const LEAST: usize = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct Queues {
    card: CudaDevice,
    copies: Arc<CudaStream>,
    buffers: Mutex<[Option<PinnedHostSlice<u8>>; BUFFERS]>,
    /// Memory of matrices that are gone, for others of their size: where layers stream the card's pool is not asked
    /// again and again, which would cut it to pieces and order the streams by waits of its own.
    spare: Mutex<Vec<Tensor>>,
}

impl Queues {
    /// A second stream beside candle's.
    ///
    /// # Errors
    /// Where the driver gives none, or candle's is not one stream for all threads.
    pub fn new(card: &CudaDevice) -> Result<Self> {
        // cudarc would order streams by events of its own, a pair for every tensor; `kernels::cuda::device::open` turns
        // it off
        if card.is_event_tracking() {
            bail!("the card was opened another way than by this crate");
        }
        let copies = card.cuda_stream().context().new_stream().w()?;
        Ok(Self { card: card.clone(), copies, buffers: Mutex::default(), spare: Mutex::default() })
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Tensor>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut spare = self.spare();
        if let Some(at) = spare.iter().position(|spare| spare.dtype() == kind && spare.elem_count() == numbers) {
            return Ok(spare.swap_remove(at));
        }
        // what fits nothing goes, so that no more is held than without spare memory
        let mut missing = numbers * kind.size_in_bytes();
        while let Some(gone) = spare.pop_if(|_| missing > 0) {
            missing = missing.saturating_sub(gone.elem_count() * gone.dtype().size_in_bytes());
        }
        drop(spare);
        let storage = match kind {
            DType::U8 => self.numbers::<u8>(numbers),
            DType::F32 => self.numbers::<f32>(numbers),
            DType::F16 => self.numbers::<f16>(numbers),
            DType::BF16 => self.numbers::<bf16>(numbers),
            other => bail!("weights are bytes, f32, f16 or bf16 on a card, not {other:?}"),
        }?;
        Ok(Tensor::from_storage(Storage::Cuda(storage), numbers, BackpropOp::none(), false))
    }

    fn take_back(&self, memory: Tensor) {
        self.spare().push(memory);
    }

    fn fill(&self, buffer: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let buffer = &mut self.buffers()[buffer];
        if buffer.as_ref().is_none_or(|held| held.len() < bytes) {
            // the smaller one goes first; small pieces do not make it grow one by one
            *buffer = None;
            let bytes = bytes.next_power_of_two().max(LEAST);
            *buffer = Some(zeros(self.copies.context(), bytes)?);
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
        // SAFETY: the tensor has room for them behind `address`, as was looked at; the conveyor neither fills the
        // buffer again nor lets computing begin before the copy is done, and `room` made the memory in this stream's
        // order.
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

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use candle_core::{Device, cuda_backend::cudarc::driver::CudaSlice};

    use super::{super::LARGE, *};
    use crate::{
        kernels::{
            compute::Compute,
            cuda::device,
            dequantise::{Form, Numbers},
        },
        weights::{StoredMatrix, conveyor::Memory, mapped::MappedBytes, resident::Resident, upload::Uploader},
    };

    const ROWS: usize = 200;
    const COLUMNS: usize = 8;

    /// A matrix that counts on from a number.
    #[derive(Debug)]
    struct Counting(usize);

    impl StoredMatrix for Counting {
        fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
            let at = |i: usize| self.0 + (rows.start + i / columns.len()) * COLUMNS + columns.start + i % columns.len();
            out.iter_mut().enumerate().for_each(|(i, out)| *out = at(i) as f32);
        }

        fn parts(&self) -> Vec<&MappedBytes> {
            Vec::new()
        }
    }

    /// A card, or what stands for one (`ci/made-up-card.sh`).
    fn card() -> Option<(Device, CudaDevice)> {
        match device::open(0) {
            Ok(Device::Cuda(card)) => Some((Device::Cuda(card.clone()), card)),
            Ok(_) => panic!("a card is a card"),
            Err(error) if std::env::var_os("DPO_LORA_REQUIRE_ALL").is_some() => panic!("{error}"),
            Err(_) => {
                eprintln!("skipped: no card");
                None
            }
        }
    }

    /// Queues a copy of a matrix behind what else is computed.
    fn computed(card: &CudaDevice, form: &Form) -> CudaSlice<f32> {
        let Numbers::Plain(numbers) = &form.numbers else { panic!("plain numbers") };
        let (storage, _) = numbers.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { panic!("a tensor on the card") };
        let mut out = card.alloc_zeros::<f32>(ROWS * COLUMNS).unwrap();
        card.memcpy_dtod(storage.as_cuda_slice::<f32>().unwrap(), &mut out).unwrap();
        out
    }

    #[test]
    fn layers_that_stream_to_a_card_are_whole_when_they_are_used() {
        let Some((device, card)) = card() else { return };
        // seven pieces a matrix
        let uploader = Uploader::new(&device, Compute::F32).through(LARGE * 32 * COLUMNS * 4);
        let matrix = |first: usize| Arc::new(Resident::new(Arc::new(Counting(first)), ROWS, COLUMNS, uploader.clone()));
        let layers: Vec<[_; 3]> =
            (0..6).map(|layer| std::array::from_fn(|i| matrix(10_000 * layer + 2_000 * i))).collect();
        let mut all = Vec::new();
        for order in [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]] {
            for (i, layer) in order.into_iter().enumerate() {
                if let Some(next) = order.get(i + 1) {
                    layers[*next].iter().for_each(Resident::will_need);
                }
                for (number, matrix) in layers[layer].iter().enumerate() {
                    all.push((10_000 * layer + 2_000 * number, computed(&card, &matrix.form().unwrap())));
                }
                layers[layer].iter().for_each(|matrix| matrix.done_with(Memory::Kept));
            }
        }
        drop((layers, uploader));
        for (first, numbers) in all {
            let numbers = card.clone_dtoh(&numbers).unwrap();
            let whole = numbers.iter().enumerate().all(|(i, x)| *x == (first + i) as f32);
            assert!(whole, "the matrix from {first}: {:?}", &numbers[..8]);
        }
    }

    #[test]
    fn every_type_of_weights_arrives_as_it_is() {
        let Some((device, card)) = card() else { return };
        let queues = Queues::new(&card).unwrap();
        use super::super::Queues as _;
        for kind in [DType::U8, DType::F16, DType::BF16, DType::F32] {
            let (size, numbers) = (kind.size_in_bytes(), 48);
            let to = queues.room(numbers, kind).unwrap();
            let mut events = Vec::new();
            // the second half first
            for half in [1, 0] {
                let bytes = numbers / 2 * size;
                queues.fill(half, bytes, &mut |out| out.fill(0x31 + half as u8)).unwrap();
                events.push(queues.copy(half, bytes, &to, half * bytes).unwrap());
            }
            assert!(queues.copy(0, 1, &to, numbers * size).is_err(), "beyond the end");
            queues.computing_waits(events.last().unwrap()).unwrap();
            let bytes = match kind {
                DType::U8 => to.to_vec1::<u8>().unwrap(),
                DType::F16 => to.to_vec1::<f16>().unwrap().into_iter().flat_map(f16::to_ne_bytes).collect(),
                DType::BF16 => to.to_vec1::<bf16>().unwrap().into_iter().flat_map(bf16::to_ne_bytes).collect(),
                _ => to.to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_ne_bytes).collect(),
            };
            let (first, second) = bytes.split_at(numbers / 2 * size);
            assert!(first.iter().all(|byte| *byte == 0x31) && second.iter().all(|byte| *byte == 0x32), "{kind:?}");
        }
        assert!(queues.room(1, DType::I64).is_err());
        drop(device);
    }

    #[test]
    fn a_card_that_orders_streams_itself_is_refused() {
        if card().is_some() {
            let Ok(Device::Cuda(card)) = Device::new_cuda(0) else { panic!("a card that opens twice") };
            assert!(Queues::new(&card).is_err());
        }
    }
}
