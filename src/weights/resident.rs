//! A frozen matrix of a device: uploaded when it is first used or asked for ahead, dropped when a pass is done with it.
//!
//! A base that fits stays after its first use. Where the plan says that it does not, the pass says what it needs next and
//! what it is done with, layer by layer, and the next layer's matrices come from the map while this one computes.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{Builder, JoinHandle},
};

use candle_core::{Result, bail};

use super::{mapped::StoredMatrix, upload::Uploader};
use crate::kernels::dequantise::Form;

/// One upload at a time: they share one buffer's worth of memory.
static ON_THE_WAY: Mutex<()> = Mutex::new(());

/// A matrix `[rows, columns]` in its file, and on the device as long as it is wanted there.
#[derive(Debug)]
pub struct Resident {
    pub stored: Arc<dyn StoredMatrix>,
    pub rows: usize,
    pub columns: usize,
    pub uploader: Uploader,
    slot: Mutex<Slot>,
}

#[derive(Debug)]
enum Slot {
    Absent,
    Coming(JoinHandle<Result<Form>>),
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

    fn upload(&self) -> Result<Form> {
        let _one = lock(&ON_THE_WAY);
        self.stored.on_device(self.rows, self.columns, &self.uploader)
    }

    /// The matrix on the device; waits for it where it is on its way.
    pub fn form(&self) -> Result<Arc<Form>> {
        let mut slot = lock(&self.slot);
        let form = match std::mem::replace(&mut *slot, Slot::Absent) {
            Slot::Here(form) => form,
            Slot::Absent => Arc::new(self.upload()?),
            Slot::Coming(thread) => match thread.join() {
                Ok(form) => Arc::new(form?),
                Err(_) => bail!("the thread that uploads a matrix died"),
            },
        };
        *slot = Slot::Here(Arc::clone(&form));
        Ok(form)
    }

    /// Begins the upload. A hint: where no thread can be had, the first use uploads.
    pub fn will_need(self: &Arc<Self>) {
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Absent) {
            let matrix = Arc::clone(self);
            if let Ok(thread) = Builder::new().name("upload".into()).spawn(move || matrix.upload()) {
                *slot = Slot::Coming(thread);
            }
        }
    }

    /// Drops the copy on the device.
    pub fn done_with(&self) {
        *lock(&self.slot) = Slot::Absent;
    }
}
