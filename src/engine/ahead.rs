//! How far the host runs ahead of a card: it queues one layer's work while the card does the one before.
//!
//! That keeps the card busy. Further ahead nothing is gained, and memory that is freed behind work which waits in the
//! queue is not joined to its neighbours in CUDA's pool: the pool grows by what no longer fits, step after step
//! (docs/memory.md).

use candle_core::{Device, Result};

/// One pass's.
pub struct Ahead<'a> {
    device: &'a Device,
    #[cfg(feature = "cuda")]
    before: Option<candle_core::cuda_backend::cudarc::driver::CudaEvent>,
}

impl<'a> Ahead<'a> {
    /// Nothing is queued yet.
    pub fn of(device: &'a Device) -> Self {
        Self {
            device,
            #[cfg(feature = "cuda")]
            before: None,
        }
    }

    /// A layer's work on a micro-batch is queued: returns when that of the one before is done.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn queued(&mut self) -> Result<()> {
        match self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(card) => {
                use candle_core::cuda_backend::WrapErr;
                let now = card.cuda_stream().record_event(None).w()?;
                self.before.replace(now).map_or(Ok(()), |before| before.synchronize().w())
            }
            _ => Ok(()),
        }
    }
}
