//! The way of weights to a device, and who waits for whom on it. Two buffers take turns, so that one is filled from the map
//! while the copy out of the other is under way; copies are made beside what the device computes.
//!
//! 1. A buffer is filled again when the copy out of it is done: [`Conveyor::send`].
//! 2. What computes with a matrix waits until its copies are done: [`Conveyor::sent`], [`Conveyor::ready`].
//! 3. A matrix's memory is given back behind what computes with it: [`Conveyor::computed`], [`Conveyor::give_back`].

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Result, Tensor};

use super::queues::{BUFFERS, Event, Queues};

/// One device's.
#[derive(Debug)]
pub struct Conveyor {
    queues: Box<dyn Queues>,
    turns: Mutex<Turns>,
}

#[derive(Debug, Default)]
struct Turns {
    next: usize,
    /// The last copy out of each buffer.
    copies: [Option<Event>; BUFFERS],
}

impl Conveyor {
    /// By these queues.
    pub fn by(queues: Box<dyn Queues>) -> Self {
        Self { queues, turns: Mutex::default() }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers on their way to the device, a flat tensor. `fill` makes the bytes of a range of them, a whole number of
    /// `unit` (or what remains) at a time, in buffers of `staging` bytes together, or of a unit each where that is more.
    ///
    /// # Errors
    /// Where the device or the host has no room.
    pub fn send(
        &self,
        (numbers, kind): (usize, DType),
        (staging, unit): (usize, usize),
        mut fill: impl FnMut(Range<usize>, &mut [u8]),
    ) -> Result<Tensor> {
        let to = self.queues.room(numbers, kind)?;
        let size = kind.size_in_bytes();
        let piece = (staging / BUFFERS / size / unit).max(1) * unit;
        let mut turns = self.turns();
        for first in (0..numbers).step_by(piece) {
            let part = first..numbers.min(first + piece);
            let (buffer, bytes) = (turns.next, part.len() * size);
            turns.next = (buffer + 1) % BUFFERS;
            if let Some(copy) = turns.copies[buffer].take() {
                self.queues.host_waits(&copy)?;
            }
            self.queues.fill(buffer, bytes, &mut |bytes| fill(part.clone(), bytes))?;
            turns.copies[buffer] = Some(self.queues.copy(buffer, bytes, &to, first * size)?);
        }
        Ok(to)
    }

    /// The place behind everything sent so far: what [`Conveyor::ready`] waits for.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn sent(&self) -> Result<Event> {
        self.queues.copied()
    }

    /// What is computed from now on finds what was sent before `sent`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn ready(&self, sent: &Event) -> Result<()> {
        self.queues.computing_waits(sent)
    }

    /// The place behind everything that is computed so far: what [`Conveyor::give_back`] waits for.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn computed(&self) -> Result<Event> {
        self.queues.computed()
    }

    /// Drops what was sent and is not used in what is computed after `computed`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn give_back<T>(&self, sent: T, computed: &Event) -> Result<()> {
        self.queues.copying_waits(computed)?;
        drop(sent);
        Ok(())
    }
}
