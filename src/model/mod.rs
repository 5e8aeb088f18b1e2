//! The decoder as a table of traits per family, forward and backward side by side; LoRA.
//!
//! [`config`] is what a folder says of itself, [`family`] the table, [`decoder`] the whole, [`block`] a layer, [`linear`]
//! a product in it, [`head`] what follows the last layer, [`footprint`] what they hold, [`lora`] what learns, [`rope`], [`rotary`] and [`tokens`] where tokens stand.

pub mod block;
pub mod config;
pub mod decoder;
pub mod family;
pub mod footprint;
pub mod head;
pub mod linear;
pub mod lora;
pub mod rope;
pub mod rotary;
pub mod tokens;

pub use config::Config;
pub use rope::{Rope, RopeScaling};
