//! Kernels for Apple's GPUs: shaders in Metal's C++, one idea a file, and a launcher in Rust beside each.
//!
//! [`launch`] is the way to them: through candle's device on a Mac (`device`, with the feature `metal`), and in tests
//! compiled as C++ for the CPU with a fiber a GPU thread (`host`), with the same grid and the same arguments. What a kernel
//! does not take, its caller composes of candle's operations.

pub mod activation;
pub mod attention;
pub mod dequantise;
#[cfg(feature = "metal")]
mod device;
pub mod head;
#[cfg(test)]
mod host;
mod launch;
pub mod layer_norm;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod soft_cap;

#[cfg(test)]
pub use host::on;
#[cfg(feature = "metal")]
pub use launch::serves;

/// The shaders in the order of their compilation, as one file.
const SOURCES: [&str; 10] = [
    include_str!("common.metal"),
    include_str!("norm.metal"),
    include_str!("layer_norm.metal"),
    include_str!("rope.metal"),
    include_str!("activation.metal"),
    include_str!("attention.metal"),
    include_str!("attention_backward.metal"),
    include_str!("head.metal"),
    include_str!("optimizer.metal"),
    include_str!("dequantise.metal"),
];

/// Every kernel's name.
const KERNELS: [&str; 30] = [
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
