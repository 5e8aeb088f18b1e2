//! The way of weights to a device, and who waits for whom on it. Buffers take turns, so that one is filled from the
//! file while the copies out of others are under way; copies are made beside what the device computes.
//!
//! 1. A buffer is filled again when the copy out of it is done: [`Conveyor::send`].
//! 2. What computes with a matrix waits until its copies are done: [`Conveyor::sent`], [`Conveyor::ready`].
//! 3. A matrix's memory is given back behind what computes with it: [`Conveyor::computed`], [`Conveyor::give_back`].

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Result, Tensor};

use super::queues::{BUFFERS, Event, LARGE, Queues, SMALL};
use crate::kernels::dequantise::Form;

/// What becomes of the memory of a matrix on a device that is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// It stays for the next matrix of its size.
    Kept,
    /// It goes back to the device.
    Freed,
}

/// One device's.
#[derive(Debug)]
pub struct Conveyor {
    queues: Box<dyn Queues>,
    turns: Mutex<Turns>,
}

#[derive(Debug, Default)]
struct Turns {
    /// How many large and small pieces there were.
    pieces: [usize; 2],
    /// The last copy out of each buffer.
    copies: [Option<Event>; BUFFERS],
}

impl Turns {
    /// The buffer for the next piece.
    fn next(&mut self, small: bool) -> usize {
        let piece = &mut self.pieces[usize::from(small)];
        let buffer = if small { LARGE + *piece % SMALL } else { *piece % LARGE };
        *piece += 1;
        buffer
    }
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
    /// `unit` (or what remains) at a time, in large buffers of `staging` bytes together, or of a unit each where that
    /// is more.
    ///
    /// # Errors
    /// Where the device or the host has no room, and those of `fill`.
    pub fn send(
        &self,
        (numbers, kind): (usize, DType),
        (staging, unit): (usize, usize),
        mut fill: impl FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Tensor> {
        let to = self.queues.room(numbers, kind)?;
        let size = kind.size_in_bytes();
        let piece = (staging / LARGE / size / unit).max(1) * unit;
        let mut turns = self.turns();
        for first in (0..numbers).step_by(piece) {
            let part = first..numbers.min(first + piece);
            let (buffer, bytes) = (turns.next(part.len() <= piece / 16), part.len() * size);
            if let Some(copy) = turns.copies[buffer].take() {
                self.queues.host_waits(&copy)?;
            }
            let mut filled = Ok(());
            self.queues.fill(buffer, bytes, &mut |bytes| filled = fill(part.clone(), bytes))?;
            filled?;
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

    /// Lets go of what was sent and is not used in what is computed after `computed`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn give_back(&self, sent: Arc<Form>, computed: &Event, memory: Memory) -> Result<()> {
        self.queues.copying_waits(computed)?;
        // one that somebody still holds is freed when they let go of it
        let form = Arc::into_inner(sent).filter(|_| memory == Memory::Kept);
        form.iter().flat_map(Form::tensors).try_for_each(|tensor| {
            self.queues.take_back(tensor.flatten_all()?);
            Ok(())
        })
    }
}
