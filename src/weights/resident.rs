//! A frozen matrix of a device: uploaded when it is first used or asked for ahead, dropped when a pass is done with it.
//!
//! A base that fits stays after its first use. Where the plan says that it does not, the pass says what it needs next
//! and what it is done with, layer by layer, and the next layer's matrices come from the map while this one computes: a
//! thread fills the buffers ([`super::carrier`]), the device copies out of them beside what it computes
//! ([`super::conveyor`]).

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    mpsc::{Receiver, channel},
};

use candle_core::{Result, bail};

use super::{
    conveyor::{Conveyor, Memory},
    mapped::StoredMatrix,
    queues::Event,
    upload::Uploader,
};
use crate::kernels::{
    dequantise::Form,
    profile::{Part, Timed},
};

/// A matrix `[rows, columns]` in its file, and on the device as long as it is wanted there.
#[derive(Debug)]
pub struct Resident {
    pub stored: Arc<dyn StoredMatrix>,
    pub rows: usize,
    pub columns: usize,
    pub uploader: Uploader,
    slot: Mutex<Slot>,
}

/// A matrix whose copies are queued, and the place behind them.
type Sent = Result<(Form, Event)>;

#[derive(Debug)]
enum Slot {
    Absent,
    Asked(Receiver<Sent>),
    Here(Arc<Form>),
}

/// What a lock guards, whatever became of a thread that held it.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Resident {
    pub fn new(stored: Arc<dyn StoredMatrix>, rows: usize, columns: usize, uploader: Uploader) -> Self {
        Self { stored, rows, columns, uploader, slot: Mutex::new(Slot::Absent) }
    }

    fn send(&self, way: &Conveyor) -> Sent {
        Ok((self.stored.on_device(self.rows, self.columns, &self.uploader)?, way.sent()?))
    }

    fn ask(self: &Arc<Self>) -> Result<Receiver<Sent>> {
        let (answer, asked) = channel();
        let matrix = Arc::clone(self);
        self.uploader.carrier()?.then(move |way| {
            // where nobody waits any more, the matrix is dropped as it was never used
            answer.send(matrix.send(way)).ok();
        });
        Ok(asked)
    }

    /// The matrix, for what is computed from now on, which waits on the device for its copies.
    pub fn form(self: &Arc<Self>) -> Result<Arc<Form>> {
        let mut slot = lock(&self.slot);
        let asked = match std::mem::replace(&mut *slot, Slot::Absent) {
            Slot::Here(form) => {
                *slot = Slot::Here(Arc::clone(&form));
                return Ok(form);
            }
            Slot::Absent => self.ask()?,
            Slot::Asked(asked) => asked,
        };
        let _timed = Timed::instead(Part::Waiting);
        let Ok(sent) = asked.recv() else { bail!("the thread that uploads matrices died") };
        let (form, sent) = sent?;
        self.uploader.carrier()?.conveyor.ready(&sent)?;
        let form = Arc::new(form);
        *slot = Slot::Here(Arc::clone(&form));
        Ok(form)
    }

    /// Asks for the matrix ahead. A hint: what cannot be asked for now says so at its first use.
    pub fn will_need(self: &Arc<Self>) {
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Absent)
            && let Ok(asked) = self.ask()
        {
            *slot = Slot::Asked(asked);
        }
    }

    /// Gives the copy on the device back behind what is computed with it.
    pub fn done_with(&self, memory: Memory) {
        let held = std::mem::replace(&mut *lock(&self.slot), Slot::Absent);
        // a device that fails here fails at the next product too, which says so
        if let Slot::Here(form) = held
            && let Ok(carrier) = self.uploader.carrier()
            && let Ok(computed) = carrier.conveyor.computed()
        {
            carrier.then(move |way| {
                way.give_back(form, &computed, memory).ok();
            });
        }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.done_with(Memory::Freed);
    }
}

#[cfg(test)]
mod tests;
