//! What the numerical tests share: models and adapters from their folders, expected tensors, and how far apart two are.
#![allow(dead_code)] // each test file uses a part

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use dpo_lora::{
    data::TokenizedPair,
    engine::{
        pack::{Tree, pack},
        pass::{Engine, forward},
        schedule::Schedule,
    },
    export::AdapterFolder,
    kernels::compute::Compute,
    model::{
        Config,
        decoder::Decoder,
        linear::Through,
        lora::{Adapter, Shape},
    },
    objective::{Means, Metrics},
    random::Stream,
    recipe::{self, Loss, Objective},
    train::{adapters, pairs, reference::Reference},
    weights::ModelFolder,
};
use serde::de::DeserializeOwned;

#[path = "devices.rs"]
pub mod devices;

use devices::{Place, devices, fixtures};

thread_local! {
    /// Where models are opened: on the CPU from the map unless [`everywhere`] says otherwise.
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

/// Runs a test with models on the CPU, and then with all that it opens uploaded to each device of this machine.
pub fn everywhere(test: impl Fn()) {
    test();
    for place in devices() {
        PLACE.set(Some(place));
        test();
        PLACE.set(None);
    }
}

/// What is allowed here: a device sums in another order, in blocks that depend on the batch.
pub fn allowed(limit: f64) -> f64 {
    PLACE.with_borrow(|place| match place {
        None => limit,
        Some(place) if place.device.is_cpu() => limit.max(UPLOADED),
        Some(_) => limit.max(DEVICE),
    })
}

/// Figures of matrices that were uploaded to the CPU, in f32, to those of other programs.
const UPLOADED: f64 = 2e-5;
/// Figures on a device in f32 to those of other programs, and to the CPU's.
pub const DEVICE: f64 = 1e-3;

/// A folder of `tests/fixtures/models`.
pub fn fixture(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

/// The model in a folder, which needs no tokenizer.
pub fn open(folder: &Path) -> Decoder {
    open_in(folder, Compute::F32)
}

/// The same, its matrices multiplying in `compute`.
pub fn open_in(folder: &Path, compute: Compute) -> Decoder {
    if let Some(model) = PLACE.with_borrow(|place| place.as_ref().map(|place| place.open(folder, compute))) {
        return model;
    }
    let config = Config::read(folder).expect("config.json");
    Decoder::open(&ModelFolder::open(folder).expect("weights"), &config, &Device::Cpu, compute).expect("a decoder")
}

/// The adapter in a folder, on a model.
pub fn adapter(folder: &Path, model: &Decoder) -> Adapter {
    adapters::on_model(&AdapterFolder::read(folder).expect("an adapter"), model).expect("an adapter that fits")
}

/// The policy, without dropout.
pub fn policy(adapter: &Adapter) -> Through<'_> {
    Through::of(Some(adapter))
}

/// An adapter of this rank on every linear layer, as a run begins: B is zero.
pub fn fresh(model: &Decoder, r: usize) -> Adapter {
    let linears = model.linear_shapes();
    let shape = |(linear, (module, inputs, outputs))| Shape { module, linear, r, scale: 2.0, inputs, outputs };
    let shapes: Vec<_> = linears.into_iter().enumerate().map(shape).collect();
    Adapter::fresh(shapes, model.linears().count(), 0, &model.device).expect("an adapter")
}

/// The content of a JSON file.
pub fn json<T: DeserializeOwned>(path: &Path) -> T {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The f32 tensors of a safetensors file.
pub fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let numbers = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
        assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
        (name, numbers(view.data()))
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// An adapter's numbers (`flat` is its `values` or its `grads`), cut into tensors under PEFT's names.
pub fn by_name(adapter: &Adapter, flat: &Tensor) -> BTreeMap<String, Vec<f32>> {
    let numbers = flat.to_vec1::<f32>().expect("f32");
    let mut rest = numbers.as_slice();
    let mut named = BTreeMap::new();
    for shape in &adapter.shapes {
        for (matrix, n) in [("A", shape.r * shape.inputs), ("B", shape.outputs * shape.r)] {
            let (tensor, tail) = rest.split_at(n);
            named.insert(format!("base_model.model.{}.lora_{matrix}.weight", shape.module), tensor.to_vec());
            rest = tail;
        }
    }
    assert!(rest.is_empty());
    named
}

/// The norm of the difference over the norm of `theirs`.
pub fn relative_l2(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let square = |x: f64| x * x;
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = theirs.iter().map(|b| square(f64::from(*b))).sum();
    match difference {
        0.0 => 0.0,
        difference => (difference / size).sqrt(),
    }
}

/// The largest absolute difference.
pub fn worst<'a>(ours: impl IntoIterator<Item = &'a f32>, theirs: impl IntoIterator<Item = &'a f32>) -> f64 {
    let (mut ours, mut theirs) = (ours.into_iter(), theirs.into_iter());
    let worst = ours.by_ref().zip(theirs.by_ref()).fold(0.0, |worst, (a, b)| {
        let difference = (f64::from(*a) - f64::from(*b)).abs();
        if difference > worst || difference.is_nan() { difference } else { worst }
    });
    assert!(ours.next().is_none() && theirs.next().is_none(), "the lengths differ");
    worst
}

/// The largest of figures seen, with where it was seen; a test prints it and holds it against what is allowed.
pub struct Most {
    what: &'static str,
    most: f64,
    place: String,
}

impl Most {
    /// Nothing seen yet.
    pub fn of(what: &'static str) -> Self {
        Self { what, most: 0.0, place: "every place".into() }
    }

    /// One figure.
    pub fn see(&mut self, figure: f64, place: impl Into<String>) {
        if figure > self.most || figure.is_nan() {
            (self.most, self.place) = (figure, place.into());
        }
    }

    /// Prints the largest, and fails where it is above what is [`allowed`] here for `limit`.
    pub fn at_most(&self, limit: f64) {
        self.at_most_anywhere(allowed(limit));
    }

    /// The same with `limit` as it is.
    pub fn at_most_anywhere(&self, limit: f64) {
        let Self { what, most, place } = self;
        let device =
            PLACE.with_borrow(|place| place.as_ref().map_or(String::new(), |place| format!(" on {}", place.name)));
        println!("measured: {what}{device}: at most {most:.2e} (allowed {limit:.0e}), at {place}");
        assert!(*most <= limit, "{what}: {most:.2e} is above {limit:.0e}, at {place}");
    }
}

/// Log-probs of every token of each pair's chosen and rejected answer; all pairs go through the model at once.
pub fn token_logps(model: &Decoder, pairs: &[TokenizedPair], through: Through) -> Vec<[Vec<f32>; 2]> {
    let trees: Vec<_> = pairs.iter().map(tree).collect();
    let packed = pack(&trees, &model.rotary, &model.device).expect("a run of tokens");
    let scores = forward(model, &packed, through).expect("scores");
    let logps = |rows: &Range<usize>| scores[rows.clone()].iter().map(|score| score.logp).collect();
    packed.answers.chunks_exact(2).map(|pair| [logps(&pair[0]), logps(&pair[1])]).collect()
}

/// A prompt with both of its answers.
pub fn tree(pair: &TokenizedPair) -> Tree<'_> {
    Tree { prompt: &pair.prompt, answers: vec![&pair.chosen, &pair.rejected] }
}

/// The sigmoid loss of the paper.
pub fn dpo(beta: f64) -> Objective {
    Objective { loss: Loss::Sigmoid, beta, label_smoothing: 0.0, reference: recipe::Reference::Base }
}

/// The way through a model by a schedule.
pub fn engine<'a>(model: &'a Decoder, schedule: &'a Schedule) -> Engine<'a> {
    Engine { model, schedule, scratch: Path::new(env!("CARGO_TARGET_TMPDIR")), poll: &|| Ok(()) }
}

/// Summed log-probs of each pair, as a run forms them.
pub fn sums(model: &Decoder, pairs: &[&TokenizedPair], through: Through) -> Vec<[f64; 2]> {
    let pairs: Vec<_> = pairs.iter().copied().cloned().collect();
    let sum = |logps: &Vec<f32>| logps.iter().map(|logp| f64::from(*logp)).sum();
    token_logps(model, &pairs, through).iter().map(|answers| answers.each_ref().map(sum)).collect()
}

/// Leaves the gradient of the pairs' mean loss in the adapter's, as a step of a run does; the reference is the bare
/// base.
pub fn gradient(model: &Decoder, adapter: &Adapter, pairs: &[&TokenizedPair], objective: &Objective) -> Means {
    gradient_by(&Schedule::default(), model, adapter, pairs, objective)
}

/// The same by another schedule.
pub fn gradient_by(
    schedule: &Schedule,
    model: &Decoder,
    adapter: &Adapter,
    pairs: &[&TokenizedPair],
    objective: &Objective,
) -> Means {
    let (mut reference, mut metrics) = (Reference::new(None), Metrics::new(objective.beta));
    let engine = engine(model, schedule);
    pairs::gradient(engine, pairs, &mut reference, objective, (adapter, None), &mut metrics).expect("a gradient");
    metrics.mean().expect("pairs")
}

/// Random token ids of a vocabulary.
pub fn ids(stream: Stream, n: usize, vocabulary: usize) -> Vec<u32> {
    (0..n as u64).map(|i| stream.below(i, vocabulary as u64) as u32).collect()
}

/// A pair of random tokens with so many in prompt, chosen and rejected answer.
pub fn pair(seed: u64, [prompt, chosen, rejected]: [usize; 3], vocabulary: usize) -> TokenizedPair {
    let part = |number, n| ids(Stream::new(seed, "pair").at(number), n, vocabulary);
    TokenizedPair { prompt: part(0, prompt), chosen: part(1, chosen), rejected: part(2, rejected), origin: (0, 1) }
}

/// The pairs of an `expected.json`, in place of a data set's.
#[derive(serde::Deserialize)]
pub struct Ids {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

impl From<Ids> for TokenizedPair {
    fn from(Ids { prompt, chosen, rejected }: Ids) -> Self {
        Self { prompt, chosen, rejected, origin: (0, 1) }
    }
}
