//! A pair's numbers depend on the pair alone, bit for bit: not on the others in the batch, nor on the number of
//! threads. Therefore policy and reference agree exactly where they are one model: at step 0 margins are 0 and the loss
//! is ln 2.

use std::f64::consts::LN_2;

use dpo_lora::{
    data::TokenizedPair,
    engine::schedule::Schedule,
    kernels::compute::Compute,
    model::linear::Through,
    objective::Metrics,
    train::{pairs, reference::Reference},
};

#[path = "support/numbers.rs"]
mod numbers;

use numbers::{
    adapter, dpo, engine, fixture, fresh, gradient, gradient_by, open, open_in, pair, policy, sums, token_logps,
};

const VOCABULARY: usize = 64;

/// Nine pairs of 3 to 450 tokens: more than one micro-batch, products large enough for all threads.
fn batch() -> Vec<TokenizedPair> {
    let lengths = [
        [1, 1, 1],
        [120, 90, 60],
        [30, 1, 200],
        [250, 100, 100],
        [1, 40, 3],
        [64, 47, 49],
        [48, 48, 48],
        [7, 5, 300],
        [200, 10, 1],
    ];
    lengths.into_iter().enumerate().map(|(i, lengths)| pair(i as u64, lengths, VOCABULARY)).collect()
}

/// The types in which products multiply; on a processor without bf16 the second is the first again.
fn types() -> [Compute; 2] {
    [Compute::F32, Compute::bf16_or_f32()]
}

fn at<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(work)
}

fn bits(logps: &[[Vec<f32>; 2]]) -> Vec<Vec<u32>> {
    logps.iter().flatten().map(|answer| answer.iter().map(|logp| logp.to_bits()).collect()).collect()
}

#[test]
fn log_probs_depend_on_the_pair_alone() {
    let all = ["llama", "mistral", "llama-tied-bf16"];
    for (name, compute) in all.into_iter().flat_map(|name| types().map(move |compute| (name, compute))) {
        let model = open_in(&fixture(name), compute);
        let adapter = adapter(&fixture(name).join("adapter"), &model);
        let pairs = batch();
        for through in [Through::default(), policy(&adapter)] {
            let alone: Vec<_> =
                pairs.chunks(1).map(|pair| at(1, || token_logps(&model, pair, through)).remove(0)).collect();
            for threads in [1, 2, 3] {
                let together = at(threads, || token_logps(&model, &pairs, through));
                assert_eq!(bits(&together), bits(&alone), "{name}, {compute:?}, {threads} threads");
            }
            let turned: Vec<_> = pairs.iter().rev().cloned().collect();
            let mut turned = at(2, || token_logps(&model, &turned, through));
            turned.reverse();
            assert_eq!(bits(&turned), bits(&alone), "{name}, in another order");
        }
    }
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    for compute in types() {
        let model = open_in(&fixture("llama"), compute);
        let adapter = adapter(&fixture("llama").join("adapter"), &model);
        let pairs = batch();
        let refs: Vec<_> = pairs.iter().collect();
        let grads = [1, 2, 3].map(|threads| {
            at(threads, || gradient(&model, &adapter, &refs, &dpo(0.1)));
            adapter.grads.to_vec1::<f32>().expect("f32").into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        assert!(grads[0].iter().any(|bits| *bits != 0));
        assert!(grads[1] == grads[0] && grads[2] == grads[0], "{compute:?}");
    }
}

#[test]
fn gradients_do_not_depend_on_the_schedule() {
    let all = Schedule::default();
    let schedules = [
        Schedule { keep: 1, ..all.clone() },
        Schedule { keep: 99, sweep: 5000, ..all.clone() },
        Schedule { sweep: 5000, micro: 1, ..all.clone() },
        Schedule { sweep: 5000, micro: 300, head_chunk: 7, ..all.clone() },
        Schedule { sweep: 5000, micro: 300, scratch: true, stream: true, keep: 1, ..all.clone() },
        Schedule { stream: true, resident: 1, ..all.clone() },
        Schedule { sweep: 1, micro: 1, scratch: true, ..all.clone() },
    ];
    for name in ["llama", "mistral"] {
        let model = open(&fixture(name));
        let adapter = adapter(&fixture(name).join("adapter"), &model);
        let pairs = batch();
        let refs: Vec<_> = pairs.iter().collect();
        let with = |schedule: &Schedule| {
            let means = at(2, || gradient_by(schedule, &model, &adapter, &refs, &dpo(0.1)));
            let bits: Vec<_> = adapter.grads.to_vec1::<f32>().expect("f32").into_iter().map(f32::to_bits).collect();
            (means, bits)
        };
        let expected = with(&all);
        assert!(expected.1.iter().any(|bits| *bits != 0));
        for schedule in &schedules {
            assert!(with(schedule) == expected, "{name}, {schedule:?}");
        }
    }
}

#[test]
fn at_step_0_margins_are_0_and_the_loss_is_ln_2() {
    let all = ["llama", "mistral", "llama-bias"];
    for (name, compute) in all.into_iter().flat_map(|name| types().map(move |compute| (name, compute))) {
        let model = open_in(&fixture(name), compute);
        let adapter = fresh(&model, 4);
        let pairs = batch();
        // the reference meets each pair in another company, cut into other micro-batches, at another number of threads
        let mut reference = at(2, || sums(&model, &pairs.iter().rev().collect::<Vec<_>>(), Through::default()));
        reference.reverse();
        let folder = tempfile::tempdir().expect("a folder");
        for threads in [1, 3] {
            for size in [1, 2, 4, 9] {
                for (pairs, reference) in pairs.chunks(size).zip(reference.chunks(size)) {
                    let (objective, mut metrics) = (dpo(0.1), Metrics::new(0.1));
                    let pairs: Vec<_> = pairs.iter().collect();
                    let mut known = Reference::new(None)
                        .cached(&folder.path().join("cache"), &[0; 32], "cpu", Compute::F32, 8)
                        .expect("a cache");
                    for (pair, sums) in pairs.iter().zip(reference) {
                        known.learn(pair, *sums).expect("kept");
                    }
                    at(threads, || {
                        let (schedule, learns) = (Schedule::default(), (&adapter, None));
                        let engine = engine(&model, &schedule);
                        pairs::gradient(engine, &pairs, &mut known, &objective, learns, &mut metrics)
                    })
                    .expect("a gradient");
                    let means = metrics.mean().expect("pairs");
                    assert_eq!((means.margin, means.rewards_chosen, means.rewards_rejected), (0.0, 0.0, 0.0), "{name}");
                    // the mean over a power of two of equal numbers is that number
                    match pairs.len().is_power_of_two() {
                        true => assert_eq!(means.loss.to_bits(), LN_2.to_bits(), "{name}, {size} pairs"),
                        false => assert!((means.loss - LN_2).abs() < 1e-15, "{name}, {size} pairs"),
                    }
                    // B is zero, so nothing reaches A; B learns
                    let grads = numbers::by_name(&adapter, &adapter.grads);
                    let learns = |matrix: &str| {
                        grads.iter().any(|(name, grad)| name.contains(matrix) && grad.iter().any(|g| *g != 0.0))
                    };
                    assert!(learns("lora_B") && !learns("lora_A"), "{name}");
                }
            }
        }
    }
}
