//! Kernels for Apple's GPUs: shaders in Metal's C++, one idea a file, launched by [`super::gpu`].

#[cfg(feature = "metal")]
pub mod device;

/// The shaders in the order of their compilation, as one file.
pub const SOURCES: [&str; 10] = [
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
