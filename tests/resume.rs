//! A run that was stopped and gone on with is the run that was not: bit for bit, wherever it was stopped.
#![cfg(unix)]

#[path = "support/running.rs"]
mod running;
#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::process::Command;

use running::Running;
use tiny::{Tiny, arguments, rows, stderr};

/// On a machine that has other work a run may be done before it can be stopped: then it is begun anew.
const TRIES: usize = 20;

/// Settings under which every run here takes 56 steps of three or two pairs: 23 rows, so that the last batch of an
/// epoch is smaller, and evaluations that do not fall together with checkpoints.
const LONG: [&str; 6] = [
    "train.batch_size=3",
    "train.epochs=7",
    "train.save_every=7",
    "train.eval_every=5",
    "data.eval=[\"held-out.jsonl\"]",
    "train.warmup_steps=4",
];

fn tiny() -> Tiny {
    let tiny = Tiny::new();
    tiny.write("rows.jsonl", rows(23));
    tiny.write("held-out.jsonl", rows(40));
    tiny
}

/// Whole lines of the metrics of `runs/NAME`.
fn lines(tiny: &Tiny, name: &str) -> usize {
    fs::read(tiny.path(&format!("runs/{name}/metrics.jsonl")))
        .unwrap_or_default()
        .iter()
        .filter(|b| **b == b'\n')
        .count()
}

/// The step of the newest checkpoint of `runs/NAME`.
fn newest(tiny: &Tiny, name: &str) -> u64 {
    let step = |name: &String| name.strip_prefix("checkpoint-").and_then(|step| step.parse().ok());
    tiny.names(&format!("runs/{name}")).iter().filter_map(step).max().unwrap_or(0)
}

/// Runs `runs/NAME` under `set`, stopping it whenever its metrics reach one of `stops` lines; asserts that it ends as
/// `runs/whole` did, which was never stopped.
#[track_caller]
fn stopped_is_whole(tiny: &Tiny, name: &str, set: &[&str], stops: &[(usize, &str, i32)]) {
    let stopped = (0..TRIES).any(|_| stopped_everywhere(tiny, name, set, stops));
    assert!(stopped, "the run ends before it is stopped");
    let more: &[&str] = if stops.is_empty() { &[] } else { &["--resume"] };
    let step = newest(tiny, name);
    let output = tiny.run(&arguments(name, set, more));
    let said = stderr(&output);
    assert!(output.status.success() && said.contains(&format!("checkpoint-{step} after step {step}")), "{said}");
    assert_same(tiny, name, "whole");
}

/// Whether the run could be stopped at each place, before it was done.
#[track_caller]
fn stopped_everywhere(tiny: &Tiny, name: &str, set: &[&str], stops: &[(usize, &str, i32)]) -> bool {
    let run = tiny.path(&format!("runs/{name}"));
    if run.exists() {
        fs::remove_dir_all(&run).unwrap();
    }
    let mut more: &[&str] = &[];
    for (at, signal, code) in stops {
        let running = Running::start(tiny, &arguments(name, set, more));
        let Some(output) = running.stop(signal, || lines(tiny, name) >= *at) else { return false };
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(*code), "{said}");
        assert!(output.stdout.is_empty(), "{output:?}");
        assert!(
            said.contains(&format!(
                "stopped after step {}, saved; go on with the same command and --resume",
                newest(tiny, name)
            )),
            "{said}"
        );
        assert!(!tiny.path(&format!("runs/{name}/adapter")).exists());
        more = &["--resume"];
    }
    true
}

#[track_caller]
fn assert_same(tiny: &Tiny, name: &str, whole: &str) {
    assert_eq!(tiny.timeless_metrics(name), tiny.timeless_metrics(whole));
    assert_eq!(tiny.adapter(name), tiny.adapter(whole));
    assert_eq!(tiny.names(&format!("runs/{name}")), tiny.names(&format!("runs/{whole}")));
    for file in ["optimizer.safetensors", "adapter_model.safetensors"] {
        let last = newest(tiny, whole);
        let digest = |run: &str| tiny.digest(&format!("runs/{run}/checkpoint-{last}/{file}"));
        assert_eq!(digest(name), digest(whole), "{file}");
    }
}

#[test]
fn a_run_stopped_at_any_step_goes_on_as_if_it_had_not_been() {
    let tiny = tiny();
    tiny.train("whole", &LONG);
    assert_eq!(tiny.rows_of("whole", false).len(), 56);
    // In the first epoch, at an epoch's end (8 steps), beside an evaluation, and three times in one run.
    stopped_is_whole(&tiny, "early", &LONG, &[(2, "INT", 130)]);
    stopped_is_whole(&tiny, "late", &LONG, &[(25, "TERM", 143)]);
    stopped_is_whole(&tiny, "thrice", &LONG, &[(7, "INT", 130), (17, "TERM", 143), (26, "INT", 130)]);
}

#[test]
fn dropout_is_replayed() {
    let tiny = tiny();
    let set =
        [&LONG[..], &["adapter.lora_dropout=0.3", "train.optimizer=rmsprop", "train.learning_rate=1e-3"]].concat();
    tiny.train("whole", &set);
    stopped_is_whole(&tiny, "stopped", &set, &[(6, "INT", 130), (21, "INT", 130)]);
}

#[test]
fn a_run_from_an_adapter_keeps_its_reference() {
    let tiny = tiny();
    tiny.train("start", &["train.max_steps=3"]);
    tiny.write("recipe.toml", tiny::RECIPE.replace("r = 4\nlora_alpha = 8", "start_from = \"runs/start/adapter\""));
    tiny.train("whole", &LONG);
    stopped_is_whole(&tiny, "stopped", &LONG, &[(12, "INT", 130)]);
}

#[test]
fn a_run_stopped_in_an_evaluation_makes_up_for_it() {
    let tiny = tiny();
    tiny.write("held-out.jsonl", rows(300));
    tiny.train("whole", &LONG);
    // Line 1 is the first evaluation, line 6 the fifth step's, after which the next takes hundreds of pairs.
    stopped_is_whole(&tiny, "stopped", &LONG, &[(6, "TERM", 143)]);
    assert_eq!(tiny.rows_of("stopped", true).len(), 13);
}

#[test]
fn a_run_stopped_before_its_first_step_has_nothing_to_go_on_from() {
    let tiny = tiny();
    tiny.write("held-out.jsonl", rows(300));
    let early = (0..TRIES).any(|_| {
        let stopped = Running::start(&tiny, &arguments("a", &LONG, &[])).stop_when_said("INT", "evaluation 8/300");
        assert!(matches!(stopped.status.code(), Some(0 | 130)), "{}", stderr(&stopped));
        stopped.status.code() == Some(130) && newest(&tiny, "a") == 0
    });
    assert!(early, "the first step is done before the run is stopped");

    let resumed = tiny.run(&arguments("a", &LONG, &["--resume"]));
    assert_eq!(resumed.status.code(), Some(2));
    let said = stderr(&resumed);
    assert!(said.contains("runs/a holds no whole checkpoint; leave --resume away to start anew"), "{said}");
    tiny.train("a", &["train.max_steps=1"]);
}

#[test]
fn a_run_stopped_while_it_samples_samples_again() {
    let tiny = tiny();
    let set = ["samples.prompts=[\"1: what\", \"2: what\"]", "samples.count=400", "samples.max_new_tokens=40"];
    tiny.train("whole", &set);
    let stopped = (0..TRIES).find_map(|_| {
        let output = Running::start(&tiny, &arguments("a", &set, &[])).stop_when_said("TERM", "sampling 64/400");
        Some(output).filter(|output| !output.status.success())
    });
    let stopped = stopped.expect("the run ends before it is stopped");
    assert_eq!(stopped.status.code(), Some(143), "{}", stderr(&stopped));
    assert!(stderr(&stopped).contains("training is done and saved, --resume does the rest"), "{}", stderr(&stopped));
    tiny.ok(&arguments("a", &set, &["--resume"]));
    assert_same(&tiny, "a", "whole");
    let samples =
        |run: &str| tiny.read(&format!("runs/{run}/report.html")).split_once("<h2>Samples").unwrap().1.to_string();
    assert!(samples("a") == samples("whole"));
}

#[test]
fn a_checkpoint_of_the_past_can_be_gone_on_from_and_stopped_again() {
    let tiny = tiny();
    let set = [&LONG[..], &["train.save_every=5"]].concat();
    tiny.train("whole", &set);
    let back = arguments("a", &set, &["--resume", "runs/a/checkpoint-10"]);
    let lines_then = 10 + 3;
    let stopped = (0..TRIES).find_map(|_| {
        if tiny.path("runs/a").exists() {
            fs::remove_dir_all(tiny.path("runs/a")).unwrap();
        }
        tiny.train("a", &[&set[..], &["train.keep_checkpoints=99"]].concat());
        Running::start(&tiny, &back).stop("INT", || {
            let lines = lines(&tiny, "a");
            lines > lines_then && lines < 60
        })
    });
    let output = stopped.expect("the run ends before it is stopped");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let step = newest(&tiny, "a");
    assert!(step > 10 && step < 56, "{step}");
    tiny.ok(&arguments("a", &set, &["--resume"]));
    assert_same(&tiny, "a", "whole");
}

#[test]
fn a_run_that_takes_steps_again_has_not_ended() {
    let tiny = tiny();
    let set = [&LONG[..], &["train.keep_checkpoints=99"]].concat();
    tiny.train("a", &set);
    let adapter = tiny.adapter("a");
    let ended = || ["adapter", "report.html", "summary.json"].map(|name| tiny.path("runs/a").join(name).exists());
    // with no step to take it stays ended
    tiny.ok(&arguments("a", &set, &["--resume"]));
    assert_eq!(ended(), [true; 3]);
    let cut_short = |more: &[&str]| {
        let arguments = arguments("a", &set, more);
        let cut = (0..TRIES).find_map(|_| Running::start(&tiny, &arguments).stop("INT", || !ended()[0]));
        assert!(cut.is_some(), "the run ends before it is stopped");
        assert_eq!(ended(), [false; 3]);
        let exported = tiny.run(&["export", "runs/a", "--to", "peft", "out"]);
        assert!(stderr(&exported).contains("this run has not ended; resume it"), "{}", stderr(&exported));
    };
    cut_short(&["--resume", "runs/a/checkpoint-7"]);
    tiny.ok(&arguments("a", &set, &["--resume"]));
    assert_eq!((tiny.adapter("a"), ended()), (adapter, [true; 3]));
    cut_short(&["--resume", "--extend", "--max-steps", "4000"]);
}

/// All that a run's folder holds, but for its lock: names and digests.
fn all_of(tiny: &Tiny, run: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![format!("runs/{run}")];
    while let Some(folder) = folders.pop() {
        for name in tiny.names(&folder).into_iter().filter(|name| name != ".lock") {
            let path = format!("{folder}/{name}");
            match tiny.path(&path).is_dir() {
                true => folders.push(path),
                false => files.push((path.clone(), tiny.digest(&path))),
            }
        }
    }
    files
}

#[test]
fn what_is_refused_changes_nothing() {
    let tiny = tiny();
    let set = [&LONG[..3], &["train.keep_checkpoints=99"]].concat();
    tiny.train("a", &set);
    tiny.train("a", &set);
    let (now, earlier) = (all_of(&tiny, "a"), all_of(&tiny, "a.1"));
    let refused = |set: &[&str], more: &[&str], code: i32, what: &str| {
        let output = tiny.run(&arguments("a", set, more));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(what), "{said}");
        assert!(all_of(&tiny, "a") == now && all_of(&tiny, "a.1") == earlier, "{what}");
    };
    // the checkpoint of the run that was moved aside, though it is made of the same
    refused(&set, &["--resume", "runs/a.1/checkpoint-14"], 2, "a run goes on in its own folder");
    refused(&set, &["--resume", "runs/a"], 2, "that is the run's folder; name one of its checkpoints");
    let shorter = [&set[..], &["train.max_steps=3"]].concat();
    refused(&shorter, &["--resume", "runs/a/checkpoint-14", "--extend"], 2, "the recipe has 3 steps");
    let shorter = [&set[..], &["train.max_steps=20"]].concat();
    refused(
        &shorter,
        &["--resume", "runs/a/checkpoint-14", "--extend"],
        2,
        "the run has 56 steps, and the recipe has 20",
    );
    // in its own folder it does go on
    tiny.ok(&arguments("a.1", &set, &["--resume", "runs/a.1/checkpoint-14"]));
    assert_same(&tiny, "a.1", "a");
}

#[test]
fn rows_that_are_missing_change_nothing() {
    let tiny = tiny();
    let set = [&LONG[..3], &["train.keep_checkpoints=99"]].concat();
    tiny.train("a", &set);
    let metrics = tiny.bytes("runs/a/metrics.jsonl");
    tiny.write("runs/a/metrics.jsonl", &metrics[..100]);
    let before = all_of(&tiny, "a");
    let output = tiny.run(&arguments("a", &set, &["--resume", "runs/a/checkpoint-14"]));
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("100 bytes long, but the checkpoint was taken after"), "{}", stderr(&output));
    assert!(all_of(&tiny, "a") == before);
}

/// Every way to make another run of it, the code, and what is named.
#[test]
fn another_run_does_not_go_on_from_it() {
    let tiny = tiny();
    let first = ["train.max_steps=4", "train.save_every=2", "data.eval=[\"held-out.jsonl\"]"];
    tiny.train("a", &first);
    let (adapter, metrics) = (tiny.adapter("a"), tiny.metrics("a"));
    let refused = |set: &[&str], what: &str| {
        let output = tiny.run(&arguments("a", set, &["--resume"]));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{set:?}: {said}");
        let last = said.lines().last().unwrap();
        assert!(last.contains(&format!("checkpoint-4: made with another {what}")), "{set:?}: {said}");
        assert_eq!((tiny.adapter("a"), tiny.metrics("a")), (adapter.clone(), metrics.clone()));
    };
    for (set, what) in [
        ("train.learning_rate=1e-3", "train.learning_rate (0.01, now 0.001): "),
        ("train.batch_size=2", "train.batch_size (4, now 2): "),
        ("train.seed=1", "train.seed (0, now 1): "),
        ("train.max_steps=5", "train.max_steps (4, now 5) (or go on for more steps with --extend): "),
        ("train.optimizer=rmsprop", "train.optimizer (\"adamw\", now \"rmsprop\"): "),
        ("objective.beta=0.2", "objective.beta (0.1, now 0.2): "),
        ("objective.loss=hinge", "objective.loss (\"sigmoid\", now \"hinge\"): "),
        ("adapter.lora_alpha=4", "adapter.lora_alpha (8.0, now 4.0): "),
        ("adapter.r=2", "adapter.r (4, now 2): "),
        ("adapter.lora_dropout=0.1", "adapter.lora_dropout (0.0, now 0.1): "),
        ("adapter.target_modules=[\"q_proj\"]", "adapter.target_modules (\"all-linear\", now [\"q_proj\"]): "),
        ("data.shuffle=false", "data.shuffle (true, now false): "),
        ("data.limit=20", "data.limit (0, now 20): "),
        ("data.max_length=500", "data.max_length (1024, now 500): "),
    ] {
        refused(&[&first[..], &[set]].concat(), what);
    }
    refused(&[first[0], first[1], "data.eval_fraction=0.2"], "data.eval_fraction (0.0, now 0.2): ");

    type Change = fn(String) -> String;
    let files: [(&str, Change, &str); 5] = [
        ("rows.jsonl", |text| text.replace("clear", "blue"), "set of training rows: "),
        ("held-out.jsonl", |text| text.replace("clear", "blue"), "set of held-out rows: "),
        ("base/tokenizer.json", |text| text + "\n", "tokenizer: "),
        ("base/chat_template.jinja", |text| text + "{# another #}", "chat template: "),
        ("base/config.json", |text| text + " ", "base model: "),
    ];
    for (file, change, what) in files {
        let was = tiny.read(file);
        let now = change(was.clone());
        assert_ne!(was, now, "{file}");
        tiny.write(file, now);
        refused(&first, what);
        tiny.write(file, was);
    }
    let weights = tiny.bytes("base/model.safetensors");
    let mut other = weights.clone();
    *other.last_mut().unwrap() ^= 1;
    tiny.write("base/model.safetensors", other);
    refused(&first, "base model: ");
    tiny.write("base/model.safetensors", weights);

    // As it was, there is nothing left to do, and where it runs and what it shows, holds and keeps may change.
    let free = [
        "run.threads=1",
        "samples.prompts=[\"1: what\"]",
        "train.eval_every=1",
        "train.save_every=1",
        "train.keep_checkpoints=1",
        "memory.reference_cache=false",
    ];
    tiny.ok(&arguments("a", &[&first[..], &free].concat(), &["--resume"]));
    assert_eq!((tiny.adapter("a"), tiny.metrics("a")), (adapter, metrics));
}

#[test]
fn a_run_can_be_made_longer_when_that_is_said() {
    let tiny = tiny();
    let of = |steps: &'static str| ["train.lr_schedule=constant", "adapter.lora_dropout=0.2", steps];
    tiny.train("whole", &of("train.max_steps=11"));
    tiny.train("a", &of("train.max_steps=5"));
    let go_on = |steps: &'static str, more: &[&str]| tiny.run(&arguments("a", &of(steps), more));
    let output = go_on("train.max_steps=11", &["--resume"]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("--extend"), "{}", stderr(&output));
    let output = go_on("train.max_steps=3", &["--resume", "--extend"]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains("its checkpoint is after step 5, and the recipe has 3 steps"), "{said}");
    let output = go_on("train.max_steps=11", &["--extend"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));

    let output = go_on("train.max_steps=11", &["--resume", "--extend"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(
        (tiny.adapter("a"), tiny.timeless_metrics("a")),
        (tiny.adapter("whole"), tiny.timeless_metrics("whole"))
    );
    assert!(tiny.read("runs/a/recipe.toml").contains("max_steps = 11"));
}

/// Every combination of what could make a resumed run another one; each goes on from an early step, from an epoch's end
/// and from a late step.
#[test]
fn a_resumed_run_is_the_same_run_in_every_case() {
    let tiny = Tiny::new();
    let long =
        |n: usize| rows(n).replace("what is", &format!("what {}is", "on a day like this one, with wind, ".repeat(9)));
    let mut cases = 0;
    for case in 0..16 {
        let [divisible, accumulates, drops, out_of_phase] = [1, 2, 4, 8].map(|bit| case & bit != 0);
        let n = if divisible { 12 } else { 11 };
        tiny.write("rows.jsonl", if accumulates { long(n) } else { rows(n) });
        tiny.write("held-out.jsonl", rows(3));
        // Three steps an epoch, eight in all.
        let mut set = vec!["data.eval=[\"held-out.jsonl\"]", "train.max_steps=8", "train.warmup_steps=2"];
        set.push(if drops { "adapter.lora_dropout=0.25" } else { "train.lr_schedule=cosine" });
        set.push(if out_of_phase { "train.eval_every=3" } else { "train.eval_every=4" });
        let name = |what: &str| format!("{case}-{what}");
        tiny.train(&name("whole"), &[&set[..], &["train.save_every=4"]].concat());
        // With a checkpoint after every step, from which the resumed runs start.
        let every = [&set[..], &["train.save_every=1", "train.keep_checkpoints=99"]].concat();
        tiny.train(&name("every"), &every);
        assert_eq!(tiny.timeless_metrics(&name("every")), tiny.timeless_metrics(&name("whole")));
        let tokens = tiny.rows_of(&name("whole"), false)[0]["tokens"].as_u64().unwrap();
        assert_eq!(tokens > 768, accumulates, "{tokens} tokens a step");

        for stop in [1, 3, 7] {
            let (run, from) = (name(&stop.to_string()), format!("checkpoint-{stop}"));
            let path = |run: &str, file: &str| tiny.path(&format!("runs/{run}/{file}"));
            fs::create_dir_all(path(&run, &from)).unwrap();
            for file in tiny.names(&format!("runs/{}/{from}", name("every"))) {
                let file = format!("{from}/{file}");
                fs::copy(path(&name("every"), &file), path(&run, &file)).unwrap();
            }
            // The rows of later steps stand there too, as after a crash.
            for file in ["metrics.jsonl", "recipe.toml", "reference.cache"] {
                fs::copy(path(&name("every"), file), path(&run, file)).unwrap();
            }
            tiny.ok(&arguments(&run, &[&set[..], &["train.save_every=4"]].concat(), &["--resume"]));
            let what = format!(
                "divisible {divisible}, accumulates {accumulates}, drops {drops}, out of phase {out_of_phase}, {stop}"
            );
            assert_eq!(tiny.timeless_metrics(&run), tiny.timeless_metrics(&name("whole")), "{what}");
            assert_eq!(tiny.adapter(&run), tiny.adapter(&name("whole")), "{what}");
            for file in ["checkpoint-8/optimizer.safetensors", "checkpoint-8/adapter_model.safetensors"] {
                let digest = |run: &str| tiny.digest(&format!("runs/{run}/{file}"));
                assert_eq!(digest(&run), digest(&name("whole")), "{what}: {file}");
            }
            cases += 1;
        }
        fs::remove_dir_all(tiny.path("runs")).unwrap();
    }
    assert_eq!(cases, 48);
}

#[test]
fn another_start_is_another_run() {
    let tiny = tiny();
    tiny.train("one", &["train.max_steps=1"]);
    tiny.train("two", &["train.max_steps=2"]);
    tiny.write("recipe.toml", tiny::RECIPE.replace("r = 4\nlora_alpha = 8", ""));
    let set = |start: &str| [format!("adapter.start_from=runs/{start}/adapter"), "train.max_steps=3".into()];
    let run = |start: &str, more: &[&str]| {
        let set = set(start);
        tiny.run(&arguments("a", &[&set[0], &set[1]], more))
    };
    assert!(run("one", &[]).status.success());
    let output = run("two", &["--resume"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("made with another start adapter"), "{}", stderr(&output));
    // The same adapter in another place is the same start.
    fs::rename(tiny.path("runs/one"), tiny.path("runs/first")).unwrap();
    assert!(run("first", &["--resume"]).status.success());
}

#[test]
fn a_damaged_checkpoint_is_passed_over_or_named() {
    let tiny = tiny();
    let set = ["train.max_steps=6", "train.save_every=2", "train.keep_checkpoints=9"];
    tiny.train("whole", &set);
    tiny.train("a", &set);
    fs::remove_dir_all(tiny.path("runs/a/adapter")).unwrap();
    let weights = "runs/a/checkpoint-6/adapter_model.safetensors";
    let bytes = tiny.bytes(weights);
    tiny.write(weights, &bytes[..bytes.len() - 1]);

    let output = tiny.run(&arguments("a", &set, &["--resume", "runs/a/checkpoint-6"]));
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("checkpoint-6/adapter_model.safetensors: it is not what"), "{}", stderr(&output));

    // a pipe that nobody writes to is not waited for
    fs::remove_file(tiny.path(weights)).unwrap();
    assert!(Command::new("mkfifo").arg(tiny.path(weights)).status().unwrap().success());
    let output = tiny.run(&arguments("a", &set, &["--resume", "runs/a/checkpoint-6"]));
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("adapter_model.safetensors: not a regular file"), "{}", stderr(&output));
    fs::remove_file(tiny.path(weights)).unwrap();
    tiny.write(weights, &bytes[..bytes.len() - 1]);

    let output = tiny.run(&arguments("a", &set, &["--resume"]));
    assert!(stderr(&output).contains("going on from runs/a/checkpoint-4 after step 4"), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("passed over: runs/a/checkpoint-6/adapter_model.safetensors: it is not what"),
        "{}",
        stderr(&output)
    );
    assert_same(&tiny, "a", "whole");
}
