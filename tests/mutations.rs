//! Good files changed at random, by seed: opening one never panics, never hangs and never holds more memory than its
//! size allows; what it says of a bad one is a message of the right kind.
//!
//! `DPO_LORA_MUTATIONS` says how many there are in all (100,000 where `DPO_LORA_REQUIRE_ALL=1`, else 4,000) and
//! `DPO_LORA_MUTATION_SEED` where they start. A failure names its kind and number and leaves its file in the system's
//! temporary folder. The good files go to `DPO_LORA_CORPUS/TARGET/`, where the fuzzer starts from.

#[path = "support/counting.rs"]
mod counting;
#[path = "support/mutate.rs"]
mod mutate;
#[path = "support/openers.rs"]
mod openers;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use counting::{Counting, alone, peak_of};
use mutate::mutated;
use openers::{Bench, KINDS, Kind};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Of a hundred mutations, how many are of each kind: many where one takes microseconds.
fn share(kind: Kind) -> u64 {
    match kind {
        Kind::Safetensors | Kind::Rows => 10,
        Kind::Gguf => 8,
        Kind::Index | Kind::Recipe | Kind::PackedRows => 11,
        Kind::AdapterConfig | Kind::AdapterWeights => 9,
        Kind::Config | Kind::Template => 6,
        Kind::TokenizerConfig => 4,
        Kind::Tokenizer => 5,
    }
}

/// One open takes some milliseconds; this long is a hang, even on a machine that has other work.
const TIME: Duration = Duration::from_secs(90);

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

#[test]
fn good_files_are_read_and_written_for_the_fuzzer() {
    let _alone = alone();
    let (bench, place) = (Bench::new(), tempfile::tempdir().unwrap());
    let corpus = std::env::var_os("DPO_LORA_CORPUS").map_or(place.path().to_path_buf(), PathBuf::from);
    for kind in KINDS {
        let folder = corpus.join(kind.target());
        fs::create_dir_all(&folder).unwrap();
        for (number, seed) in kind.seeds().iter().enumerate() {
            let file = folder.join(format!("good-{number}"));
            fs::write(&file, seed).unwrap();
            bench.open(kind, &fs::read(&file).unwrap()).unwrap_or_else(|error| panic!("{kind:?} {number}: {error}"));
        }
    }
    let targets: Vec<_> = fs::read_dir("fuzz/fuzz_targets").unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(targets.len(), KINDS.len(), "a target a kind");
    assert!(KINDS.iter().all(|kind| targets.contains(&format!("{}.rs", kind.target()).into())), "{targets:?}");
}

#[test]
fn mutated_files_are_read_or_refused() {
    let _alone = alone();
    let all = std::env::var("DPO_LORA_REQUIRE_ALL").is_ok_and(|value| value == "1");
    let count = variable("DPO_LORA_MUTATIONS").unwrap_or(if all { 100_000 } else { 4_000 });
    let first = variable("DPO_LORA_MUTATION_SEED").unwrap_or(0);
    assert_eq!(KINDS.iter().map(|kind| share(*kind)).sum::<u64>(), 100);
    watch();
    for kind in KINDS {
        let (bench, seeds) = (Bench::new(), kind.seeds());
        for seed in &seeds {
            bench.open(kind, seed).unwrap_or_else(|error| panic!("{kind:?}: a good one is refused: {error}"));
        }
        let (start, cases) = (Instant::now(), (count * share(kind)).div_ceil(100));
        let (mut read, mut most) = (0, 0);
        for number in first..first + cases {
            CASE.store(number, Ordering::Relaxed);
            BEAT.fetch_add(1, Ordering::Relaxed);
            let bytes = mutated(kind, &seeds, number);
            let (outcome, held) = peak_of(|| catch_unwind(AssertUnwindSafe(|| bench.open(kind, &bytes))));
            let fail = |why: String| -> ! {
                let file = std::env::temp_dir().join(format!("dpo-lora-{kind:?}-{number}"));
                fs::write(&file, &bytes).unwrap();
                panic!("{kind:?} {number}: {why}; the file is {}", file.display());
            };
            if held > kind.allowance(bytes.len()) {
                fail(format!("{held} bytes held for {}", bytes.len()));
            }
            match outcome {
                Err(_) => fail("panicked".into()),
                Ok(Ok(())) => read += 1,
                Ok(Err(error)) => {
                    let said = error.to_string();
                    if error.exit_code() != kind.exit_code() {
                        fail(format!("exit code {}: {said}", error.exit_code()));
                    }
                    if !said.contains(bench.path("").to_str().unwrap()) {
                        fail(format!("names no file: {said}"));
                    }
                    if said.contains(|c: char| c.is_control() && !"\n\t".contains(c)) || said.len() > 20_000 {
                        fail(format!("not fit for a terminal: {said}"));
                    }
                }
            }
            most = most.max(held);
        }
        eprintln!(
            "{kind:?}: {cases} mutations, {read} still read, at most {:.1} MiB held, {:.1} s",
            most as f64 / (1 << 20) as f64,
            start.elapsed().as_secs_f64()
        );
        assert!(read > 0 && read < cases, "{kind:?}: mutations that change nothing, or everything");
    }
    BEAT.store(u64::MAX, Ordering::Relaxed);
}

/// The case that is being opened, and how many have been begun; all ones: no more will be.
static CASE: AtomicU64 = AtomicU64::new(0);
static BEAT: AtomicU64 = AtomicU64::new(0);

/// A thread that ends the program where one case takes too long.
fn watch() {
    std::thread::spawn(|| {
        let (mut beat, mut since) = (0, Instant::now());
        loop {
            std::thread::sleep(Duration::from_secs(1));
            match BEAT.load(Ordering::Relaxed) {
                u64::MAX => return,
                now if now != beat => (beat, since) = (now, Instant::now()),
                _ if since.elapsed() > TIME => {
                    eprintln!("mutation {} takes more than {TIME:?}", CASE.load(Ordering::Relaxed));
                    std::process::exit(101);
                }
                _ => {}
            }
        }
    });
}
