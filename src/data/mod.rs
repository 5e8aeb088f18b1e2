//! Preference pairs: from files to tokens.
//!
//! [`reader`] gives lines, [`mod@format`] makes rows of them, `tokenize` makes tokens of rows with [`tokenizer`] (and
//! `tokenizer_config`, the files beside it; `growth` bounds what it may make of a text) and [`template`] (with `pyjson`
//! for its JSON), [`dataset`] puts it all together and [`report`] says what became of every row; [`mod@order`] says in
//! which order pairs are visited. Nothing here knows a model.

pub mod dataset;
pub mod format;
mod growth;
pub mod order;
mod pyjson;
pub mod reader;
pub mod report;
pub mod template;
mod tokenize;
pub mod tokenizer;
mod tokenizer_config;

pub use dataset::{Dataset, Options, fingerprint, trained_on};
pub use order::{order, split_eval};
pub use report::Report;
pub use template::{ChatTemplate, Extras, Message};
pub use tokenizer::Tokenizer;
pub use tokenizer_config::TokenizerConfig;

/// A pair of answers to one prompt, as tokens. Both answers hold at least one token and differ; a text ends with EOS,
/// a chat as its template ends a turn.
///
/// The prompt is the longest common prefix of the tokenised prompt and of both tokenised texts, so the seam is
/// that of the joined text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedPair {
    /// Tokens that both answers follow; at least one.
    pub prompt: Vec<u32>,
    /// The preferred answer.
    pub chosen: Vec<u32>,
    /// The other answer.
    pub rejected: Vec<u32>,
    /// Where the row stands: index of its file in the list of files, and line from 1.
    pub origin: (u32, u32),
}
