//! A prompt that stands once for both answers, against two separate sequences; and that a batch may be cut anywhere.

use candle_core::Tensor;
use dpo_lora::{
    data::TokenizedPair,
    engine::{
        pack::{Tree, pack},
        pass::Micro,
        schedule::Schedule,
    },
    kernels::dropout::Dropout,
    model::{decoder::Decoder, linear::Through, lora::Adapter},
    objective::Metrics,
    random::Stream,
    recipe::{Loss, Objective},
    train::{
        pairs::{self, StepDropout},
        reference::Reference,
    },
};

#[path = "support/numbers.rs"]
mod numbers;

use numbers::{
    Most, adapter, allowed, by_name, dpo, everywhere, fixture, gradient, open, pair, relative_l2, tree, worst,
};

/// One with grouped heads, one with biases, one with a sliding window of 8.
const MODELS: [&str; 3] = ["llama", "llama-bias", "mistral"];
const VOCABULARY: usize = 64;

/// A batch of random pairs in which short ones are many: one-token prompts, one-token answers, all of them unequal.
fn batch(pairs: u64) -> Vec<TokenizedPair> {
    let length = |pair: u64, part: u64| {
        let stream = Stream::new(pairs, "lengths").at(pair);
        match (pair + part) % 3 {
            0 => 1,
            _ => 2 + stream.below(part, if part == 0 { 90 } else { 60 }) as usize,
        }
    };
    (0..pairs).map(|i| pair(100 * pairs + i, [0, 1, 2].map(|part| length(i, part)), VOCABULARY)).collect()
}

/// Log-probs of all answers' tokens, and the gradient of their sum with these weights, added to what is there.
fn pass(model: &Decoder, adapter: &Adapter, trees: &[Tree], weights: &[f32], dropout: Option<Dropout>) -> Vec<f32> {
    let through = Through { dropout, ..Through::of(Some(adapter)) };
    let packed = pack(trees, &model.rotary, &model.device).expect("a run of tokens");
    let schedule = Schedule::default();
    let (engine, micros) = (numbers::engine(model, &schedule), [Micro { packed: &packed, through }]);
    let (scores, _, saved) = engine.forward_saving(&micros, &[]).expect("scores");
    engine.backward(&micros, saved, &[weights.to_vec()]).expect("a gradient");
    scores[0].iter().map(|score| score.logp).collect()
}

/// Holds the adapter's gradient against another, tensor by tensor.
fn see(most: &mut Most, adapter: &Adapter, grads: &Tensor, expected: &Tensor, place: &str) {
    let expected = by_name(adapter, expected);
    for (name, ours) in by_name(adapter, grads) {
        most.see(relative_l2(&ours, &expected[&name]), format!("{place}, {name}"));
    }
}

/// A tree for each answer, each with the prompt.
fn split<'a>(tree: &Tree<'a>) -> Vec<Tree<'a>> {
    tree.answers.iter().map(|answer| Tree { prompt: tree.prompt, answers: vec![*answer] }).collect()
}

/// A weight for every answer token.
fn weights(pairs: &[TokenizedPair]) -> Vec<f32> {
    let tokens: usize = pairs.iter().map(|pair| pair.chosen.len() + pair.rejected.len()).sum();
    (0..tokens as u64).map(|i| Stream::new(1, "weights").uniform(i) as f32 - 0.3).collect()
}

#[test]
fn a_shared_prompt_is_two_separate_sequences() {
    everywhere(|| {
        let mut logps = Most::of("shared prompt, log-prob of a token");
        let mut grads = Most::of("shared prompt, gradient of a LoRA tensor, relative L2");
        for name in MODELS {
            let model = open(&fixture(name));
            let adapter = adapter(&fixture(name).join("adapter"), &model);
            for n in 1..=9 {
                let pairs = batch(n);
                let (shared, weights) = (pairs.iter().map(tree).collect::<Vec<_>>(), weights(&pairs));
                // the same order of answers, so the weights fit both
                let separate: Vec<_> = shared.iter().flat_map(split).collect();
                adapter.clear_grads().expect("zeros");
                let expected = pass(&model, &adapter, &separate, &weights, None);
                let expected_grads = adapter.grads.copy().expect("a copy");
                adapter.clear_grads().expect("zeros");
                let ours = pass(&model, &adapter, &shared, &weights, None);
                let place = format!("{name}, {n} pairs");
                logps.see(worst(&ours, &expected), place.as_str());
                see(&mut grads, &adapter, &adapter.grads, &expected_grads, &place);
            }
        }
        logps.at_most(1e-5);
        grads.at_most(1e-5);
    });
}

#[test]
fn a_batch_may_be_cut_anywhere() {
    everywhere(|| {
        let mut logps = Most::of("cut batch, log-prob of a token");
        let mut grads = Most::of("cut batch, gradient of a LoRA tensor, relative L2");
        for name in MODELS {
            let model = open(&fixture(name));
            let adapter = adapter(&fixture(name).join("adapter"), &model);
            let pairs = batch(9);
            let weights = weights(&pairs);
            // dropout is drawn by a token's number in the batch, so that it does not see the cut
            let dropout = |first_row| Dropout { p: 0.2, stream: Stream::new(3, "dropout"), first_row };
            for dropped in [false, true] {
                let cut = |size: usize| {
                    adapter.clear_grads().expect("zeros");
                    let (mut all, mut first_row) = (vec![], 0);
                    for micro in pairs.chunks(size) {
                        let trees: Vec<_> = micro.iter().map(tree).collect();
                        let tokens: usize = micro.iter().map(|pair| pair.chosen.len() + pair.rejected.len()).sum();
                        let weights = &weights[all.len()..][..tokens];
                        all.extend(pass(&model, &adapter, &trees, weights, dropped.then(|| dropout(first_row))));
                        first_row += trees.iter().map(Tree::tokens).sum::<usize>() as u64;
                    }
                    (all, adapter.grads.copy().expect("a copy"))
                };
                let (whole, whole_grads) = cut(9);
                for size in [1, 2, 4] {
                    let (ours, ours_grads) = cut(size);
                    let place = format!("{name}, micro-batches of {size}, dropout {dropped}");
                    logps.see(worst(&ours, &whole), place.as_str());
                    see(&mut grads, &adapter, &ours_grads, &whole_grads, &place);
                }
            }
        }
        logps.at_most(0.0);
        grads.at_most(1e-5);
    });
}

/// Nine pairs of 250 tokens and more: a run cuts them into micro-batches.
fn long_pairs() -> Vec<TokenizedPair> {
    (0..9).map(|i| pair(i, [120 + 3 * i as usize, 90, 60 + i as usize], VOCABULARY)).collect()
}

#[test]
fn a_step_is_the_mean_of_its_pairs() {
    everywhere(|| {
        let mut grads = Most::of("step of 9 pairs, gradient of a LoRA tensor, relative L2");
        let model = open(&fixture("llama"));
        let adapter = adapter(&fixture("llama").join("adapter"), &model);
        let pairs = long_pairs();
        let refs: Vec<_> = pairs.iter().collect();
        let mut mean = adapter.grads.zeros_like().expect("zeros");
        let mut loss = 0.0;
        for pair in &refs {
            loss += gradient(&model, &adapter, &[*pair], &dpo(0.1)).loss / 9.0;
            mean = (mean + (&adapter.grads / 9.0).expect("a part")).expect("a sum");
        }
        let means = gradient(&model, &adapter, &refs, &dpo(0.1));
        assert!((means.loss - loss).abs() < allowed(1e-12), "{} {loss}", means.loss);
        see(&mut grads, &adapter, &adapter.grads, &mean, "llama");
        grads.at_most(1e-5);
    });
}

#[test]
fn a_step_s_dropout_is_drawn_by_the_token_s_number_in_the_step() {
    everywhere(|| {
        let mut grads = Most::of("step of 9 pairs with dropout, gradient of a LoRA tensor, relative L2");
        let model = open(&fixture("llama"));
        let adapter = adapter(&fixture("llama").join("adapter"), &model);
        let pairs = long_pairs();
        let refs: Vec<_> = pairs.iter().collect();
        // the hinge's slope is the same wherever its margin is below 1, which a small beta sees to
        let objective = Objective { loss: Loss::Hinge, ..dpo(1e-3) };
        let (p, stream) = (0.3, Stream::new(2, "dropout").at(5));
        let mut reference = Reference::new(Some(numbers::adapter(&fixture("llama").join("adapter"), &model)));
        let mut metrics = Metrics::new(objective.beta);
        let learns = (&adapter, Some(StepDropout { p, stream }));
        let schedule = Schedule::default();
        let engine = numbers::engine(&model, &schedule);
        pairs::gradient(engine, &refs, &mut reference, &objective, learns, &mut metrics).expect("a gradient");
        let ours = adapter.grads.copy().expect("a copy");

        let trees: Vec<_> = pairs.iter().map(tree).collect();
        assert!(trees.iter().map(Tree::tokens).sum::<usize>() > 2 * 768, "the step is not cut");
        let slope = (objective.beta / 9.0) as f32;
        let weights: Vec<f32> = pairs
            .iter()
            .flat_map(|pair| [vec![-slope; pair.chosen.len()], vec![slope; pair.rejected.len()]].concat())
            .collect();
        adapter.clear_grads().expect("zeros");
        pass(&model, &adapter, &trees, &weights, Some(Dropout { p, stream, first_row: 0 }));
        see(&mut grads, &adapter, &ours, &adapter.grads, "llama");
        grads.at_most(1e-5);
    });
}
