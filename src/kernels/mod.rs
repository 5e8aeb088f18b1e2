//! The arithmetic: fused operations with one implementation a device and a plain-tensor fallback.
//!
//! An operation is a function of tensors. On the CPU it runs our own loops on all cores over the tensors' slices
//! ([`host`]); on a GPU a kernel of ours (`gpu`, for `cuda` and `metal`) where it takes them; else it is composed of
//! candle's operations. [`gemm`], `tiles`, `thin` and `loose` multiply on the CPU, the rest is one idea a file.

pub mod activation;
#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod attention;
pub mod compute;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod cuda;
pub mod dequantise;
pub mod dropout;
pub mod gate;
pub mod gemm;
#[cfg(any(test, feature = "cuda", feature = "metal"))]
pub(crate) mod gpu;
pub mod held;
pub mod host;
pub mod layer_norm;
mod loose;
#[cfg(any(test, feature = "metal"))]
mod metal;
pub mod micro;
pub mod norm;
#[cfg(test)]
pub(crate) mod oracle;
pub mod pack;
pub mod product;
pub mod profile;
pub mod rope;
pub(crate) mod simd;
pub mod soft_cap;
pub mod special;
pub mod sum;
mod thin;
#[cfg(target_arch = "x86_64")]
pub mod tiles;
pub(crate) mod words;
