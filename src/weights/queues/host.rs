//! The queues of a device that candle alone talks to. On Metal a copy is made as it is queued, by the thread that
//! queues it. On the CPU, which goes this way in tests alone, it is made when something waits for it, as late as a GPU
//! may make it: a wait that is missing shows as wrong numbers.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use candle_core::{DType, Device, Result, Tensor};

use super::{BUFFERS, Event};

/// See the module.
#[derive(Debug)]
pub struct Queues {
    device: Device,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    buffers: [Vec<u8>; BUFFERS],
    waiting: VecDeque<Copy>,
    made: u64,
}

#[derive(Debug)]
struct Copy {
    buffer: usize,
    bytes: usize,
    to: Tensor,
    at: usize,
}

impl State {
    fn queued(&self) -> u64 {
        self.made + self.waiting.len() as u64
    }

    fn make(&mut self, until: u64) -> Result<()> {
        while self.made < until {
            let Some(Copy { buffer, bytes, to, at }) = self.waiting.pop_front() else { break };
            let size = to.dtype().size_in_bytes();
            let part = &self.buffers[buffer][..bytes];
            to.slice_set(&Tensor::from_raw_buffer(part, to.dtype(), &[bytes / size], to.device())?, 0, at / size)?;
            self.made += 1;
        }
        Ok(())
    }
}

impl Queues {
    /// The queues of `device`.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), state: Mutex::default() }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait(&self, event: &Event) -> Result<()> {
        match event {
            Event::Place(until) => self.with(|state| state.make(*until)),
            #[cfg(feature = "cuda")]
            Event::Cuda(_) => candle_core::bail!("a card's event in another device's queue"),
        }
    }
}

impl super::Queues for Queues {
    fn room(&self, numbers: usize, kind: DType) -> Result<Tensor> {
        Tensor::zeros(numbers, kind, &self.device)
    }

    fn take_back(&self, _: Tensor) {}

    fn fill(&self, buffer: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.with(|state| {
            let buffer = &mut state.buffers[buffer];
            if buffer.len() < bytes {
                buffer.resize(bytes, 0);
            }
            fill(&mut buffer[..bytes]);
        });
        Ok(())
    }

    fn copy(&self, buffer: usize, bytes: usize, to: &Tensor, at: usize) -> Result<Event> {
        self.with(|state| {
            state.waiting.push_back(Copy { buffer, bytes, to: to.clone(), at });
            let behind = state.queued();
            if !self.device.is_cpu() {
                state.make(behind)?;
            }
            Ok(Event::Place(behind))
        })
    }

    fn copied(&self) -> Result<Event> {
        Ok(Event::Place(self.with(|state| state.queued())))
    }

    fn computed(&self) -> Result<Event> {
        Ok(Event::Place(0))
    }

    fn host_waits(&self, event: &Event) -> Result<()> {
        self.wait(event)
    }

    fn computing_waits(&self, event: &Event) -> Result<()> {
        self.wait(event)
    }

    fn copying_waits(&self, _: &Event) -> Result<()> {
        // candle keeps a tensor's memory until what it has computed with it is done
        Ok(())
    }
}
