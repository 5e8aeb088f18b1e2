//! A real model against TRL and PEFT: log-probs, losses, gradients, metrics and two optimizer steps on SmolLM2-135M.
//!
//! `DPO_LORA_SMOLLM2` is the Hugging Face folder of SmolLM2, `DPO_LORA_GOLDEN` the folder of TRL's figures; the tests
//! are skipped where one is not set.

use std::{collections::BTreeMap, path::PathBuf};

use dpo_lora::{
    data::TokenizedPair,
    export::AdapterFolder,
    kernels::compute::Compute,
    model::linear::Through,
    objective::{Means, PairLogps, loss},
    optim::{AdamW, Gradient, Optimizer, global_norm},
    recipe::{Loss, Objective},
};
use serde_json::Value;

#[path = "support/numbers.rs"]
mod numbers;
mod support;

use numbers::{
    Most, adapter, by_name, dpo, everywhere, gradient, json, open, open_in, policy, relative_l2, tensors, token_logps,
    worst,
};

const BETA: f64 = 0.1;
const BATCH: usize = 2;

#[derive(serde::Deserialize)]
struct Row {
    prompt_ids: Vec<u32>,
    chosen_ids: Vec<u32>,
    rejected_ids: Vec<u32>,
    policy_chosen_token_logps: Vec<f32>,
    policy_rejected_token_logps: Vec<f32>,
    ref_chosen_token_logps: Vec<f32>,
    ref_rejected_token_logps: Vec<f32>,
    policy_chosen_logps: f64,
    policy_rejected_logps: f64,
    ref_chosen_logps: f64,
    ref_rejected_logps: f64,
    reward_chosen: f64,
    reward_rejected: f64,
    margin: f64,
    loss_sigmoid: f64,
}

/// The model's and the figures' folders, the figures' rows and their pairs.
fn inputs() -> Option<(PathBuf, PathBuf, Vec<Row>, Vec<TokenizedPair>)> {
    let (model, golden) = (support::required_env("DPO_LORA_SMOLLM2"), support::required_env("DPO_LORA_GOLDEN"));
    let (model, golden) = (model?, golden?);
    let rows: Vec<Row> = json(&golden.join("pairs.json"));
    assert_eq!(rows.len(), 10);
    let pair = |row: &Row| TokenizedPair {
        prompt: row.prompt_ids.clone(),
        chosen: row.chosen_ids.clone(),
        rejected: row.rejected_ids.clone(),
        origin: (0, 1),
    };
    let pairs = rows.iter().map(pair).collect();
    Some((model, golden, rows, pairs))
}

#[test]
fn log_probs_and_losses_are_trl_s() {
    everywhere(|| {
        let Some((folder, golden, rows, pairs)) = inputs() else { return };
        let model = open(&folder);
        let start = adapter(&golden.join("init_adapter"), &model);
        let [mut tokens, mut summed, mut losses] =
            ["golden, log-prob of a token", "golden, log-prob of an answer", "golden, loss of a pair"].map(Most::of);
        let sum = |tokens: &[f32]| tokens.iter().map(|logp| f64::from(*logp)).sum::<f64>();
        for (i, (row, pair)) in rows.iter().zip(&pairs).enumerate() {
            let [of_policy, of_reference] = [policy(&start), Through::default()]
                .map(|through| token_logps(&model, std::slice::from_ref(pair), through).remove(0));
            tokens.see(worst(&of_policy[0], &row.policy_chosen_token_logps), format!("row {i}, policy, chosen"));
            tokens.see(worst(&of_policy[1], &row.policy_rejected_token_logps), format!("row {i}, policy, rejected"));
            tokens.see(worst(&of_reference[0], &row.ref_chosen_token_logps), format!("row {i}, reference, chosen"));
            tokens.see(worst(&of_reference[1], &row.ref_rejected_token_logps), format!("row {i}, reference, rejected"));

            let (chosen, rejected) = (sum(&of_policy[0]), sum(&of_policy[1]));
            let (ref_chosen, ref_rejected) = (sum(&of_reference[0]), sum(&of_reference[1]));
            let (chosen_tokens, rejected_tokens) = (pair.chosen.len(), pair.rejected.len());
            let ours = PairLogps { chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens };
            summed.see((chosen - row.policy_chosen_logps).abs(), format!("row {i}, policy, chosen"));
            summed.see((rejected - row.policy_rejected_logps).abs(), format!("row {i}, policy, rejected"));
            summed.see((ref_chosen - row.ref_chosen_logps).abs(), format!("row {i}, reference, chosen"));
            summed.see((ref_rejected - row.ref_rejected_logps).abs(), format!("row {i}, reference, rejected"));
            losses.see((loss(&dpo(BETA), &ours).loss - row.loss_sigmoid).abs(), format!("row {i}"));
            // rewards are sums times beta
            let (chosen, rejected) = (BETA * ours.chosen_logratio(), BETA * ours.rejected_logratio());
            assert!((chosen - row.reward_chosen).abs() < 2.0 * BETA * 3e-3, "row {i}: {chosen}");
            assert!((rejected - row.reward_rejected).abs() < 2.0 * BETA * 3e-3, "row {i}: {rejected}");
            assert!((chosen - rejected - row.margin).abs() < 4.0 * BETA * 3e-3, "row {i}: {chosen} {rejected}");
        }
        tokens.at_most(1e-4);
        summed.at_most(3e-3);
        losses.at_most(2e-5);
    });
}

/// What rounding the products' operands to bf16 changes; docs/performance.md quotes the figures that this prints.
#[test]
fn bf16_products_change_log_probs_a_little() {
    let Some((folder, golden, rows, pairs)) = inputs() else { return };
    if Compute::bf16_or_f32() != Compute::Bf16 {
        println!("skipped: this processor has no bf16 products");
        return;
    }
    let model = open_in(&folder, Compute::Bf16);
    let start = adapter(&golden.join("init_adapter"), &model);
    let [mut tokens, mut summed, mut margins] =
        ["bf16, log-prob of a token", "bf16, log-prob of an answer", "bf16, margin of a pair"].map(Most::of);
    let (mut total, mut count) = (0.0, 0);
    let sum = |tokens: &[f32]| tokens.iter().map(|logp| f64::from(*logp)).sum::<f64>();
    for (i, (row, pair)) in rows.iter().zip(&pairs).enumerate() {
        let [of_policy, of_reference] = [policy(&start), Through::default()]
            .map(|through| token_logps(&model, std::slice::from_ref(pair), through).remove(0));
        for (ours, theirs) in of_policy.iter().zip([&row.policy_chosen_token_logps, &row.policy_rejected_token_logps]) {
            tokens.see(worst(ours, theirs), format!("row {i}"));
            summed.see((sum(ours) - sum(theirs)).abs(), format!("row {i}"));
            total += ours.iter().zip(theirs).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
            count += ours.len();
        }
        let reward = |answer: usize| BETA * (sum(&of_policy[answer]) - sum(&of_reference[answer]));
        margins.see((reward(0) - reward(1) - row.margin).abs(), format!("row {i}"));
    }
    println!("measured: bf16, log-prob of a token, mean: {:.2e} of {count} tokens", total / f64::from(count as u32));
    tokens.at_most(0.25);
    summed.at_most(0.5);
    margins.at_most(0.1);
}

#[test]
fn every_loss_is_trl_s() {
    #[derive(serde::Deserialize)]
    struct Golden {
        beta: f64,
        policy_chosen: Vec<f64>,
        policy_rejected: Vec<f64>,
        ref_chosen: Vec<f64>,
        ref_rejected: Vec<f64>,
        chosen_tokens: Vec<usize>,
        rejected_tokens: Vec<usize>,
        losses: BTreeMap<String, Value>,
    }
    let Some(folder) = support::required_env("DPO_LORA_GOLDEN") else { return };
    let golden: Golden = json(&folder.join("losses.json"));
    let mean = |kind, label_smoothing| {
        let objective = Objective { loss: kind, label_smoothing, ..dpo(golden.beta) };
        let logps = |i: usize| PairLogps {
            chosen: golden.policy_chosen[i],
            rejected: golden.policy_rejected[i],
            ref_chosen: golden.ref_chosen[i],
            ref_rejected: golden.ref_rejected[i],
            chosen_tokens: golden.chosen_tokens[i],
            rejected_tokens: golden.rejected_tokens[i],
        };
        (0..golden.policy_chosen.len()).map(|i| loss(&objective, &logps(i)).loss).sum::<f64>()
            / golden.policy_chosen.len() as f64
    };
    let mut losses = Most::of("golden, mean of each loss");
    // TRL ignores label smoothing for sigmoid; cDPO has a name of its own below
    for (name, kind, smoothing) in [
        ("sigmoid|label_smoothing=0.0", Loss::Sigmoid, 0.0),
        ("hinge|label_smoothing=0.0", Loss::Hinge, 0.0),
        ("ipo|label_smoothing=0.0", Loss::Ipo, 0.0),
        ("robust|label_smoothing=0.1", Loss::Robust, 0.1),
        ("cdpo|label_smoothing=0.1", Loss::Sigmoid, 0.1),
        ("ipo_unnormalised", Loss::IpoSum, 0.0),
    ] {
        let theirs = golden.losses[name]["loss"].as_f64().expect("a loss");
        losses.see((mean(kind, smoothing) - theirs).abs(), name);
    }
    losses.at_most(1e-5);
}

#[test]
fn two_steps_are_trl_s() {
    everywhere(|| {
        let Some((folder, golden, _, pairs)) = inputs() else { return };
        let model = open(&folder);
        let start = golden.join("init_adapter");
        let adapter = adapter(&start, &model);
        let before = by_name(&adapter, &adapter.values);
        let summary: Value = json(&golden.join("summary.json"));
        let rate = summary["lr"].as_f64().expect("a rate");
        assert_eq!(AdapterFolder::read(&start).expect("the adapter").matrices.len() * 2, before.len());
        let mut optimizer = Optimizer::AdamW(AdamW::new(&adapter.values, [0.9, 0.999], 0.0).expect("AdamW"));

        let mut grads = Most::of("golden, gradient of a LoRA tensor, relative L2");
        let mut scalars = Most::of("golden, loss and gradient norm of a step, relative");
        let mut changes = Most::of("golden, change of a LoRA tensor over the steps, relative L2");
        let mut metrics = Most::of("golden, other metrics of a step, part of what is allowed");
        let mut num_tokens = 0;
        for (step, batch) in pairs.chunks(BATCH).take(2).enumerate() {
            let means = gradient(&model, &adapter, &batch.iter().collect::<Vec<_>>(), &dpo(BETA));
            let theirs = &summary["train_steps"][step];
            let number = |name: &str| theirs[name].as_f64().unwrap_or_else(|| panic!("no {name} of step {step}"));
            let norm = global_norm(&adapter.grads).expect("a norm");
            for (name, ours) in [("loss", means.loss), ("grad_norm", norm)] {
                scalars.see((ours / number(name) - 1.0).abs(), format!("{name} of step {step}"));
            }
            num_tokens += means.num_tokens;
            assert_eq!(num_tokens as f64, number("num_tokens"));
            for (name, ours) in named(&means) {
                let off = (ours - number(name)).abs() / tolerance(name);
                println!("measured: step {step}, {name}: {ours} for {}", number(name));
                metrics.see(off, format!("{name} of step {step}"));
            }

            if step == 0 {
                let ours = by_name(&adapter, &adapter.grads);
                let theirs = tensors(&golden.join("grads_batch1_selected.safetensors"));
                assert_eq!(theirs.len(), 12);
                for (name, theirs) in &theirs {
                    grads.see(relative_l2(&ours[name], theirs), name);
                }
            }

            let gradient = Gradient { values: &adapter.grads, norm, scale: 1.0 };
            optimizer.step(&adapter.values, gradient, rate).expect("a step");
            let after = by_name(&adapter, &adapter.values);
            let theirs = tensors(&golden.join(format!("params_after_step{}_selected.safetensors", step + 1)));
            assert_eq!(theirs.len(), 12);
            for (name, theirs) in &theirs {
                let moved =
                    |after: &[f32]| -> Vec<f32> { after.iter().zip(&before[name]).map(|(a, b)| a - b).collect() };
                changes
                    .see(relative_l2(&moved(&after[name]), &moved(theirs)), format!("{name} after step {}", step + 1));
            }
        }
        grads.at_most(3e-4);
        scalars.at_most(1e-4);
        changes.at_most(1e-2);
        metrics.at_most(1.0);
    });
}

/// What TRL logs, but for the loss.
fn named(means: &Means) -> impl Iterator<Item = (&'static str, f64)> {
    means.named().into_iter().filter(|(name, _)| *name != "loss")
}

/// How far a metric may lie from TRL's. Log-probs: as a sum; rewards: beta times two of them; the others are means of
/// what is right to 1e-4 a token.
fn tolerance(name: &str) -> f64 {
    match name {
        "logps/chosen" | "logps/rejected" => 3e-3,
        "rewards/chosen" | "rewards/rejected" => BETA * 2.0 * 3e-3,
        "rewards/margins" => BETA * 4.0 * 3e-3,
        "rewards/accuracies" | "mean_token_accuracy" => 1e-6,
        _ => 1e-4,
    }
}
