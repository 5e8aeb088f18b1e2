//! An adapter is measured and merged on the base that it was trained on; another one, or other rows, are told of.

#[path = "support/tiny.rs"]
mod tiny;

use serde_json::json;
use tiny::{Tiny, rows, stderr, weights, write_weights};

const ANOTHER: &str = "not the base that runs/a";

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    tiny.write("held-out.jsonl", rows(5));
    tiny.train("a", &["train.max_steps=2", "train.save_every=1", "data.eval=[\"held-out.jsonl\"]"]);
    tiny
}

/// Runs the binary, which must succeed; its stderr.
#[track_caller]
fn said(tiny: &Tiny, arguments: &[&str]) -> String {
    let output = tiny.run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

#[test]
fn a_base_that_changed_is_refused_unless_it_is_named() {
    let tiny = tiny();
    let checkpoint = "runs/a/checkpoint-1";
    let eval: [&[&str]; 2] = [&["eval", "runs/a"], &["eval", "runs/a", "--adapter", checkpoint]];
    let export = |from, out| ["export", from, "--to", "merged", out];
    for arguments in [eval[0], eval[1], &export("runs/a", "whole"), &export(checkpoint, "early")] {
        let said = said(&tiny, arguments);
        assert!(!said.contains(ANOTHER), "{said}");
    }

    let mut changed = weights(2);
    changed.get_mut("model.norm.weight").unwrap().1[0] = 1.5;
    let changes: [&dyn Fn(); 2] = [&|| write_weights(&tiny.path("base/model.safetensors"), &changed), &|| {
        write_weights(&tiny.path("base/model.safetensors"), &weights(2));
        tiny.set_json("base/config.json", "rope_theta", json!(20000.0));
    }];
    for change in changes {
        change();
        let (run, early) = (export("runs/a", "out"), export(checkpoint, "out"));
        let cases = [(eval[0], "--set model.base=MODEL"), (eval[1], "--set model.base=MODEL")];
        for (arguments, remedy) in cases.into_iter().chain([(&run[..], "--base MODEL"), (&early[..], "--base MODEL")]) {
            let output = tiny.run(arguments);
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
            assert!(said.contains(ANOTHER) && said.contains(remedy), "{arguments:?}: {said}");
        }
        assert!(!tiny.path("out").exists());
        // an adapter that lies alone does not tell what it was trained on
        tiny.ok(&["export", "runs/a", "--to", "peft", "peft"]);
        for arguments in [
            &["eval", "runs/a", "--set", "model.base=base"][..],
            &["eval", "recipe.toml", "--adapter", checkpoint, "--data", "held-out.jsonl"],
            &[&run[..], &["--base", "base"]].concat(),
        ] {
            let said = said(&tiny, arguments);
            assert!(said.contains("warning: ") && said.contains(ANOTHER), "{arguments:?}: {said}");
        }
        let said = said(&tiny, &export("peft", "alone"));
        assert!(!said.contains(ANOTHER), "{said}");
        for made in ["out", "alone", "peft"] {
            std::fs::remove_dir_all(tiny.path(made)).unwrap();
        }
    }
}

#[test]
fn held_out_rows_that_changed_are_told_of_unless_others_are_named() {
    const OTHER_ROWS: &str = "warning: these are not the rows that the run held out";
    let tiny = tiny();
    assert!(!said(&tiny, &["eval", "runs/a"]).contains(OTHER_ROWS));
    tiny.write("held-out.jsonl", rows(4));
    assert!(said(&tiny, &["eval", "runs/a"]).contains(OTHER_ROWS));
    assert!(!said(&tiny, &["eval", "runs/a", "--data", "held-out.jsonl"]).contains(OTHER_ROWS));
}
