//! Whatever goes wrong while a run writes, its last whole checkpoint is there and the run that goes on from it ends as
//! the run that nothing happened to.
#![cfg(unix)]

#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use dpo_lora::random::Stream;
use dpo_lora::train::checkpoint::{self, Latest};
use tiny::{Tiny, arguments, rows, stderr};

/// Kills in all, spread over the threads below.
const KILLS: u64 = 200;
const THREADS: u64 = 2;

/// Six steps, a checkpoint each but one kept, evaluations out of phase.
const SET: [&str; 6] = [
    "train.batch_size=2",
    "train.max_steps=6",
    "train.save_every=1",
    "train.eval_every=4",
    "train.keep_checkpoints=1",
    "data.eval=[\"held-out.jsonl\"]",
];

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    tiny.write("rows.jsonl", rows(9));
    tiny.write("held-out.jsonl", rows(3));
    tiny
}

/// Everything of a run that a clock does not change.
fn result(tiny: &Tiny, name: &str) -> (String, String, Vec<serde_json::Value>) {
    let moments = tiny.digest(&format!("runs/{name}/checkpoint-6/optimizer.safetensors"));
    (tiny.adapter(name), moments, tiny.timeless_metrics(name))
}

/// Goes on with `runs/NAME`, or begins it where it has no checkpoint yet; it must end.
#[track_caller]
fn go_on(tiny: &Tiny, name: &str) {
    let output = tiny.run(&arguments(name, &SET, &["--resume"]));
    if output.status.success() {
        return;
    }
    let said = stderr(&output);
    assert!(said.contains("no whole checkpoint") || said.contains("there is no run at"), "{said}");
    assert!(!said.contains("passed over"), "{said}");
    tiny.train(name, &SET);
}

#[test]
fn a_run_killed_at_any_moment_ends_as_if_it_had_not_been() {
    let kill = |thread: u64| {
        let tiny = tiny();
        let began = Instant::now();
        tiny.train("whole", &SET);
        let (takes, whole) = (began.elapsed(), result(&tiny, "whole"));
        let moments = Stream::new(11, "kills").at(thread);
        let (mut kills, mut tries, mut resumed) = (0, 0, 0);
        while kills < KILLS / THREADS {
            let mut more: &[&str] = &[];
            // Every third run is killed twice, the second time as it goes on.
            for _ in 0..1 + u64::from(tries % 3 == 0) {
                let wait = takes.mul_f64(moments.uniform(tries));
                tries += 1;
                assert!(tries < 20 * KILLS, "runs end before they are killed");
                let mut command = tiny.command(&arguments("a", &SET, more));
                let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                thread::sleep(wait);
                let landed = u64::from(child.try_wait().unwrap().is_none());
                child.kill().unwrap();
                child.wait().unwrap();
                let Latest { whole, damaged } = checkpoint::latest(&tiny.path("runs/a")).unwrap();
                assert_eq!(damaged, [""; 0]);
                more = if whole.is_some() { &["--resume"] } else { &[] };
                kills += landed;
                resumed += if whole.is_some() { landed } else { 0 };
            }
            go_on(&tiny, "a");
            assert_eq!(result(&tiny, "a"), whole, "killed after {kills} kills and {tries} tries");
            assert_eq!(tiny.names("runs/a"), tiny.names("runs/whole"));
            for run in tiny.names("runs").iter().filter(|run| *run != "whole") {
                fs::remove_dir_all(tiny.path("runs").join(run)).unwrap();
            }
        }
        (kills, resumed)
    };
    let threads: Vec<_> = (0..THREADS).map(|thread| thread::spawn(move || kill(thread))).collect();
    let counts: Vec<(u64, u64)> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let (kills, resumed) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    assert!(
        kills >= KILLS && resumed > KILLS / 10 && kills > resumed,
        "{kills} kills, {resumed} with a checkpoint to go on from"
    );
    eprintln!("{kills} kills, after {resumed} of them there was a checkpoint to go on from");
}

#[test]
fn a_bit_or_a_tail_that_changed_in_any_file_is_found_and_named() {
    let tiny = tiny();
    let set = [&SET[..], &["train.keep_checkpoints=2"]].concat();
    tiny.train("a", &set);
    let (run, before) = (tiny.path("runs/a"), tiny.path("runs/a/checkpoint-5"));
    let files = tiny.names("runs/a/checkpoint-6");
    assert_eq!(files.len(), 6, "{files:?}");
    let places = Stream::new(5, "damage");
    let mut cases = 0;
    for (number, name) in files.iter().enumerate() {
        let path = format!("runs/a/checkpoint-6/{name}");
        let whole = tiny.bytes(&path);
        let (size, places) = (whole.len() as u64, places.at(number as u64));
        let bits = (0..64).map(|i| {
            let mut bytes = whole.clone();
            let bit = (places.uniform(i) * 8.0 * size as f64) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
            (bytes, format!("bit {bit}"))
        });
        let tails = (0..8).map(|i| {
            let mut bytes = whole.clone();
            let from = (places.uniform(100 + i) * size as f64) as usize;
            bytes[from..].fill(0);
            (bytes, format!("zeros from {from}"))
        });
        let cuts = (0..8).map(|i| {
            let length = (places.uniform(200 + i) * size as f64) as usize;
            (whole[..length].to_vec(), format!("cut to {length}"))
        });
        for (bytes, what) in bits.chain(tails).chain(cuts) {
            if bytes == whole {
                continue;
            }
            tiny.write(&path, bytes);
            let found = checkpoint::latest(&run).unwrap();
            assert_eq!(found.whole.as_ref(), Some(&before), "{name}, {what}");
            // A manifest that names another sum than it did speaks of the file whose sum it was.
            let named = if name == "manifest.json" { "checkpoint-6/" } else { name.as_str() };
            assert!(found.damaged.len() == 1 && found.damaged[0].contains(named), "{name}, {what}: {found:?}");
            cases += 1;
        }
        tiny.write(&path, whole);
    }
    assert!(cases > 400, "{cases}");

    tiny.write("runs/a/checkpoint-6/optimizer.safetensors", "short");
    let output = tiny.run(&arguments("a", &set, &["--resume"]));
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("passed over: ") && said.contains("checkpoint-6/optimizer.safetensors: "), "{said}");
    assert!(said.contains("going on from ") && said.contains("checkpoint-5 after step 5"), "{said}");
    tiny.train("whole", &set);
    assert_eq!(result(&tiny, "a"), result(&tiny, "whole"));
}

/// Lets every call fail that a whole run makes to change the disk, and lets the process die there.
#[cfg(debug_assertions)]
mod every_call {
    use std::path::Path;
    use std::process::Command;

    use dpo_lora::{
        recipe::Recipe,
        store::disk::faults::{self, Fault},
        train::{open::StartAt, run::train},
    };

    use super::*;

    /// Set in the child that does it: what hundreds of runs say is shown where one goes wrong only.
    const CHILD: &str = "DPO_LORA_TEST_FAULTS";

    #[test]
    fn a_call_that_fails_or_ends_the_process_loses_nothing() {
        if std::env::var_os(CHILD).is_some() {
            return every_call();
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "every_call::a_call_that_fails_or_ends_the_process_loses_nothing", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = stderr(&output);
        let tail = said.len() - said.len().min(6000);
        assert!(output.status.success(), "…{}", said.get(tail..).unwrap_or(&said));
        let stdout = String::from_utf8_lossy(&output.stdout);
        eprintln!("{}", stdout.lines().find(|line| line.contains("faults at")).expect("the count"));
    }

    fn every_call() {
        let tiny = tiny();
        let recipe = |name: &str| {
            let output = format!("run.output={}", tiny.path(&format!("runs/{name}")).display());
            // Shorter than elsewhere: there are hundreds of them.
            let set =
                [&SET[..], &["train.max_steps=2", "train.eval_every=1", "train.keep_checkpoints=1", output.as_str()]]
                    .concat();
            let set: Vec<String> = set.iter().map(ToString::to_string).collect();
            let held_out = format!("data.eval=[\"{}\"]", tiny.path("held-out.jsonl").display());
            let set = [&set[..], &[held_out]].concat();
            Recipe::load(&tiny.path("recipe.toml"), &set).unwrap()
        };
        let result = |name: &str| {
            let moments = tiny.digest(&format!("runs/{name}/checkpoint-2/optimizer.safetensors"));
            (tiny.adapter(name), moments, tiny.timeless_metrics(name), tiny.names(&format!("runs/{name}")))
        };
        faults::plan(usize::MAX, Fault::Torn);
        train(&recipe("whole"), &StartAt::Start, false).unwrap();
        let (calls, whole) = (faults::end(), result("whole"));
        for call in ["mkdir", "create", "open", "write", "sync", "rename", "remove"] {
            assert!(calls.iter().any(|(name, _)| *name == call), "no {call} among {calls:?}");
        }
        // from the first sync after it has its name on, a checkpoint is there for good
        let first =
            calls.iter().position(|(name, path)| *name == "rename" && path.ends_with("checkpoint-1")).unwrap() + 1;
        // the row of the evaluation after the first step, which is not saved yet
        let rows =
            calls.iter().enumerate().filter(|(_, (call, path))| *call == "write" && path.ends_with("metrics.jsonl"));
        let evaluated = rows.map(|(at, _)| at).nth(2).unwrap();
        assert!(evaluated < first);
        let recipe = recipe("a");
        for (at, (call, _)) in calls.iter().enumerate() {
            let fails = match *call {
                "write" => Fault::Torn,
                "sync" => Fault::Error(std::io::ErrorKind::Other),
                _ => Fault::Error(std::io::ErrorKind::StorageFull),
            };
            for fault in [fails, Fault::Crash] {
                faults::plan(at, fault);
                let outcome = train(&recipe, &StartAt::Start, false);
                let made = match fault {
                    Fault::Crash => faults::end_without_power(),
                    _ => faults::end(),
                };
                let place = format!("{fault:?} at call {at}, {:?}: {:?}", made[at], outcome.as_ref().err());
                let error = outcome.expect_err(&place);
                let full = matches!(fault, Fault::Torn | Fault::Error(std::io::ErrorKind::StorageFull));
                assert_eq!(error.exit_code(), if full { 4 } else { 1 }, "{place}");
                let kept = at > first || (at == evaluated && !matches!(fault, Fault::Crash));
                assert!(!kept || checkpoint::latest(&tiny.path("runs/a")).unwrap().whole.is_some(), "{place}");
                go_on(&recipe, &tiny.path("runs/a"), &place);
                assert_eq!(result("a"), whole, "{place}");
                for run in tiny.names("runs").iter().filter(|run| *run != "whole") {
                    fs::remove_dir_all(tiny.path("runs").join(run)).unwrap();
                }
            }
        }
        println!("{} faults at {} calls", 2 * calls.len(), calls.len());
    }

    fn go_on(recipe: &Recipe, run: &Path, place: &str) {
        let found = checkpoint::latest(run).unwrap();
        assert_eq!(found.damaged, [""; 0], "{place}");
        let from = if found.whole.is_some() { StartAt::Latest } else { StartAt::Start };
        train(recipe, &from, false).unwrap_or_else(|error| panic!("{place}: {error}"));
    }

    #[test]
    fn a_folder_that_takes_anothers_place_loses_neither() {
        use dpo_lora::store::{self, Folder};
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("merged");
        let put = |text: &str| -> dpo_lora::Result<()> {
            let folder = Folder::create_atomic(&path)?;
            store::write_atomic(&folder.path().join("a"), |file| std::io::Write::write_all(file, text.as_bytes()))?;
            folder.finish()
        };
        put("old").unwrap();
        faults::plan(usize::MAX, Fault::Torn);
        put("old").unwrap();
        let calls = faults::end().len();
        assert!(calls > 8, "{calls}");
        for fault in [Fault::Error(std::io::ErrorKind::Other), Fault::Torn, Fault::Crash] {
            for at in 0..calls {
                faults::plan(at, fault);
                let outcome = put("new");
                let made = faults::end_without_power();
                store::recover(&path).unwrap();
                store::verify(&path).unwrap();
                let text = fs::read_to_string(path.join("a")).unwrap();
                let place = format!("{fault:?} at call {at} {:?}: {outcome:?}", made[at]);
                assert!(text == "old" || text == "new", "{place}");
                assert!(outcome.is_err() || text == "new", "{place}");
                put("old").unwrap();
            }
        }
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }
}
