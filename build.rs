//! With the feature `cuda` alone: has nvcc make PTX of the kernels in `src/kernels/cuda`, which the binary carries and
//! the driver compiles for the card that it meets. `CUDA_COMPUTE_CAP` (80 by default: Ampere and every card since)
//! names the oldest card; `NVCC` names the compiler, which is otherwise that of `CUDA_HOME`, `CUDA_PATH` or the search
//! path.

use std::{env, fs, path::PathBuf, process::Command};

/// The files in the order of their compilation, as `src/kernels/cuda/mod.rs` has them.
const FILES: [&str; 12] = [
    "common",
    "matrix",
    "norm",
    "layer_norm",
    "rope",
    "activation",
    "attention",
    "attention_backward",
    "attention_bf16",
    "head",
    "optimizer",
    "dequantise",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let mut source = String::new();
    for file in FILES {
        let path = format!("src/kernels/cuda/{file}.cu");
        println!("cargo:rerun-if-changed={path}");
        source += &fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("kernels.cu"), source).expect("OUT_DIR can be written to");
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into()).replace('.', "");
    let mut nvcc = Command::new(nvcc());
    nvcc.arg("-ptx").arg(format!("-arch=compute_{capability}"));
    nvcc.arg("-o").arg(out.join("kernels.ptx")).arg(out.join("kernels.cu"));
    match nvcc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{nvcc:?}: {status}"),
        Err(error) => panic!("{nvcc:?}: {error}; nvcc of CUDA 12 or later is needed, NVCC can name it"),
    }
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let home = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"));
    home.map(|home| PathBuf::from(home).join("bin/nvcc")).filter(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into())
}
