//! The decoder as a table of traits per family, forward and backward side by side; LoRA.
//!
//! [`family`] is the table, [`config`] what a folder says of itself, [`decoder`] the whole. A layer is a [`block`] of
//! two halves, [`attention`] and [`mlp`], made of [`norm`]s, [`parts`] of one input and a [`join`] with the residual;
//! [`linear`] is a product in it, [`head`] what follows the last layer, [`lora`] what learns. [`footprint`] is what all
//! of that holds, `depths` what threads pack for it. [`rope`] (read by `rope_keys`), [`rotary`] and [`tokens`] say where
//! tokens stand.

pub mod attention;
pub mod block;
pub mod config;
pub mod decoder;
mod depths;
pub mod family;
pub mod footprint;
pub mod head;
pub mod join;
pub mod linear;
pub mod lora;
pub mod mlp;
pub mod norm;
pub mod parts;
pub mod rope;
mod rope_keys;
pub mod rotary;
pub mod tokens;

pub use config::Config;
pub use rope::{Rope, RopeScaling};
