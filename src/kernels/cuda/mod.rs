//! Kernels for NVIDIA's GPUs: CUDA C++, one idea a file, launched by [`super::gpu`]; `build.rs` has nvcc make them PTX.

pub mod cublas;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod pinned;

/// The kernels in the order of their compilation, as one file: what `build.rs` compiles, for tests on the CPU.
#[cfg(test)]
pub const SOURCES: [&str; 12] = [
    include_str!("common.cu"),
    include_str!("matrix.cu"),
    include_str!("norm.cu"),
    include_str!("layer_norm.cu"),
    include_str!("rope.cu"),
    include_str!("activation.cu"),
    include_str!("attention.cu"),
    include_str!("attention_backward.cu"),
    include_str!("attention_bf16.cu"),
    include_str!("head.cu"),
    include_str!("optimizer.cu"),
    include_str!("dequantise.cu"),
];
