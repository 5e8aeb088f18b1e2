//! An export that is stopped, killed, doubled or without room leaves nothing that is half written, and the next one to
//! the same place is as if it had not been.
#![cfg(unix)]

#[path = "support/tiny.rs"]
mod tiny;

use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tiny::{Tiny, stderr};

/// What writes much, up to the place where it writes.
const EXPORTS: [&[&str]; 3] = [
    &["export", "adapter", "--base", "base", "--to", "merged", "--dtype", "f32"],
    &["quantize", "base", "--to", "nf4"],
    &["quantize", "base", "--to", "q8_0"],
];

/// So wide that an export takes long enough to be met in its middle.
const WIDE: usize = 1 << 18;

/// A base and an adapter of it that lies alone.
fn tiny() -> Tiny {
    let tiny = Tiny::new();
    tiny.train("a", &["train.max_steps=1", "adapter.target_modules=[\"q_proj\"]"]);
    tiny.ok(&["export", "runs/a", "--to", "peft", "adapter"]);
    tiny
}

/// A base of so many layers with MLPs so wide, all its weights 0 and in bf16, and where it is not empty, a mask of so many
/// bytes as older checkpoints have. They take no room on the disk. Whether the disk has files of that size.
fn zeros(tiny: &Tiny, layers: usize, mlp: usize, mask: usize) -> bool {
    let shape = |name: &str, shape: Vec<usize>| match name.contains(".mlp.") {
        true => shape.into_iter().map(|width| if width == 48 { mlp } else { width }).collect(),
        false => shape,
    };
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    if mask > 0 {
        end = mask;
        let entry = json!({"dtype": "U8", "shape": [mask], "data_offsets": [0, end]});
        header.insert("model.layers.0.attn.bias".into(), entry);
    }
    for (name, (own, _)) in tiny::weights(layers) {
        let shape = shape(&name, own);
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(tiny.path("base/model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    tiny.set_json("base/config.json", "intermediate_size", json!(mlp));
    tiny.set_json("base/config.json", "num_hidden_layers", json!(layers));
    file.set_len((8 + header.len() + end) as u64).is_ok()
}

/// Whether an export to `out` is under way: what it writes first follows its lock.
fn writes(tiny: &Tiny) -> bool {
    let part = tiny.path(".out.incomplete");
    part.join("model.safetensors").exists() || fs::metadata(part).is_ok_and(|part| part.is_file() && part.len() > 0)
}

/// Starts an export to `out` and waits until it writes.
fn start(tiny: &Tiny, export: &[&str]) -> Child {
    let mut command = tiny.command(&[export, &["out"]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while !writes(tiny) {
        assert!(child.try_wait().unwrap().is_none(), "{export:?} ended before it wrote");
        assert!(began.elapsed() < Duration::from_secs(120), "{export:?} does not write");
        sleep(Duration::from_micros(100));
    }
    child
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// What stands where the exports are written, hidden or not.
fn outs(tiny: &Tiny) -> Vec<String> {
    tiny.names("").into_iter().filter(|name| name.contains("out")).collect()
}

fn again(tiny: &Tiny, export: &[&str]) -> Output {
    tiny.run(&[export, &["out"]].concat())
}

fn remove_out(tiny: &Tiny) {
    let out = tiny.path("out");
    if out.is_dir() { fs::remove_dir_all(out).unwrap() } else { fs::remove_file(out).unwrap() }
}

#[test]
fn a_signal_ends_an_export_and_nothing_is_left() {
    let tiny = tiny();
    assert!(zeros(&tiny, 2, WIDE, 0));
    for export in EXPORTS {
        for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
            let child = start(&tiny, export);
            send(&child, signal);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{export:?}: {}", stderr(&output));
            assert_eq!(outs(&tiny), [""; 0], "{export:?}");
        }
    }
}

#[test]
fn one_at_a_time_writes_to_a_place_and_what_a_dead_one_left_goes() {
    let tiny = tiny();
    for export in EXPORTS {
        assert!(zeros(&tiny, 2, WIDE, 0));
        let mut first = start(&tiny, export);
        send(&first, Signal::STOP);
        let output = again(&tiny, export);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{export:?}: {said}");
        assert!(said.contains("out: cannot be written: another process is writing it"), "{said}");
        assert!(first.try_wait().unwrap().is_none(), "{export:?}");
        first.kill().unwrap();
        first.wait().unwrap();
        assert_eq!(outs(&tiny), [".out.incomplete"], "{export:?}");

        assert!(zeros(&tiny, 2, 64, 0));
        let output = again(&tiny, export);
        assert!(output.status.success(), "{export:?}: {}", stderr(&output));
        assert_eq!(outs(&tiny), ["out"], "{export:?}");
        remove_out(&tiny);
    }
}

#[test]
fn an_export_without_room_does_not_begin() {
    let tiny = tiny();
    let Some(room) = dpo_lora::store::space::available(&tiny.path("")) else { return };
    // three matrices of 32 rows or columns a layer, in Q8_0 34 bytes for 32 numbers
    let widest = 1 << 24;
    let layers = room as usize / (3 * 34 * widest) + 2;
    for export in EXPORTS {
        // GGUF has no place for a mask
        let there = match export.last() {
            Some(&"q8_0") => zeros(&tiny, layers, widest, 0),
            _ => zeros(&tiny, 2, 64, (room as usize + (1 << 30)).next_multiple_of(2)),
        };
        if !there {
            eprintln!("skipped: no file of this size, though without bytes, can be made here");
            continue;
        }
        let output = again(&tiny, export);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{export:?}: {said}");
        assert!(said.contains("out: the export needs ") && said.contains("make room, or name a place"), "{said}");
        assert_eq!(outs(&tiny), [""; 0], "{export:?}");
    }
}

/// Every call by which a GGUF file comes to the disk goes wrong: it is whole or absent, and the next one is written.
#[cfg(debug_assertions)]
#[test]
fn a_gguf_file_is_whole_or_absent() {
    use dpo_lora::{
        export::quantize::{To, quantize},
        store::disk::faults::{self, Fault},
    };
    let tiny = tiny();
    let (base, out) = (tiny.path("base"), tiny.path("out"));
    let write = || quantize(&base, To::Q8_0, &out, &mut |_| Ok(()), &|| Ok(()));
    faults::plan(usize::MAX, Fault::Torn);
    write().unwrap();
    let calls = faults::end();
    let whole = tiny.bytes("out");
    let names: Vec<&str> = calls.iter().map(|(call, _)| *call).collect();
    // the file before its name, its name before the folder
    assert!(names.ends_with(&["write", "sync", "rename", "sync"]), "{calls:?}");
    for (at, call) in calls.iter().enumerate() {
        for fault in [Fault::Error(std::io::ErrorKind::Other), Fault::Torn, Fault::Crash] {
            remove_out(&tiny);
            faults::plan(at, fault);
            let outcome = write();
            faults::end_without_power();
            let place = format!("{fault:?} at call {at}, {call:?}: {outcome:?}");
            assert!(outcome.is_err(), "{place}");
            if !matches!(fault, Fault::Crash) {
                assert!(!tiny.path(".out.incomplete").exists(), "{place}");
            }
            if out.exists() {
                assert_eq!(tiny.bytes("out"), whole, "{place}");
            } else {
                write().unwrap();
            }
            assert_eq!(outs(&tiny), ["out"], "{place}");
        }
    }
}
