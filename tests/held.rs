//! What threads are said to hold for products and attention after a step, against an allocator that counts.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/numbers.rs"]
mod numbers;

use std::{env, process::Command};

use counting::Counting;
use dpo_lora::{
    engine::schedule::Schedule,
    kernels::{
        attention,
        compute::Compute,
        held::{Depths, Products},
    },
    train::pairs,
};
use numbers::{dpo, fixture, fresh, gradient_by, open, pair};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Every way to join matrices, gates or none, heads wider than the model.
const FAMILIES: [&str; 6] = ["llama", "gemma2", "phi3", "gpt2", "gpt-neox", "gptj"];
/// All of an adapter's products are thin, some are, none is.
const RANKS: [usize; 3] = [3, 40, 70];
/// Pairs of a step. The last one's gradients of llama's gate and what it gates are too much to be packed at once, those
/// of the one before it just go.
const PAIRS: [usize; 4] = [1, 30, 93, 100];
/// Names family and rank to a process of its own: buffers stay as large as any product there wanted them.
const ASKED: &str = "DPO_LORA_TEST_HELD";

#[test]
fn threads_hold_what_is_said() {
    if let Ok(asked) = env::var(ASKED) {
        let (family, rank) = asked.split_once(' ').unwrap();
        return hold(family, rank.parse().unwrap());
    }
    for (family, rank) in FAMILIES.iter().flat_map(|family| RANKS.map(|rank| (family, rank))) {
        let mut process = Command::new(env::current_exe().unwrap());
        process.args(["--exact", "threads_hold_what_is_said", "--nocapture"]).env(ASKED, format!("{family} {rank}"));
        let output = process.output().unwrap();
        print!("{}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "{family}, rank {rank}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Steps of ever more pairs, on one thread, which has a part in everything.
fn hold(family: &str, rank: usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let model = open(&fixture(family));
    let (adapter, depths) = (fresh(&model, rank), Depths::of(&model.blocks));
    let schedule = Schedule { sweep: usize::MAX, micro: usize::MAX, ..Schedule::default() };
    let pairs: Vec<_> = (0..PAIRS[3]).map(|i| pair(i as u64, [20, 11, 10], model.vocabulary())).collect();
    let pairs: Vec<_> = pairs.iter().collect();
    pool.install(|| ());
    let before = counting::held();
    for n in PAIRS {
        pool.install(|| gradient_by(&schedule, &model, &adapter, &pairs[..n], &dpo(0.1)));
        let held = counting::held() - before;
        let rows = schedule.head_chunk.min(n * 21);
        let products = Products {
            tokens: pairs[..n].iter().map(|pair| pairs::tokens(pair)).sum(),
            depths: &depths,
            rank,
            backward: Some([rows, model.vocabulary()]),
        };
        let attention = attention::scratch(model.blocks[0].attention.heads.dim, true) * 4;
        let said = products.bytes(1, Compute::F32) + attention;
        println!("measured: {family}, rank {rank}, {n} pairs: {held} bytes held, {said} said");
        assert!(held <= said);
        // sums over tokens are of one pair's, where they are not thin; what tiles hold depends on the matrices' type
        let exact = cfg!(target_arch = "x86_64") && rank <= 64 && Compute::F32.name() == "f32";
        assert!(!exact || n < PAIRS[3] || said - held < said / 10);
    }
}
