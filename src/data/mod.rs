//! Preference pairs: from files to tokens.

/// A pair of answers to one prompt, as tokens. Both answers hold at least one token and end with EOS.
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
