//! Numbers that are not finite reach neither the optimizer nor a checkpoint: the step is left out, its rows are named,
//! and after a few in a row the run ends.

#[path = "support/tiny.rs"]
mod tiny;

use dpo_lora::data::tokenizer::Tokenizer;
use serde_json::Value;
use tiny::{Tiny, arguments, rows, stderr};

const HIDDEN: usize = 32;

fn skipped(tiny: &Tiny, name: &str) -> Vec<Value> {
    tiny.metrics(name).into_iter().filter(|row| row["skipped"] == true).collect()
}

/// Rows of which those of `bad` (counted from 0) hold a token whose embedding is not a number.
fn bad_rows(tiny: &Tiny, n: usize, bad: &[usize]) {
    let text: Vec<String> = rows(n).lines().map(str::to_string).collect();
    let text = text.iter().enumerate().map(|(i, row)| match bad.contains(&i) {
        true => row.replace("It is", "It ~ is") + "\n",
        false => format!("{row}\n"),
    });
    tiny.write("rows.jsonl", text.collect::<String>());
    let tokenizer = Tokenizer::open(&tiny.path("base")).unwrap();
    let tilde = |text: &str| tokenizer.encode(text, false).unwrap();
    let token = *tilde("a ~").iter().find(|id| !tilde("a ").contains(id)).unwrap() as usize;
    let mut weights = tiny::weights(2);
    let embedding = &mut weights.get_mut("model.embed_tokens.weight").unwrap().1;
    embedding[token * HIDDEN..][..HIDDEN].fill(f32::NAN);
    tiny::write_weights(&tiny.path("base/model.safetensors"), &weights);
}

/// What of a run goes wrong, where, and how often until it ends.
#[test]
fn wherever_it_appears_the_step_is_left_out_and_the_third_ends_the_run() {
    // the setting, what is said, and how many steps are good before
    let cases: [(&[&str], &str, usize); 5] = [
        (&["objective.loss=ipo_sum", "objective.beta=1e-200"], "the loss is not finite", 0),
        (&["objective.beta=1e42"], "the gradient is not finite", 0),
        (&["train.learning_rate=1e25", "train.lr_schedule=constant"], "the loss is not finite", 1),
        (&["train.learning_rate=1e300"], "the update would not be finite", 0),
        (&["objective.beta=1e30", "train.max_grad_norm=0"], "the update would not be finite", 0),
    ];
    let tiny = Tiny::new();
    for (number, (set, what, good)) in cases.into_iter().enumerate() {
        let name = number.to_string();
        let output = tiny.run(&arguments(&name, set, &[]));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{set:?}: {said}");
        let last = said.lines().last().unwrap();
        assert!(last.contains("3 steps in a row were left out") && last.contains(what), "{set:?}: {said}");
        assert!(last.contains("rows.jsonl:"), "{set:?}: {said}");
        let (steps, skipped) = (tiny.rows_of(&name, false), skipped(&tiny, &name));
        assert_eq!((steps.len(), skipped.len()), (good + 3, 3), "{set:?}: {steps:?}");
        assert_eq!(said.matches(" is left out: ").count(), 3, "{set:?}: {said}");
        assert!(skipped.iter().all(|row| row["why"].as_str().unwrap().contains(what)), "{set:?}: {skipped:?}");
        let checkpoints: Vec<_> =
            tiny.names(&format!("runs/{name}")).into_iter().filter(|name| name.starts_with("checkpoint")).collect();
        // What was learned before is kept, and it is finite: a checkpoint that is not cannot be read.
        assert_eq!(checkpoints.len(), good, "{set:?}");
        assert!(!tiny.path(&format!("runs/{name}/adapter")).exists(), "{set:?}");
        for checkpoint in checkpoints {
            let path = format!("runs/{name}/{checkpoint}");
            tiny.ok(&["inspect", path.as_str()]);
            let bytes = tiny.bytes(&format!("runs/{name}/{checkpoint}/adapter_model.safetensors"));
            let numbers = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (_, tensor) in numbers.tensors() {
                let finite = |number: &[u8]| f32::from_le_bytes(number.try_into().unwrap()).is_finite();
                assert!(tensor.data().chunks(4).all(finite));
            }
        }
    }
}

#[test]
fn a_single_bad_row_costs_its_steps_and_no_more() {
    let tiny = Tiny::new();
    bad_rows(&tiny, 12, &[6]);
    let set = ["data.shuffle=false", "train.epochs=2", "train.batch_size=3", "train.save_every=1"];
    let kept = [&set[..], &["train.keep_checkpoints=99"]].concat();
    let said = tiny.train("whole", &kept);
    assert_eq!(said.matches("rows.jsonl:7: the reference's log-probs are not finite").count(), 2, "{said}");
    let skipped = skipped(&tiny, "whole");
    let steps: Vec<u64> = skipped.iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [3, 7]);
    assert!(skipped[0]["rows"][0].as_str().unwrap().ends_with("rows.jsonl:7"), "{skipped:?}");
    assert_eq!(tiny.rows_of("whole", false).len(), 8);
    // A step that is left out changes neither weights nor moments.
    let same = |file: &str| {
        let digest = |step: u64| tiny.digest(&format!("runs/whole/checkpoint-{step}/{file}"));
        digest(2) == digest(3) && digest(3) != digest(4)
    };
    assert!(same("adapter_model.safetensors") && same("optimizer.safetensors"));
    // Gone on with just before it, at it and behind it, the run is the same run.
    for step in [2, 3, 4, 6] {
        tiny.train("a", &kept);
        tiny.ok(&arguments("a", &kept, &["--resume", &format!("runs/a/checkpoint-{step}")]));
        assert_eq!(
            (tiny.adapter("a"), tiny.timeless_metrics("a")),
            (tiny.adapter("whole"), tiny.timeless_metrics("whole"))
        );
    }
}

#[test]
fn steps_in_a_row_are_counted_across_a_resume() {
    let tiny = Tiny::new();
    bad_rows(&tiny, 8, &[3, 4, 5]);
    let set = ["data.shuffle=false", "train.batch_size=1", "train.save_every=1", "train.keep_checkpoints=99"];
    let run = |more: &[&str]| tiny.run(&arguments("a", &set, more));
    let output = run(&[]);
    let said = stderr(&output);
    // It is a file from outside that is at fault.
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("3 steps in a row were left out; of the last: ") && said.contains("rows.jsonl:6"), "{said}");
    let output = run(&["--resume", "runs/a/checkpoint-5"]);
    let said = stderr(&output);
    assert_eq!((output.status.code(), said.matches(" is left out: ").count()), (Some(3), 1), "{said}");
    // The end was saved: who goes on from there has read what was said.
    let output = run(&["--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let steps: Vec<u64> = skipped(&tiny, "a").iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [4, 5, 6]);
}

#[test]
fn a_bad_row_that_is_held_out_is_named() {
    let tiny = Tiny::new();
    bad_rows(&tiny, 4, &[2]);
    tiny.write("held-out.jsonl", tiny.bytes("rows.jsonl"));
    tiny.write("rows.jsonl", rows(8));
    let output = tiny.run(&arguments("a", &["data.eval=[\"held-out.jsonl\"]"], &[]));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("held-out.jsonl:3: the reference's log-probs are not finite"), "{said}");
}

#[test]
fn a_policy_that_evaluates_to_nothing_pushes_out_no_checkpoint() {
    let tiny = Tiny::new();
    tiny.write("held-out.jsonl", rows(4));
    let set = ["data.eval=[\"held-out.jsonl\"]", "train.eval_every=2", "train.learning_rate=1e30"];
    let output = tiny.run(&arguments("a", &set, &[]));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("held-out.jsonl:1: ") && !said.contains("saved"), "{said}");
    assert!(!tiny.names("runs/a").iter().any(|name| name.starts_with("checkpoint")));
}

#[test]
fn a_cache_that_holds_what_is_not_finite_is_not_believed() {
    let tiny = Tiny::new();
    let set = ["train.save_every=1", "train.keep_checkpoints=99"];
    tiny.train("whole", &set);
    tiny.train("a", &set);
    let mut cache = tiny.bytes("runs/a/reference.cache");
    // header: magic, key, checksum; record: hash, two sums, checksum
    let (header, record) = (16 + 32 + 4, 32 + 16 + 4);
    assert_eq!((cache.len() - header) % record, 0);
    let first = header..header + record - 4;
    cache[first.start + 32..first.start + 40].copy_from_slice(&f64::NAN.to_le_bytes());
    let mut seal = flate2::Crc::new();
    seal.update(&cache[first.clone()]);
    cache[first.end..first.end + 4].copy_from_slice(&seal.sum().to_le_bytes());
    tiny.write("runs/a/reference.cache", cache);
    let said = tiny.run(&arguments("a", &set, &["--resume", "runs/a/checkpoint-1"]));
    assert!(said.status.success() && !stderr(&said).contains("left out"), "{}", stderr(&said));
    assert_eq!(
        (tiny.adapter("a"), tiny.timeless_metrics("a")),
        (tiny.adapter("whole"), tiny.timeless_metrics("whole"))
    );
}

#[test]
fn logits_that_overflow_are_no_text() {
    let tiny = Tiny::new();
    let mut weights = tiny::weights(2);
    weights.get_mut("model.norm.weight").unwrap().1.fill(1e4);
    // each logit is one product, infinite with one sign or the other, so that none is a NaN
    for (i, value) in weights.get_mut("lm_head.weight").unwrap().1.iter_mut().enumerate() {
        *value = if i % 32 == 0 { 3e38 } else { 0.0 };
    }
    tiny::write_weights(&tiny.path("base/model.safetensors"), &weights);
    let output = tiny.run(&["generate", "base", "--prompt", "tea"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("the model's logits are not finite"), "{}", stderr(&output));
}
