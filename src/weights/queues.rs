//! A device's two queues, as the way of a matrix there needs them: one copies, one computes. Each does its work in
//! order; neither knows of the other, and the host waits for neither, unless it is told to.

use std::fmt;

use candle_core::{DType, Device, Result, Tensor};

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod host;

/// How many buffers take turns for large pieces.
pub const LARGE: usize = 3;
/// How many behind those for small ones, as scales, which have not to wait for a large one's copy.
pub const SMALL: usize = 8;
/// All of them.
pub const BUFFERS: usize = LARGE + SMALL;

/// A place in one of the queues.
#[derive(Debug)]
pub enum Event {
    /// Behind so many of what the queue does.
    Place(u64),
    /// An event of CUDA's.
    #[cfg(feature = "cuda")]
    Cuda(candle_core::cuda_backend::cudarc::driver::CudaEvent),
}

/// What a device offers. [`super::conveyor`] says who waits for whom.
pub trait Queues: fmt::Debug + Send + Sync {
    /// Memory of the device for so many numbers, which belongs to the queue of copies until that has given it away.
    fn room(&self, numbers: usize, kind: DType) -> Result<Tensor>;

    /// Memory that [`Queues::room`] made comes back, for its like or to be freed: behind what the queue of copies has
    /// been told to wait for, nothing uses it.
    fn take_back(&self, memory: Tensor);

    /// Has `fill` write the first `bytes` of a buffer on the host. No copy may still read it.
    fn fill(&self, buffer: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    /// Queues a copy of the first `bytes` of a buffer to a tensor that [`Queues::room`] made, from its byte `at` on,
    /// and returns the place behind it.
    fn copy(&self, buffer: usize, bytes: usize, to: &Tensor, at: usize) -> Result<Event>;

    /// The place behind all copies queued so far.
    fn copied(&self) -> Result<Event>;

    /// The place behind all that is computed so far.
    fn computed(&self) -> Result<Event>;

    /// Returns when the queue of copies is past that place.
    fn host_waits(&self, event: &Event) -> Result<()>;

    /// What is computed from now on waits for that place.
    fn computing_waits(&self, event: &Event) -> Result<()>;

    /// What is copied, given and taken back from now on waits for that place among what is computed.
    fn copying_waits(&self, event: &Event) -> Result<()>;
}

/// A device's.
///
/// # Errors
/// Where the device gives no second queue.
pub fn of(device: &Device) -> Result<Box<dyn Queues>> {
    Ok(match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => Box::new(cuda::Queues::new(card)?),
        other => Box::new(host::Queues::new(other)),
    })
}
