//! The thread that carries weights to a device: what was asked for and what was given back, one after the other in that
//! order. So a layer that is asked for before another is given back does not wait for it, and one that is asked for
//! after that finds its memory free.

use std::{
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread::{Builder, JoinHandle},
};

use candle_core::{Device, Result};
use rayon::ThreadPoolBuilder;

use super::{conveyor::Conveyor, queues::Queues};

type Job = Box<dyn FnOnce(&Conveyor) + Send>;

/// A device's. It ends with what it was told to do when it is dropped.
#[derive(Debug)]
pub struct Carrier {
    /// The way to the device.
    pub conveyor: Arc<Conveyor>,
    /// None once it ends.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
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
        let work = move || {
            // threads of its own: those of the global pool may all wait for what is carried
            let pool = ThreadPoolBuilder::new().num_threads(rayon::current_num_threads().min(8)).use_current_thread();
            let _pool = pool.build();
            told.into_iter().for_each(|job| job(&way));
        };
        let thread = Builder::new().name("carrier".into()).spawn(work)?;
        Ok(Self { conveyor, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Does `job` when all before it is done.
    pub fn then(&self, job: impl FnOnce(&Conveyor) + Send + 'static) {
        // the thread outlives this sender, unless a job panicked: whoever waits for an answer sees that none comes
        self.jobs.as_ref().map(|jobs| jobs.send(Box::new(job)).ok());
    }
}

/// Waits for what was asked for, so that nothing is on its way when the program ends.
impl Drop for Carrier {
    fn drop(&mut self) {
        self.jobs = None;
        // the last matrix may be dropped by a job of its own
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != std::thread::current().id()) {
            thread.join().ok();
        }
    }
}
