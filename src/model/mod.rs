//! The decoder as a table of traits per family, forward and backward side by side; LoRA.
//!
//! [`config`] is what a folder says of itself, [`family`] the table, [`decoder`] the whole, [`block`] a layer, [`linear`]
//! a product in it, [`lora`] what learns, [`rotary`] and [`tokens`] what a batch brings.

pub mod block;
pub mod config;
pub mod decoder;
pub mod family;
pub mod linear;
pub mod lora;
pub mod rotary;
pub mod tokens;
