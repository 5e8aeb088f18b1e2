//! Prompts and their answers as one run of tokens: no padding, each prompt once.
//!
//! The last token of an answer predicts nothing, so it is not in the run. The first is predicted from the prompt's last
//! token, which all answers share. Every answer's positions go on where the prompt's end.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use crate::{
    kernels::attention::Span,
    model::{rotary::Rotary, tokens::Tokens},
};

/// A prompt and the answers that follow it.
#[derive(Debug, Clone)]
pub struct Tree<'a> {
    /// At least one token.
    pub prompt: &'a [u32],
    /// Each at least one token.
    pub answers: Vec<&'a [u32]>,
}

/// A run of tokens and what is to be predicted where.
#[derive(Debug, Clone)]
pub struct Packed {
    /// The run.
    pub tokens: Tokens,
    /// Rows of the run from which answer tokens are predicted, answer after answer.
    pub rows: Vec<u32>,
    /// The tokens predicted there.
    pub targets: Vec<u32>,
    /// Which of `rows` belong to which answer.
    pub answers: Vec<Range<usize>>,
    /// Which rows of the run belong to which tree.
    pub runs: Vec<Range<usize>>,
}

impl Tree<'_> {
    /// Tokens that the run holds for this tree.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(|answer| answer.len() - 1).sum::<usize>()
    }
}

/// Lays the trees out one after another.
pub fn pack(trees: &[Tree], rotary: &Rotary, device: &Device) -> Result<Packed> {
    let (mut ids, mut positions, mut spans, mut groups) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut rows, mut targets, mut answers, mut runs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for tree in trees {
        let group = spans.len();
        let prompt = ids.len()..ids.len() + tree.prompt.len();
        let mut segment = |tokens: &[u32], prefix: Range<usize>| {
            let own = ids.len()..ids.len() + tokens.len();
            positions.extend((prefix.len()..).take(tokens.len()));
            ids.extend_from_slice(tokens);
            if !own.is_empty() {
                spans.push(Span { queries: own.clone(), prefix, own: own.clone() });
            }
            own
        };
        segment(tree.prompt, 0..0);
        for answer in &tree.answers {
            let own = segment(&answer[..answer.len() - 1], prompt.clone());
            let first = rows.len();
            rows.push(prompt.end as u32 - 1);
            rows.extend(own.map(|row| row as u32));
            targets.extend_from_slice(answer);
            answers.push(first..rows.len());
        }
        groups.push(group..spans.len());
        runs.push(prompt.start..ids.len());
    }
    let angles = rotary.angles(&positions, device)?;
    Ok(Packed { tokens: Tokens { ids, positions, angles, spans, groups }, rows, targets, answers, runs })
}

impl Packed {
    /// The rows to predict from, as a tensor of indices.
    pub fn rows(&self, device: &Device) -> Result<Tensor> {
        Tensor::new(self.rows.as_slice(), device)
    }
}
