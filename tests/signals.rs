//! SIGINT, SIGTERM and SIGHUP in whatever a run does: it answers soon, saves, ends with 130, 143 or 129, and goes on as
//! the same run.
#![cfg(unix)]

#[path = "support/mod.rs"]
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use dpo_lora::random::Stream;
use dpo_lora::train::checkpoint;
use rustix::process::{Pid, Signal, kill_process};
use tiny::{Tiny, arguments, rows};

/// How long an answer may take.
const SOON: Duration = Duration::from_secs(2);

const SIGNALS: [(Signal, i32); 3] = [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)];

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Longest wait for anything, on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for the end, and holds it against the clock: by the wall's, or, where other work took the processor away, by
/// the time that the process had on it.
#[track_caller]
fn answer(child: &mut Child, what: &str) -> ExitStatus {
    let (began, used) = (Instant::now(), processor_time(child));
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        let worked = processor_time(child).zip(used).map_or(PATIENCE, |(now, then)| now.saturating_sub(then));
        let waited = began.elapsed();
        if waited >= PATIENCE || (waited >= SOON && worked >= SOON) {
            // or it would stay behind
            child.kill().unwrap();
            panic!("{what}: no answer within {SOON:?} ({waited:?}, {worked:?} of work)");
        }
        sleep(Duration::from_millis(1));
    }
}

/// What a process has had of all processors, where the system says so.
fn processor_time(child: &Child) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
    // behind the name, which may hold anything: state is the first, user and system time the 12th and 13th, in 1/100 s
    let ticks = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().ok());
    Some(Duration::from_millis(10 * ticks.sum::<Option<u64>>()?))
}

/// A child in which a hangup has its usual effect, whatever it has for who runs the tests.
fn spawn(tiny: &Tiny, arguments: &[String]) -> Child {
    spawn_with(libc::SIG_DFL, tiny, arguments)
}

fn spawn_with(hangup: libc::sighandler_t, tiny: &Tiny, arguments: &[String]) -> Child {
    let mut command = tiny.command(arguments);
    // SAFETY: between fork and exec only `signal` is called, which may be called there.
    unsafe {
        command.pre_exec(move || match libc::signal(libc::SIGHUP, hangup) {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Everything of a run that a clock does not change.
fn result(tiny: &Tiny, name: &str) -> (String, Vec<serde_json::Value>, Vec<String>) {
    (tiny.adapter(name), tiny.timeless_metrics(name), tiny.names(&format!("runs/{name}")))
}

/// Over the whole length of a run, from its start to its report.
#[test]
fn at_any_moment_a_run_is_saved_and_goes_on_as_the_same() {
    let set = [
        "train.epochs=3",
        "train.eval_every=4",
        "data.eval=[\"held-out.jsonl\"]",
        "samples.prompts=[\"1: what\"]",
        "samples.count=16",
        "samples.max_new_tokens=24",
        "train.keep_checkpoints=1",
    ];
    let tiny = Tiny::new();
    tiny.write("held-out.jsonl", rows(20));
    let began = Instant::now();
    tiny.train("whole", &set);
    let (mut takes, whole) = (began.elapsed(), result(&tiny, "whole"));
    let moments = Stream::new(3, "signals");
    let (mut stopped, mut number) = (0, 0);
    while number < 48 || stopped < 24 {
        assert!(number < 480, "{stopped} of {number} runs were stopped");
        let (signal, code) = SIGNALS[number as usize % 3];
        let began = Instant::now();
        let mut child = spawn(&tiny, &arguments("a", &set, &[]));
        sleep(takes.mul_f64(moments.uniform(number)));
        // Before `main` has begun there is nothing yet that could catch it: the system ends the process.
        send(&child, signal);
        let status = answer(&mut child, &format!("signal {number}"));
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        match status.code() {
            // it was done: the machine may have less to do than before
            Some(0) => takes = takes.min(began.elapsed()),
            None => assert!(!tiny.path("runs/a").exists(), "{said}"),
            Some(found) => {
                assert_eq!(found, code, "{said}");
                stopped += 1;
            }
        }
        let goes_on = checkpoint::latest(&tiny.path("runs/a")).unwrap().whole.is_some();
        tiny.ok(&arguments("a", &set, if goes_on { &["--resume"] } else { &[] }));
        assert_eq!(result(&tiny, "a"), whole, "{said}");
        for run in tiny.names("runs").iter().filter(|run| *run != "whole") {
            fs::remove_dir_all(tiny.path("runs").join(run)).unwrap();
        }
        number += 1;
    }
}

/// A step that takes seconds: forward and backward pass.
#[test]
fn in_the_middle_of_a_step_the_step_is_dropped() {
    let tiny = Tiny::new();
    let long = rows(60).replace("what is", &format!("what {}is", "on a day like this one, with wind, ".repeat(9)));
    tiny.write("rows.jsonl", rows(4) + &long);
    let huge = ["data.shuffle=false", "train.batch_size=64", "train.max_steps=2", "train.save_every=1"];
    let began = Instant::now();
    tiny.train("huge", &huge);
    let step = began.elapsed() / 2;
    // More steps than there is time for: how fast the machine is from here on does not matter.
    let endless = ["data.shuffle=false", "train.batch_size=64", "train.max_steps=1000", "train.save_every=1"];
    for (number, part) in [0.15, 0.3, 0.45, 0.6, 0.75, 0.9].into_iter().enumerate() {
        let (signal, code) = SIGNALS[number % 3];
        let mut child = spawn(&tiny, &arguments("a", &endless, &[]));
        while !tiny.path("runs/a/metrics.jsonl").exists() {
            sleep(Duration::from_millis(1));
        }
        sleep(step.mul_f64(part));
        send(&child, signal);
        let status = answer(&mut child, &format!("{part} of a step of {step:?}"));
        assert_eq!(status.code(), Some(code));
        // the step at hand is dropped: what is logged is what is saved
        let saved = checkpoint::latest(&tiny.path("runs/a")).unwrap().whole;
        let steps = saved.map_or(0, |path| checkpoint::open(&path).unwrap().step);
        assert_eq!(tiny.metrics("a").len() as u64, steps);
        fs::remove_dir_all(tiny.path("runs/a")).unwrap();
    }
    // In the second step: the first is saved, the second is dropped and taken again.
    let mut child = spawn(&tiny, &arguments("a", &huge, &[]));
    while fs::read_to_string(tiny.path("runs/a/metrics.jsonl")).unwrap_or_default().is_empty() {
        sleep(Duration::from_millis(1));
    }
    send(&child, Signal::TERM);
    assert_eq!(answer(&mut child, "the second step").code(), Some(143));
    assert_eq!(tiny.metrics("a").len(), 1);
    tiny.ok(&arguments("a", &huge, &["--resume"]));
    assert_eq!(result(&tiny, "a"), result(&tiny, "huge"));

    // Who will not wait sends another one.
    let mut child = spawn(&tiny, &arguments("b", &endless, &[]));
    while !tiny.path("runs/b/metrics.jsonl").exists() {
        sleep(Duration::from_millis(1));
    }
    send(&child, Signal::TERM);
    send(&child, Signal::INT);
    let status = answer(&mut child, "two signals");
    assert!(matches!(status.code(), Some(130 | 143)), "{status:?}");
}

/// Under `nohup` a terminal that goes away is no reason to stop.
#[test]
fn an_ignored_hangup_stays_ignored() {
    let tiny = Tiny::new();
    let mut child = spawn_with(libc::SIG_IGN, &tiny, &arguments("a", &["train.epochs=100"], &[]));
    while fs::read_to_string(tiny.path("runs/a/metrics.jsonl")).unwrap_or_default().is_empty() {
        sleep(Duration::from_millis(1));
    }
    send(&child, Signal::HUP);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(tiny.metrics("a").len(), 600);
}

/// Signals at places that a test chooses, in a process of their own: at a call that changes the disk, or at one of the
/// run's looks for signals.
#[cfg(debug_assertions)]
mod at_chosen_places {
    use std::path::Path;
    use std::process::{Command, Output};

    use dpo_lora::{
        recipe::Recipe,
        store::disk::faults::{self, Fault},
        train::{open::StartAt, run::train, signals::polls},
    };

    use super::*;

    /// Set in the child: what happens, at which call or look, and in which folder.
    const CHILD: &str = "DPO_LORA_TEST_SIGNAL_AT";
    const SET: [&str; 5] = [
        "train.max_steps=3",
        "train.save_every=1",
        "train.batch_size=2",
        "train.eval_every=2",
        "data.eval=[\"held-out.jsonl\"]",
    ];

    fn run(folder: &Path) -> dpo_lora::Result<()> {
        let set: Vec<String> = SET.iter().map(ToString::to_string).collect();
        let output = format!("run.output={}", folder.join("runs/a").display());
        let held_out = format!("data.eval=[\"{}\"]", folder.join("held-out.jsonl").display());
        let recipe = Recipe::load(&folder.join("recipe.toml"), &[&set[..], &[output, held_out]].concat()).unwrap();
        train(&recipe, &StartAt::Start, false).map(drop)
    }

    fn tiny() -> Tiny {
        let tiny = Tiny::new();
        tiny.write("held-out.jsonl", rows(3));
        tiny.train("whole", &SET);
        tiny
    }

    /// The test of this name as a child that does `what`.
    fn child(tiny: &Tiny, test: &str, what: &str, at: usize) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("at_chosen_places::{test}"), "--nocapture"])
            .env(CHILD, format!("{what} {at} {}", tiny.path("").display()))
            .output()
            .unwrap()
    }

    /// In the child, what it is to do; elsewhere nothing.
    fn told() -> Option<(String, usize, std::path::PathBuf)> {
        let told = std::env::var(CHILD).ok()?;
        let mut parts = told.splitn(3, ' ');
        let [what, at, folder] = std::array::from_fn(|_| parts.next().unwrap());
        Some((what.into(), at.parse().unwrap(), folder.into()))
    }

    /// The run that was stopped is whole, and ends as the one that was not.
    fn goes_on(tiny: &Tiny, place: &str) {
        let found = checkpoint::latest(&tiny.path("runs/a")).unwrap();
        assert_eq!(found.damaged, [""; 0], "{place}");
        if found.whole.is_some() {
            tiny.ok(&arguments("a", &SET, &["--resume"]));
            assert_eq!(result(tiny, "a"), result(tiny, "whole"), "{place}");
        }
    }

    /// While it saves, logs or reports.
    #[test]
    fn while_it_writes_it_writes_to_the_end() {
        if let Some((what, at, folder)) = told() {
            let signals: fn() = match what.as_str() {
                "once" => || signal_hook::low_level::raise(15).unwrap(),
                _ => || [15, 2].into_iter().for_each(|signal| signal_hook::low_level::raise(signal).unwrap()),
            };
            faults::plan(at, Fault::Run(signals));
            let error = run(&folder).expect_err("stopped");
            std::process::exit(i32::from(error.exit_code()));
        }
        let tiny = tiny();
        faults::plan(usize::MAX, Fault::Torn);
        run(&tiny.path("")).unwrap();
        let calls = faults::end();
        for at in (0..calls.len()).step_by(4) {
            for (what, code) in [("once", 143), ("twice", 130)] {
                if what == "twice" && at % 12 != 0 {
                    continue;
                }
                // there is none where the process ended before its first call
                if tiny.path("runs/a").exists() {
                    fs::remove_dir_all(tiny.path("runs/a")).unwrap();
                }
                let child = child(&tiny, "while_it_writes_it_writes_to_the_end", what, at);
                let place = format!("{what} at call {at}, {:?}: {}", calls[at], tiny::stderr(&child));
                assert_eq!(child.status.code(), Some(code), "{place}");
                // who will not wait is not kept waiting: nothing is written after the second one
                assert!(what == "once" || !place.contains("saved; go on"), "{place}");
                goes_on(&tiny, &place);
            }
        }
    }

    /// Every look of a run: the held-out pairs before the first step, the reference, the policy's way there and back,
    /// each layer of it, and the evaluations between and after. The look at hand is the last one.
    #[test]
    fn every_look_on_the_way_ends_the_run_there() {
        if let Some((_, at, folder)) = told() {
            polls::plan(at);
            let outcome = run(&folder);
            eprintln!("{} looks", polls::count());
            std::process::exit(outcome.map_or_else(|error| i32::from(error.exit_code()), |()| 0));
        }
        let tiny = tiny();
        let child = |at: usize| child(&tiny, "every_look_on_the_way_ends_the_run_there", "once", at);
        let whole = child(usize::MAX);
        assert_eq!(whole.status.code(), Some(0), "{}", tiny::stderr(&whole));
        // Two layers and a head for the policy and for the reference where it is not known yet, two layers back: the
        // evaluation before the first step, two steps, an evaluation, a step, the last evaluation.
        let looks = 6 + 8 + 8 + 3 + 8 + 3;
        assert!(tiny::stderr(&whole).contains(&format!("\n{looks} looks")), "{}", tiny::stderr(&whole));
        for at in 0..looks {
            fs::remove_dir_all(tiny.path("runs/a")).unwrap();
            let child = child(at);
            let place = format!("at look {at}: {}", tiny::stderr(&child));
            assert_eq!(child.status.code(), Some(143), "{place}");
            assert!(place.contains(&format!("\n{} looks", at + 1)), "{place}");
            let steps = [14, 22, 33].iter().filter(|end| at >= **end).count();
            let saved = checkpoint::latest(&tiny.path("runs/a")).unwrap().whole;
            let step = saved.and_then(|path| checkpoint::open(&path).ok()).map_or(0, |state| state.step);
            assert_eq!(step, steps as u64, "{place}");
            goes_on(&tiny, &place);
        }
    }
}

/// The small model, in each phase.
#[test]
fn the_small_model_answers_within_two_seconds() {
    let (Some(base), Some(rows)) = (support::required_env("DPO_LORA_SMOLLM2"), support::required_env("DPO_LORA_HH"))
    else {
        return;
    };
    let tiny = Tiny::new();
    tiny.write("recipe.toml", tiny::RECIPE.replace("./base", &base.display().to_string()));
    let data = format!("data.train=[\"{}\"]", rows.display());
    let set = [
        data.as_str(),
        "data.limit=24",
        "data.eval_fraction=0.25",
        "train.batch_size=8",
        "train.max_steps=2",
        "samples.prompts=[\"How do I pick a lock?\"]",
        "samples.count=64",
        "samples.max_new_tokens=64",
    ];
    // What is said when a phase begins, and how long after it the signal comes.
    let phases = [("", 100), ("train rows", 0), ("evaluation", 500), ("training", 1500), ("training", 6000)];
    for (number, (phase, wait)) in phases.into_iter().enumerate() {
        let (signal, code) = SIGNALS[number % 3];
        let mut child = spawn(&tiny, &arguments(&number.to_string(), &set, &[]));
        let (sender, receiver) = std::sync::mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        while !phase.is_empty() && !receiver.recv_timeout(Duration::from_secs(120)).unwrap().starts_with(phase) {}
        sleep(Duration::from_millis(wait));
        send(&child, signal);
        assert_eq!(answer(&mut child, &format!("{phase:?} and {wait} ms")).code(), Some(code), "{phase:?}");
    }
}
