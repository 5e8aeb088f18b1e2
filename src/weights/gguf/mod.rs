//! GGUF, the file format of llama.cpp: weights, config and tokenizer in one file (versions 2 and 3).
//!
//! [`file`](mod@file) reads and checks the header, `metadata` holds its values, [`blocks`] decodes the number formats
//! of which a [`matrix`] is made, [`names`] has the architectures and translates tensors to the names that
//! `config.json`'s families use; [`config`] (with `family` and `rope`) and [`tokenizer`] do so for the metadata;
//! `less_one` undoes what was done to Gemma's norms; [`encode`] and [`writer`] go the other way.

pub mod blocks;
pub mod config;
pub mod encode;
mod family;
pub mod file;
pub(in crate::weights) mod less_one;
pub mod matrix;
mod metadata;
pub mod names;
mod rope;
pub mod tokenizer;
pub mod writer;

pub use blocks::GgmlType;
pub use file::GgufFile;
pub use metadata::{Metadata, Value};
