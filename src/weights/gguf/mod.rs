//! GGUF, the file format of llama.cpp: weights, config and tokenizer in one file (versions 2 and 3).
//!
//! [`file`](mod@file) reads and checks the header, `metadata` holds its values, [`blocks`] decodes the number formats,
//! [`names`] translates tensors to the names that `config.json`'s families use, [`config`] and [`tokenizer`] do so for the metadata.

pub mod blocks;
pub mod config;
pub mod file;
pub mod matrix;
mod metadata;
pub mod names;
pub mod tokenizer;

pub use blocks::GgmlType;
pub use file::GgufFile;
pub use metadata::{Metadata, Value};
