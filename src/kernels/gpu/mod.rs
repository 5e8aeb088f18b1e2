//! Launchers of the kernels for GPUs: what grid, which tensors, what numbers, and in which pieces. The kernels are
//! CUDA's (`../cuda`) and Metal's (`../metal`), of the same names and arguments but for CUDA's on the matrix unit; one
//! set of tests holds both.
//!
//! [`launch`] is the way to them: through candle's device where the build has one, and in tests compiled as C++ for the
//! CPU with a fiber a GPU thread (`host`), with the same grid and the same arguments. What a kernel does not take, its
//! caller composes of candle's operations.

pub mod activation;
pub mod attention;
pub mod dequantise;
pub mod head;
#[cfg(test)]
mod host;
pub mod launch;
pub mod layer_norm;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod soft_cap;

#[cfg(test)]
pub use host::on;
#[cfg(any(feature = "cuda", feature = "metal"))]
pub use launch::serves;

/// The kernels that CUDA alone has: those on the matrix unit.
#[cfg(test)]
pub const MATRIX_KERNELS: [&str; 10] = [
    "attention_bf16_64",
    "attention_bf16_128",
    "attention_bf16_256",
    "attention_dq_bf16_64",
    "attention_dq_bf16_128",
    "attention_dq_bf16_256",
    "attention_dkv_bf16_64",
    "attention_dkv_bf16_128",
    "attention_dkv_bf16_256",
    "attention_shares",
];

/// Every other kernel's name.
#[cfg(any(test, feature = "metal"))]
pub const KERNELS: [&str; 30] = [
    "rms_norm",
    "rms_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rope",
    "gated",
    "gated_backward",
    "activation",
    "activation_backward",
    "soft_cap",
    "soft_cap_slope",
    "attention_64",
    "attention_128",
    "attention_256",
    "attention_delta",
    "attention_dq_64",
    "attention_dq_128",
    "attention_dq_256",
    "attention_dkv_64",
    "attention_dkv_128",
    "attention_dkv_256",
    "head_scores",
    "head_slope",
    "adam_check",
    "adam_step",
    "rmsprop_check",
    "rmsprop_step",
    "squares",
    "dequantise_blocks",
    "dequantise_four_bit",
];
