//! A reader of stdout that has seen enough (`| head`) ends a command that only prints, quietly.
#![cfg(unix)]

#[path = "support/tiny.rs"]
mod tiny;

use std::io::Read;
use std::process::{Output, Stdio};

use tiny::{Tiny, rows, stderr};

/// Runs the binary and reads the first byte alone. What it prints is more than a pipe holds, so that it still writes
/// when its reader goes.
fn head(tiny: &Tiny, arguments: &[&str]) -> Output {
    let mut child = tiny.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn data_check_reads_no_further_set() {
    let tiny = Tiny::new();
    tiny.write("rows.jsonl", rows(1000));
    tiny.write("held-out.jsonl", "{}\n");
    let check = ["data", "check", "recipe.toml", "--show", "1000", "--json", "--set", "data.eval=[\"held-out.jsonl\"]"];
    let whole = tiny.run(&check);
    assert_eq!(whole.status.code(), Some(3), "{}", stderr(&whole));
    assert!(whole.stdout.len() > 200_000);
    let output = head(&tiny, &check);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn generate_draws_no_further_samples() {
    let tiny = Tiny::new();
    // the second does not fit: it is refused once it is its turn
    tiny.write("prompts.txt", format!("{}\n{}\n", "tea ".repeat(100), "tea ".repeat(2000)));
    let generate = ["generate", "base", "--prompts", "prompts.txt", "--count", "400", "--max-new-tokens", "1"];
    let whole = tiny.run(&generate);
    assert_eq!(whole.status.code(), Some(2), "{}", stderr(&whole));
    assert!(whole.stdout.len() > 150_000);
    let output = head(&tiny, &generate);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}
