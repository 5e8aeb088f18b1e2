//! The decoder as a table of traits per family, forward and backward side by side; LoRA.

pub mod config;
pub mod rope;

pub use config::Config;
pub use rope::{Rope, RopeScaling};
