//! One run at a time writes to a folder, and the files that it maps stay as they are.
#![cfg(unix)]

#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};

use tiny::{Tiny, arguments, rows, stderr};

/// Long enough to be looked at while it runs, and to end within a test.
const LONG: [&str; 4] =
    ["train.max_steps=400", "train.save_every=10", "train.eval_every=5", "data.eval=[\"held-out.jsonl\"]"];

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    tiny.write("held-out.jsonl", rows(3));
    tiny
}

/// Starts a run, waits until it has saved, and holds it there: it goes on when the test says so, however busy the machine.
fn start(tiny: &Tiny, name: &str, more: &[&str]) -> Child {
    let mut command = tiny.command(&arguments(name, &LONG, more));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while !tiny.path(&format!("runs/{name}/checkpoint-10")).exists() {
        assert!(began.elapsed() < Duration::from_secs(300), "no checkpoint");
        sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    child
}

#[test]
fn a_second_run_is_told_who_writes_and_changes_nothing() {
    let tiny = tiny();
    let mut first = start(&tiny, "a", &[]);
    for more in [&[][..], &["--resume"]] {
        let output = tiny.run(&arguments("a", &LONG, more));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let holder = format!("runs/a: process {} on ", first.id());
        assert!(said.contains(&holder) && said.contains(" UTC writes to this run's folder"), "{said}");
        assert_eq!(tiny.names("runs"), ["a"]);
    }
    assert!(first.try_wait().unwrap().is_none(), "the first run still runs");
    // However a process ends, its lock is gone.
    first.kill().unwrap();
    first.wait().unwrap();
    tiny.ok(&arguments("a", &LONG, &["--resume"]));
    tiny.train("whole", &LONG);
    assert_eq!(
        (tiny.adapter("a"), tiny.timeless_metrics("a")),
        (tiny.adapter("whole"), tiny.timeless_metrics("whole"))
    );
}

#[test]
fn a_base_that_changes_under_a_run_ends_it_and_is_named() {
    let tiny = tiny();
    tiny.train("whole", &LONG);
    let (weights, other) = (tiny.path("base/model.safetensors"), tiny.path("other"));
    fs::copy(&weights, &other).unwrap();
    type Change = fn(&std::path::Path, &std::path::Path);
    let changes: [(&str, Change, &str); 3] = [
        (
            "written",
            |weights, _| {
                let file = fs::File::options().write(true).open(weights).unwrap();
                file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
            },
            "(it was written to)",
        ),
        ("replaced", |weights, other| fs::rename(other, weights).unwrap(), "(another file has its name)"),
        (
            "longer",
            |weights, _| {
                let file = fs::File::options().append(true).open(weights).unwrap();
                file.set_len(file.metadata().unwrap().len() + 1).unwrap();
            },
            " now)",
        ),
    ];
    for (name, change, how) in changes {
        let child = start(&tiny, name, &[]);
        change(&weights, &other);
        kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(3), "{name}: {said}");
        assert!(said.contains("base/model.safetensors: this file changed") && said.contains(how), "{name}: {said}");
    }
    // One byte more is another base; without it, it is the one that the run was made with.
    let output = tiny.run(&arguments("longer", &LONG, &["--resume"]));
    assert!(matches!(output.status.code(), Some(2 | 3)), "{}", stderr(&output));
    let file = fs::File::options().write(true).open(&weights).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    for name in ["written", "replaced", "longer"] {
        tiny.ok(&arguments(name, &LONG, &["--resume"]));
        let result = |name: &str| (tiny.adapter(name), tiny.timeless_metrics(name));
        assert_eq!(result(name), result("whole"), "{name}");
    }
}

#[test]
fn a_disk_that_is_too_small_is_seen_before_the_run() {
    let tiny = tiny();
    let set = ["train.max_steps=900000000", "train.save_every=1", "train.keep_checkpoints=1000000000"];
    let output = tiny.run(&arguments("a", &set, &[]));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("the run needs ") && said.contains(" MB are free"), "{said}");
    assert!(!said.contains("training"), "{said}");
}
