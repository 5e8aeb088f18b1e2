//! Who waits for whom as layers stream: two queues that only count what they do and know of each other's work, and say
//! where something is done that nothing has waited for.

use std::{collections::HashMap, ops::Range, sync::Weak};

use candle_core::{DType, Device, Storage, Tensor};

use super::*;
use crate::{
    kernels::{compute::Compute, dequantise::Numbers},
    weights::{
        carrier::Carrier,
        mapped::MappedBytes,
        queues::{BUFFERS, LARGE, Queues},
    },
};

/// A wait that is left out, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wait {
    Host,
    Computing,
    Copying,
}

#[derive(Debug, Default)]
struct Counts {
    deaf: Option<Wait>,
    copied: u64,
    computed: u64,
    /// Copies that the host and the queue that computes have waited for.
    host_knows: u64,
    computing_knows: u64,
    /// Computations that the queue of copies has waited for.
    copying_knows: u64,
    /// The last copy out of each buffer.
    out_of: [u64; BUFFERS],
    /// By where a tensor lies: the last copy to it, and how many computations the first of its copies waits for.
    to: HashMap<usize, u64>,
    waits_for: HashMap<usize, u64>,
    /// Matrices and the last computation with each.
    with: Vec<(Weak<Form>, u64)>,
    wrong: Vec<&'static str>,
}

#[derive(Debug, Clone, Default)]
struct Counting(Arc<Mutex<Counts>>);

/// Where a tensor lies.
fn address(tensor: &Tensor) -> usize {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr() as usize,
        _ => panic!("a tensor on the CPU"),
    }
}

impl Counting {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        lock(&self.0)
    }

    fn waits(&self, wait: Wait, done: impl FnOnce(&mut Counts)) -> Result<()> {
        let mut counts = self.counts();
        if counts.deaf != Some(wait) {
            done(&mut counts);
        }
        Ok(())
    }

    /// Queues a computation with a matrix.
    fn compute(&self, form: &Arc<Form>) {
        let (mut counts, at) = (self.counts(), address(numbers(form)));
        if counts.to[&at] > counts.computing_knows {
            counts.wrong.push("computes with what is not there");
        }
        counts.computed += 1;
        let number = counts.computed;
        counts.with.push((Arc::downgrade(form), number));
    }
}

impl Counts {
    /// Looks for matrices that are gone.
    fn look(&mut self) {
        let gone = |(form, number): &(Weak<Form>, u64)| form.strong_count() == 0 && *number > self.copying_knows;
        if self.with.iter().any(gone) {
            self.wrong.push("gives memory away that is computed with");
        }
    }
}

fn numbers(form: &Form) -> &Tensor {
    match &form.numbers {
        Numbers::Plain(numbers) => numbers,
        _ => panic!("decoded numbers"),
    }
}

fn place(event: &Event) -> u64 {
    match event {
        Event::Place(number) => *number,
        #[cfg(feature = "cuda")]
        Event::Cuda(_) => panic!("an event of the counting queues"),
    }
}

impl Queues for Counting {
    fn room(&self, numbers: usize, kind: DType) -> Result<Tensor> {
        self.counts().look();
        let room = Tensor::zeros(numbers, kind, &Device::Cpu)?;
        // what lay there before was another matrix
        self.counts().waits_for.remove(&address(&room));
        Ok(room)
    }

    fn take_back(&self, _: Tensor) {
        self.counts().look();
    }

    fn fill(&self, buffer: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let mut counts = self.counts();
        if counts.out_of[buffer] > counts.host_knows {
            counts.wrong.push("fills a buffer that a copy reads");
        }
        fill(&mut vec![0; bytes]);
        Ok(())
    }

    fn copy(&self, buffer: usize, _: usize, to: &Tensor, _: usize) -> Result<Event> {
        let (mut counts, at) = (self.counts(), address(to));
        counts.copied += 1;
        let (number, knows) = (counts.copied, counts.copying_knows);
        counts.out_of[buffer] = number;
        counts.to.insert(at, number);
        counts.waits_for.entry(at).or_insert(knows);
        Ok(Event::Place(number))
    }

    fn copied(&self) -> Result<Event> {
        Ok(Event::Place(self.counts().copied))
    }

    fn computed(&self) -> Result<Event> {
        Ok(Event::Place(self.counts().computed))
    }

    fn host_waits(&self, event: &Event) -> Result<()> {
        self.waits(Wait::Host, |counts| counts.host_knows = counts.host_knows.max(place(event)))
    }

    fn computing_waits(&self, event: &Event) -> Result<()> {
        self.waits(Wait::Computing, |counts| counts.computing_knows = counts.computing_knows.max(place(event)))
    }

    fn copying_waits(&self, event: &Event) -> Result<()> {
        self.waits(Wait::Copying, |counts| counts.copying_knows = counts.copying_knows.max(place(event)))
    }
}

/// Numbers that are decoded.
#[derive(Debug)]
struct Ones;

impl StoredMatrix for Ones {
    fn decode(&self, _: Range<usize>, _: Range<usize>, out: &mut [f32]) {
        out.fill(1.0);
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        Vec::new()
    }
}

const ROWS: usize = 200;

/// Passes forward and back over layers that stream, as `engine::pass` goes; what was done that nothing had waited for,
/// and whether a layer's copies waited for the layer before it.
fn pass(deaf: Option<Wait>) -> (Vec<&'static str>, bool) {
    let queues = Counting::default();
    queues.counts().deaf = deaf;
    // seven pieces a matrix
    let uploader = Uploader::new(&Device::Cpu, Compute::F32).through(32 * 8 * 4 * LARGE);
    assert!(uploader.way.set(Carrier::by(Box::new(queues.clone())).unwrap()).is_ok());
    let matrix = || Arc::new(Resident::new(Arc::new(Ones), ROWS, 8, uploader.clone()));
    let layers: Vec<[Arc<Resident>; 3]> = (0..4).map(|_| std::array::from_fn(|_| matrix())).collect();
    let mut waited = false;
    let mut entered = 0;
    for order in [[0, 1, 2, 3], [3, 2, 1, 0]] {
        for (i, layer) in order.into_iter().enumerate() {
            let before = std::mem::replace(&mut entered, queues.counts().computed);
            if i == 0 {
                layers[layer].iter().for_each(Resident::will_need);
            }
            if let Some(next) = order.get(i + 1) {
                layers[*next].iter().for_each(Resident::will_need);
            }
            for matrix in &layers[layer] {
                for _ in 0..2 {
                    queues.compute(&matrix.form().unwrap());
                }
                // asked for as the layer before was entered, so it waits for no more than what was computed by then
                let at = address(numbers(&matrix.form().unwrap()));
                waited |= i > 0 && queues.counts().waits_for[&at] > before;
            }
            layers[layer].iter().for_each(|matrix| matrix.done_with(Memory::Kept));
        }
    }
    // the last ones go with the model, and then the thread ends with its queues
    queues.compute(&layers[0][0].form().unwrap());
    drop((layers, uploader));
    while Arc::strong_count(&queues.0) > 1 {
        std::thread::yield_now();
    }
    queues.counts().look();
    assert!(queues.counts().copied > 60, "too few copies to take turns");
    let wrong = std::mem::take(&mut queues.counts().wrong);
    (wrong, waited)
}

#[test]
fn what_streams_is_waited_for_and_waits_for_no_more() {
    for _ in 0..20 {
        assert_eq!(pass(None), (Vec::new(), false));
    }
}

#[test]
fn each_wait_is_missed_where_it_is_left_out() {
    for (wait, what) in [
        (Wait::Host, "fills a buffer that a copy reads"),
        (Wait::Computing, "computes with what is not there"),
        (Wait::Copying, "gives memory away that is computed with"),
    ] {
        let (wrong, _) = pass(Some(wait));
        assert!(wrong.contains(&what), "{wait:?}: {wrong:?}");
    }
}

/// A step's engine is on a thread of the global pool, and waits there: all of them may.
#[test]
fn what_is_carried_needs_no_thread_of_the_pool() {
    let uploader = Uploader::new(&Device::Cpu, Compute::F32);
    // several blocks of rows, which are decoded at once
    let matrix = Arc::new(Resident::new(Arc::new(Ones), 200, 8, uploader));
    let (done, seen) = channel();
    let waits = Mutex::new(seen);
    let arrived: Vec<bool> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let form = matrix.form();
            (0..rayon::current_num_threads()).for_each(|_| done.send(form.is_ok()).unwrap());
        });
        rayon::broadcast(|_| lock(&waits).recv_timeout(std::time::Duration::from_secs(60)).unwrap_or(false))
    });
    assert!(arrived.into_iter().all(|arrived| arrived), "nothing came while the pool waited");
}

#[test]
fn what_is_there_is_not_sent_again() {
    let queues = Counting::default();
    let uploader = Uploader::new(&Device::Cpu, Compute::F32);
    assert!(uploader.way.set(Carrier::by(Box::new(queues.clone())).unwrap()).is_ok());
    let matrix = Arc::new(Resident::new(Arc::new(Ones), 40, 8, uploader));
    (0..3).for_each(|_| matrix.will_need());
    matrix.form().unwrap();
    matrix.will_need();
    matrix.done_with(Memory::Freed);
    // a job behind all others
    let (answer, all) = channel();
    matrix.uploader.carrier().unwrap().then(move |_| answer.send(()).unwrap());
    all.recv().unwrap();
    assert_eq!(queues.counts().copied, 1);
}
