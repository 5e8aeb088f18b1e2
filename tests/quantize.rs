//! `quantize`, and a quantised base through every command: what is written is read again, trains, and is merged only on
//! request.

mod support {
    pub mod tiny;
}

use support::tiny::{Tiny, stderr};

#[test]
fn a_gguf_file_of_ours_is_a_base_like_any_other() {
    let tiny = Tiny::new();
    let said = tiny.ok(&["quantize", "base", "--to", "q8_0", "small.gguf"]);
    assert!(said.contains("model.layers.0.self_attn.q_proj.weight") && said.contains("error in all 0.00"), "{said}");
    let facts = tiny.ok(&["inspect", "small.gguf"]);
    assert!(facts.contains("Q8_0") && facts.contains("llama"), "{facts}");

    tiny.train("small", &["model.base=small.gguf", "train.max_steps=2"]);
    tiny.train("base", &["train.max_steps=2"]);
    let loss = |run: &str| tiny.metrics(run)[1]["loss"].as_f64().unwrap();
    assert!((loss("small") - loss("base")).abs() < 0.02, "{} for {}", loss("small"), loss("base"));

    // the same tokens, so the same numbers of them
    let tokens = |run: &str| tiny.metrics(run)[1]["num_tokens"].clone();
    assert_eq!(tokens("small"), tokens("base"));

    let refused = tiny.run(&["export", "runs/small", "--to", "merged", "merged"]);
    let said = stderr(&refused);
    assert!(
        refused.status.code() == Some(2) && said.contains("--base MODEL") && said.contains("--dtype bf16"),
        "{said}"
    );
    let said = tiny.ok(&["export", "runs/small", "--to", "merged", "merged", "--dtype", "bf16"]);
    assert!(said.contains("merged and adapter differ by"), "{said}");
    tiny.ok(&["generate", "merged", "--prompt", "a", "--max-new-tokens", "3"]);
    tiny.ok(&["export", "runs/small", "--to", "merged", "original", "--base", "base"]);

    let refused = tiny.run(&["quantize", "small.gguf", "--to", "q8_0", "again.gguf"]);
    assert!(refused.status.code() == Some(3) && stderr(&refused).contains("quantised already"), "{}", stderr(&refused));
    assert!(!tiny.path("again.gguf").exists());
}

#[test]
fn rows_that_do_not_fit_a_format_take_the_next_one_or_are_refused() {
    let tiny = Tiny::new();
    let said = tiny.ok(&["quantize", "base", "--to", "q4_k", "small.gguf"]);
    assert!(said.contains("Q5_0") && !said.contains("Q4_K "), "{said}");
    tiny.train("small", &["model.base=small.gguf", "train.max_steps=1"]);
    let refused = tiny.run(&["quantize", "base", "--to", "nf4", "small"]);
    assert!(refused.status.code() == Some(3) && stderr(&refused).contains("choose --to q8_0"), "{}", stderr(&refused));
    assert!(!tiny.path("small").exists());
}
