//! A rehearsal of `benches/gpu.sh` on the CPU with tiny shapes: its bases open, its runs run, its results are there.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

#[test]
fn the_script_s_runs_rehearse_on_the_cpu() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return;
    }
    let (root, folder) = (Path::new(env!("CARGO_MANIFEST_DIR")), tempfile::tempdir().unwrap());
    let bundle = folder.path().join("bundle");
    fs::create_dir_all(bundle.join("tokenizer")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_dpo-lora"), bundle.join("dpo-lora")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(root.join("assets/quickstart/base").join(file), bundle.join("tokenizer").join(file)).unwrap();
    }
    let out = folder.path().join("out");
    let parts = ["two runs", "8B NF4", "8B streamed", "1B bf16", "growth"];
    let output = Command::new(root.join("benches/gpu.sh"))
        .args(["--device", "cpu", "--tiny", "--bundle"])
        .arg(&bundle)
        .arg("--out")
        .arg(&out)
        .arg("--only")
        .args(parts)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let results: Value = serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(results["rehearsal"], true);
    for part in ["8B NF4", "8B streamed", "1B bf16"] {
        let result = &results["parts"][part];
        assert!(result["seconds_a_pair"].as_f64().is_some_and(|seconds| seconds > 0.0), "{part}: {said}");
        // two sequences of 64 tokens with a shared prompt
        assert!(result["tokens_a_pair"].as_u64().is_some_and(|tokens| (65..128).contains(&tokens)), "{part}: {said}");
    }
    assert_eq!(results["parts"]["two runs"]["adapters"], "equal to the byte");
    #[cfg(target_os = "linux")]
    assert_eq!(results["parts"]["growth"]["grew"], false, "{said}");
    assert!(fs::read_to_string(out.join("results.md")).unwrap().contains("| 8B NF4 |"));
}
