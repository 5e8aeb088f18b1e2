//! What is written for others: adapters as PEFT or llama.cpp reads them, merged models, quantised bases.
//!
//! [`adapter_config`] is PEFT's `adapter_config.json`, [`targets`] its way of naming layers, [`peft`] the folder with
//! the matrices, [`card`] the README in it, [`gguf_adapter`] the same for llama.cpp, [`mod@merge`] a model folder with
//! the adapter folded in. [`quantize`] makes a smaller base.

pub mod adapter_config;
pub mod card;
pub mod gguf_adapter;
pub mod merge;
pub mod peft;
pub mod quantize;
pub mod targets;

pub use adapter_config::AdapterConfig;
pub use card::Training;
pub use merge::merge;
pub use peft::{AdapterFolder, AdapterMatrix};
pub use targets::select;
