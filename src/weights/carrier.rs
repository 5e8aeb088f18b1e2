//! The thread that carries weights to a device: what was asked for and what was given back, one after the other in that
//! order. So a layer that is asked for before another is given back does not wait for it, and one that is asked for after
//! that finds its memory free.

use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::Builder,
};

use candle_core::{Device, Result};

use super::{conveyor::Conveyor, queues::Queues};

type Job = Box<dyn FnOnce(&Conveyor) + Send>;

/// A device's. It ends with what it was told to do when it is dropped.
#[derive(Debug)]
pub struct Carrier {
    /// The way to the device.
    pub conveyor: Arc<Conveyor>,
    jobs: Sender<Job>,
}

impl Carrier {
    /// To `device`.
    ///
    /// # Errors
    /// Where there is no thread to be had, or the device has no room for another queue.
    pub fn to(device: &Device) -> Result<Self> {
        Self::by(super::queues::of(device)?)
    }

    /// By these queues.
    ///
    /// # Errors
    /// Where there is no thread to be had.
    pub fn by(queues: Box<dyn Queues>) -> Result<Self> {
        let (jobs, told) = channel::<Job>();
        let conveyor = Arc::new(Conveyor::by(queues));
        let way = Arc::clone(&conveyor);
        Builder::new().name("carrier".into()).spawn(move || told.into_iter().for_each(|job| job(&way)))?;
        Ok(Self { conveyor, jobs })
    }

    /// Does `job` when all before it is done.
    pub fn then(&self, job: impl FnOnce(&Conveyor) + Send + 'static) {
        // the thread outlives this sender, unless a job panicked: whoever waits for an answer sees that none comes
        self.jobs.send(Box::new(job)).ok();
    }
}
