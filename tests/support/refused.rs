//! One check for every bad input: exit code 3, one sentence that names the place and the remedy, nothing left behind.

#![allow(dead_code, reason = "each test program uses a part of it")]

use crate::tiny::{Tiny, stderr};

/// The command that reads everything.
pub const TRAIN: [&str; 2] = ["train", "recipe.toml"];

/// An f32 that is not a number, as it lies in a file.
pub const NAN: [u8; 4] = [0, 0, 0xc0, 0x7f];

/// What is bad, how it came to be, and what the message must say.
pub type Case = (&'static str, fn(&Tiny), &'static [&'static str]);

/// Runs a command on each spoilt folder; every message must be as the case says.
#[track_caller]
pub fn refused(arguments: &[&str], cases: &[Case]) {
    let mut wrong = Vec::new();
    for (what, spoil, parts) in cases {
        let tiny = Tiny::new();
        spoil(&tiny);
        let output = tiny.run(arguments);
        let said = stderr(&output);
        let message = said.lines().last().unwrap_or_default();
        let fits = output.status.code() == Some(3)
            && message.starts_with("error: ")
            && said.matches("error: ").count() == 1
            && parts.iter().all(|part| message.contains(part))
            && !said.contains("panicked")
            && output.stdout.is_empty()
            && (!tiny.path("runs").exists() || said.contains("not finite"));
        if !fits {
            wrong.push(format!("{what}: {:?}, expected {parts:?}:\n{said}", output.status.code()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
