//! A rehearsal of `benches/gpu.sh` on the CPU with tiny shapes: its bases open, its runs run, TRL takes the same base,
//! its results are there.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

mod support;

/// Runs those parts of the script with these options beside them; its results, its table and all that it said.
fn rehearse(parts: &[&str], options: &[&str]) -> (Value, String, String) {
    let (root, folder) = (Path::new(env!("CARGO_MANIFEST_DIR")), tempfile::tempdir().unwrap());
    let bundle = folder.path().join("bundle");
    fs::create_dir_all(bundle.join("tokenizer")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_dpo-lora"), bundle.join("dpo-lora")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(root.join("assets/quickstart/base").join(file), bundle.join("tokenizer").join(file)).unwrap();
    }
    let out = folder.path().join("out");
    let output = Command::new(root.join("benches/gpu.sh"))
        .args(["--device", "cpu", "--tiny", "--bundle"])
        .arg(&bundle)
        .arg("--out")
        .arg(&out)
        .args(options)
        .arg("--only")
        .args(parts)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let results: Value = serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(results["rehearsal"], true);
    (results, fs::read_to_string(out.join("results.md")).unwrap(), said)
}

fn takes_time(result: &Value) -> bool {
    result["seconds_a_pair"].as_f64().is_some_and(|seconds| seconds > 0.0)
}

#[test]
fn the_script_s_runs_rehearse_on_the_cpu() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return;
    }
    let parts = ["two runs", "8B NF4", "8B streamed", "1B bf16", "growth"];
    let (results, table, said) = rehearse(&parts, &[]);
    for part in ["8B NF4", "8B streamed", "1B bf16"] {
        let result = &results["parts"][part];
        assert!(takes_time(result), "{part}: {said}");
        // two sequences of 64 tokens with a shared prompt
        assert!(result["tokens_a_pair"].as_u64().is_some_and(|tokens| (65..128).contains(&tokens)), "{part}: {said}");
    }
    assert_eq!(results["parts"]["two runs"]["adapters"], "equal to the byte");
    #[cfg(target_os = "linux")]
    assert_eq!(results["parts"]["growth"]["grew"], false, "{said}");
    assert!(table.contains("| 8B NF4 |"));
}

/// TRL, PEFT and bitsandbytes on the script's own base in NF4, where `DPO_LORA_PEERS_PYTHON` names a Python that has
/// them.
#[test]
fn trl_takes_the_script_s_base_and_rows() {
    let Some(python) = support::required_env("DPO_LORA_PEERS_PYTHON") else { return };
    let (results, _, said) = rehearse(&["8B NF4", "TRL"], &["--python", python.to_str().unwrap()]);
    assert!(takes_time(&results["parts"]["TRL"]), "{said}");
    assert!(results["parts"]["8B NF4, beside TRL"]["pairs_a_second_ratio"].as_f64().is_some(), "{said}");
}
