//! Where the time of real training steps goes, and which share of the machine's matrix peak they reach.
//!
//!     DPO_LORA_SMOLLM2=BASE DPO_LORA_HH=ROWS.jsonl \
//!         cargo bench --bench profile --features profile -- [f32|bf16] [BATCH]
//!
//! Steps of the reference, the policy's gradient and AdamW on the first rows, r 8, max_length 512, as `compare.py` has
//! them. The floor is arithmetic: for a pair of T distinct tokens and C answer tokens, 2·P·T operations each for the
//! reference, the forward pass, the recomputation and the backward pass (P: elements of the frozen layers), and for the
//! head 2·V·H·C each for the reference, the forward pass and its derivative.

use std::{
    env,
    error::Error,
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

#[cfg(target_arch = "x86_64")]
use dpo_lora::kernels::amx::{self, Terms};
use dpo_lora::{
    data::TokenizedPair,
    engine::{pass::Engine, schedule::Schedule},
    kernels::{
        compute::Compute,
        micro::Micro,
        profile::{self, Part},
    },
    model::lora::Adapter,
    objective::Metrics,
    optim::{Gradient, Optimizer},
    recipe::Recipe,
    report::Progress,
    train::{adapters, base::Base, device, pairs, reference::Reference, rows::Rows},
};

/// As in the program: large blocks that are freed stay for the next ones.
#[global_allocator]
static ALLOCATOR: dpo_lora::heap::Heap = dpo_lora::heap::Heap;

/// Steps that are counted, after one that is not.
const STEPS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let kind = arguments.first().map_or("f32", String::as_str);
    let batch: usize = arguments.get(1).map_or(Ok(2), |n| n.parse())?;
    let recipe = recipe(kind, batch)?;
    let cpu = device::choose(&recipe.run.device, &Progress::stderr())?;
    let compute = device::compute(recipe.memory.compute, false);
    let base = Base::open(&recipe.model.base, &recipe.model.revision, &cpu, compute)?;
    let rows = Rows::load(&recipe, &base)?.train;
    let mut training = Training::open(&recipe, &base)?;

    let mut steps = rows.chunks_exact(batch);
    training.step(steps.next().ok_or("too few rows")?)?;
    profile::take();
    let measured = measure(&mut training, steps)?;
    tell(batch, compute, &measured);
    Ok(())
}

/// The recipe of the pairs that are trained on: `kind` is its `memory.compute`, `batch` the pairs a step.
fn recipe(kind: &str, batch: usize) -> Result<Recipe, Box<dyn Error>> {
    let quoted = |name: &str| env::var(name).map(|value| format!("{value:?}")).map_err(|_| format!("set {name}"));
    let set = [
        format!("model.base={}", quoted("DPO_LORA_SMOLLM2")?),
        format!("data.train=[{}]", quoted("DPO_LORA_HH")?),
        "data.eval=[]".into(),
        "data.format=text".into(),
        format!("data.limit={}", (STEPS + 1) * batch),
        "data.shuffle=false".into(),
        "adapter.r=8".into(),
        "adapter.lora_alpha=16".into(),
        "run.device=cpu".into(),
        format!("memory.compute={kind}"),
    ];
    Ok(Recipe::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/hh.toml"), &set)?)
}

/// What changes from step to step, and what it is trained over.
struct Training<'a> {
    recipe: &'a Recipe,
    base: &'a Base,
    adapter: Adapter,
    optimizer: Optimizer,
}

impl<'a> Training<'a> {
    fn open(recipe: &'a Recipe, base: &'a Base) -> dpo_lora::Result<Self> {
        let (_, adapter) = adapters::Start::of(recipe, base)?.make(recipe, base)?;
        let optimizer = Optimizer::new(&recipe.train, &adapter.values)?;
        Ok(Self { recipe, base, adapter, optimizer })
    }

    /// A step on these pairs; the time that the optimizer took of it.
    fn step(&mut self, pairs: &[TokenizedPair]) -> dpo_lora::Result<Duration> {
        let Self { recipe, base, adapter, optimizer } = self;
        let (pairs, schedule, scratch) = (pairs.iter().collect::<Vec<_>>(), Schedule::default(), env::temp_dir());
        // a fresh reference knows no row yet, so its pass is within the step
        let (mut reference, mut metrics) = (Reference::new(None), Metrics::new(recipe.objective.beta));
        // within the pool, as in the program
        rayon::scope(|_| {
            let engine = Engine { model: &base.model, schedule: &schedule, scratch: &scratch, poll: &|| Ok(()) };
            pairs::gradient(engine, &pairs, &mut reference, &recipe.objective, (adapter, None), &mut metrics)
        })?;
        let began = Instant::now();
        optimizer.step(&adapter.values, Gradient::clipped(&adapter.grads, 1.0)?, 5e-5)?;
        Ok(began.elapsed())
    }
}

/// What the steps took together, in seconds, and what the machine could have done meanwhile, in operations a second.
struct Measured {
    threads: usize,
    /// Pairs of all steps.
    pairs: usize,
    wall: f64,
    /// Of the processors' time, where the system says.
    busy: Option<f64>,
    optimizing: f64,
    /// In the order of [`Part::ALL`].
    parts: [f64; Part::ALL.len()],
    /// The floor's operations.
    floor: f64,
    /// On average over the steps.
    f32_peak: f64,
    /// As [`own_peak`] has it.
    own_peak: Option<f64>,
    /// Of the f32 peak beside each step, what the step reached, in percent.
    shares: Vec<f64>,
}

fn measure<'a>(
    training: &mut Training,
    steps: impl Iterator<Item = &'a [TokenizedPair]>,
) -> dpo_lora::Result<Measured> {
    let (base, threads) = (training.base, rayon::current_num_threads());
    let (mut optimizing, mut floor, mut count) = (Duration::ZERO, 0.0, 0);
    let (mut wall, mut busy, mut peaks, mut shares) = (0.0, Some(0.0), Vec::new(), Vec::new());
    for pairs in steps {
        // the peak moves with what else the machine does, so it is measured beside each step
        let f32_peak = peak(threads, || fused(Compute::F32));
        let (began, before) = (Instant::now(), cpu_time());
        optimizing += training.step(pairs)?;
        let (took, due) = (began.elapsed().as_secs_f64(), pairs.iter().map(|pair| operations(base, pair)).sum::<f64>());
        busy = busy.zip(cpu_time()).zip(before).map(|((busy, after), before)| busy + after - before);
        peaks.push(f32_peak);
        shares.push(100.0 * due / took / f32_peak);
        (wall, floor) = (wall + took, floor + due);
        count += pairs.len();
    }
    Ok(Measured {
        threads,
        pairs: count,
        wall,
        busy,
        optimizing: optimizing.as_secs_f64(),
        parts: profile::take().map(|time| time.as_secs_f64()),
        floor,
        f32_peak: peaks.iter().sum::<f64>() / peaks.len() as f64,
        own_peak: own_peak(base.compute, threads),
        shares,
    })
}

fn tell(batch: usize, compute: Compute, measured: &Measured) {
    let Measured { threads, pairs, wall, busy, optimizing, parts, floor, f32_peak, own_peak, ref shares } = *measured;
    println!("{pairs} pairs in steps of {batch}, {} products, {threads} threads", compute.name());
    println!("{:.2} pairs/s, {:.1} GFLOP/s of the floor's operations", pairs as f64 / wall, floor / wall * 1e-9);
    let by_step = shares.iter().map(|share| format!("{share:.0}")).collect::<Vec<_>>().join(", ");
    let share = 100.0 * floor / wall / f32_peak;
    println!("{share:.0} % of the f32 matrix peak ({:.0} GFLOP/s); by step {by_step}", f32_peak * 1e-9);
    if let Some(own_peak) = own_peak {
        let share = 100.0 * floor / wall / own_peak;
        println!("{share:.0} % of the peak of {} with a bf16 base ({:.0} GFLOP/s)", compute.name(), own_peak * 1e-9);
    }
    let mut rest = wall - optimizing;
    for (part, time) in Part::ALL.iter().zip(parts) {
        println!("{:12} {:5.1} %", format!("{part:?}").to_lowercase(), 100.0 * time / wall);
        rest -= time;
    }
    println!("{:12} {:5.1} %", "optimizer", 100.0 * optimizing / wall);
    println!("{:12} {:5.1} %  (sums of tensors, allocation, what lies between)", "rest", 100.0 * rest / wall);
    if let Some(busy) = busy {
        println!(
            "{:12} {:5.1} %  of the threads' time, within all of these",
            "idle",
            100.0 - 100.0 * busy / wall / threads as f64
        );
    }
}

/// The floor's operations for a pair. It counts the recomputation whole, though the last product of it (down) is never
/// made: about 6 % fewer are really done, and the shares would be lower by as much.
fn operations(base: &Base, pair: &TokenizedPair) -> f64 {
    let frozen: usize = base.model.linears().map(|linear| linear.weight.inputs * linear.weight.outputs).sum();
    let head = base.model.head.weight.inputs * base.model.head.weight.outputs;
    let answers = pair.chosen.len() + pair.rejected.len();
    2.0 * (4.0 * frozen as f64 * pairs::tokens(pair) as f64 + 3.0 * head as f64 * answers as f64)
}

/// Operations a second of the unit that multiplies, where it is not that of fused multiply-adds of f32: in tiles, of
/// f32 with a bf16 base.
fn own_peak(compute: Compute, threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if amx::available() {
        let terms = if compute == Compute::Bf16 { Terms::One } else { Terms::Three };
        return Some(peak(threads, || tiles(terms)));
    }
    (compute != Compute::F32).then(|| peak(threads, || fused(compute)))
}

/// Operations a second of what `kernel` makes, a function that multiplies and says how many operations that took, on
/// all threads at once.
fn peak<F: FnMut() -> usize>(threads: usize, kernel: impl Fn() -> F + Sync) -> f64 {
    let each = |_: rayon::BroadcastContext| {
        let mut multiply = kernel();
        let (began, mut operations) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_millis(500) {
            operations += (0..1000).map(|_| multiply()).sum::<usize>();
        }
        operations as f64 / began.elapsed().as_secs_f64()
    };
    rayon::broadcast(each).into_iter().take(threads).sum()
}

/// The micro-kernel of fused multiply-adds on panels that stay in the first-level cache.
fn fused(compute: Compute) -> impl FnMut() -> usize {
    const STEPS: usize = 128;
    let Micro { mr, nr, tile, .. } = Micro::choose(64, 64, compute);
    // 1.0 in both types
    let (left, right) = (vec![0x3f80_3f80; mr * STEPS], vec![0x3f80_3f80; nr * STEPS]);
    let mut sums = vec![0f32; mr * nr];
    move || {
        // SAFETY: the panels hold as many steps and the tile is whole; the kernel was chosen on this processor.
        unsafe { tile(STEPS, left.as_ptr(), right.as_ptr(), black_box(sums.as_mut_ptr()), nr, false) };
        2 * mr * nr * STEPS * compute.per_step()
    }
}

/// The tile unit on panels that stay in the first-level cache.
#[cfg(target_arch = "x86_64")]
fn tiles(terms: Terms) -> impl FnMut() -> usize {
    const DEPTH: usize = 4;
    let registers = |parts: usize| vec![0x3f80_3f80; DEPTH * parts * 2 * amx::REGISTER];
    let (left, right) = (registers(terms.left()), registers(terms.right()));
    let (unit, mut sums) = (amx::Unit::ready().expect("there are tiles"), amx::Sums::default());
    move || {
        amx::multiply(&unit, terms, 2, DEPTH, &left, &right, black_box(&mut sums));
        2 * amx::SIDE * amx::SIDE * DEPTH * terms.depth()
    }
}

/// Seconds that this process has had of the processors, where the system says.
fn cpu_time() -> Option<f64> {
    // after the name in parentheses: state is field 3, utime and stime are 14 and 15, in hundredths of a second
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some((ticks(14)? + ticks(15)?) / 100.0)
}
