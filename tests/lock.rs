//! One run at a time writes to a folder, and the files that it maps stay as they are.
#![cfg(unix)]

#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::os::unix::fs::FileExt;
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

/// Starts a run, waits until it has saved, and holds it there: it goes on when the test says so, however busy the
/// machine.
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
    assert_eq!(result(&tiny, "a"), result(&tiny, "whole"));
}

/// Changes the base under a run named `name`, which has saved once; how it ends.
fn changed(tiny: &Tiny, name: &str, change: impl Fn()) -> (Option<i32>, String) {
    let child = start(tiny, name, &[]);
    change();
    kill_process(Pid::from_child(&child), Signal::CONT).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), stderr(&output))
}

#[test]
fn a_base_that_changes_in_place_ends_the_run_and_is_named() {
    let tiny = tiny();
    tiny.train("whole", &LONG);
    let file = fs::File::options().read(true).write(true).open(tiny.path("base/model.safetensors")).unwrap();
    let length = file.metadata().unwrap().len();
    let mut last = [0];
    file.read_exact_at(&mut last, length - 1).unwrap();
    type Change<'a> = &'a dyn Fn();
    let changes: [(&str, Change, Change, &str); 2] = [
        (
            "written",
            &|| file.write_all_at(&[last[0] ^ 1], length - 1).unwrap(),
            &|| file.write_all_at(&last, length - 1).unwrap(),
            "(it was written to)",
        ),
        ("longer", &|| file.set_len(length + 1).unwrap(), &|| file.set_len(length).unwrap(), " now)"),
    ];
    for (name, change, back, how) in changes {
        let (code, said) = changed(&tiny, name, change);
        assert_eq!(code, Some(3), "{name}: {said}");
        assert!(said.contains("base/model.safetensors: this file changed") && said.contains(how), "{name}: {said}");
        // that is another base; put back, it is the one that the run was made with
        let output = tiny.run(&arguments(name, &LONG, &["--resume"]));
        assert!(matches!(output.status.code(), Some(2 | 3)), "{}", stderr(&output));
        back();
        tiny.ok(&arguments(name, &LONG, &["--resume"]));
        assert_eq!(result(&tiny, name), result(&tiny, "whole"), "{name}");
    }
}

#[test]
fn a_base_that_was_touched_or_replaced_lets_the_run_go_on() {
    let tiny = tiny();
    tiny.train("whole", &LONG);
    let (weights, config) = (tiny.path("base/model.safetensors"), tiny.path("base/config.json"));
    let (copy, config_copy) = (fs::read(&weights).unwrap(), fs::read(&config).unwrap());
    let touch = || {
        let file = fs::File::options().write(true).open(&weights).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    };
    let replace = || {
        fs::write(tiny.path("other"), "another model").unwrap();
        fs::rename(tiny.path("other"), &weights).unwrap();
    };
    type Change<'a> = &'a dyn Fn();
    let changes: [(&str, Change, usize); 4] = [
        ("touched", &touch, 0),
        ("config", &|| fs::write(&config, "{}").unwrap(), 0),
        ("replaced", &replace, 1),
        ("removed", &|| fs::remove_file(&weights).unwrap(), 1),
    ];
    for (name, change, warnings) in changes {
        let (code, said) = changed(&tiny, name, change);
        assert_eq!(code, Some(0), "{name}: {said}");
        let warning = "base/model.safetensors: this file was replaced or removed while the run uses it";
        assert_eq!(said.matches(warning).count(), warnings, "{name}: {said}");
        assert_eq!(result(&tiny, name), result(&tiny, "whole"), "{name}");
        fs::write(&weights, &copy).unwrap();
        fs::write(&config, &config_copy).unwrap();
    }
}

fn result(tiny: &Tiny, name: &str) -> (String, Vec<serde_json::Value>) {
    (tiny.adapter(name), tiny.timeless_metrics(name))
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
