//! A row's text as tokens, exactly as TRL 1.16 makes them (`DPOTrainer._prepare_dataset`).

use super::format::{Refusal, Row};
use super::template::{ChatTemplate, Message};
use super::tokenizer::Tokenizer;
use super::{Options, TokenizedPair};
use crate::Result;
use crate::recipe::Truncation;

/// A row's tokens, before `max_length` is looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tokens {
    pub prompt: Vec<u32>,
    pub chosen: Vec<u32>,
    pub rejected: Vec<u32>,
    /// The prompt alone ends in other tokens than the prompt before an answer: those went to the answers.
    pub seam_merged: bool,
}

/// Text: the prompt alone and before each answer, with what the tokenizer puts around a text; an answer that does not
/// end in the text of EOS gets it. Messages: the chat as the template writes it, up to the answer and with it; how
/// an answer ends is the template's to say.
///
/// # Errors
/// Those of the template and the tokenizer; messages without a template are for the caller to refuse.
pub(super) fn tokenize(row: &Row, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Tokens> {
    let [prompt, with_chosen, with_rejected] = match row {
        Row::Text { prompt, chosen, rejected } => {
            let ended = |answer: &str| {
                let eos = if answer.ends_with(tokenizer.eos_token()) { "" } else { tokenizer.eos_token() };
                tokenizer.encode(&format!("{prompt}{answer}{eos}"), true)
            };
            [tokenizer.encode(prompt, true)?, ended(chosen)?, ended(rejected)?]
        }
        Row::Messages { prompt, chosen, rejected, extras } => {
            let chat = |messages: &[Message], open: bool| match template {
                Some(template) => tokenizer.encode(&template.render(messages, extras, open)?, false),
                None => Ok(Vec::new()),
            };
            let with = |answer: &[Message]| chat(&[prompt, answer].concat(), false);
            [chat(prompt, true)?, with(chosen)?, with(rejected)?]
        }
    };
    let split = common_prefix(&prompt, &with_chosen).min(common_prefix(&prompt, &with_rejected));
    Ok(Tokens {
        chosen: with_chosen[split..].to_vec(),
        rejected: with_rejected[split..].to_vec(),
        seam_merged: split < prompt.len(),
        prompt: prompt[..split].to_vec(),
    })
}

/// How many tokens both begin with.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Fits a row into `max_length`: the pair, and whether its prompt was cut.
///
/// An answer is never cut. A prompt that loses its first tokens keeps a BOS that the tokenizer itself put there, since
/// models that expect one fail without it.
pub(super) fn fit(
    tokens: Tokens,
    origin: (u32, u32),
    leading_bos: Option<u32>,
    options: &Options,
) -> std::result::Result<(TokenizedPair, bool), Refusal> {
    let Tokens { mut prompt, chosen, rejected, .. } = tokens;
    if prompt.is_empty() {
        return Err(Refusal::EmptyPrompt);
    }
    if chosen.is_empty() || rejected.is_empty() {
        return Err(Refusal::EmptyAnswer);
    }
    if chosen == rejected {
        return Err(Refusal::IdenticalAnswers);
    }
    let room = options.max_length.saturating_sub(chosen.len().max(rejected.len()));
    let truncated = prompt.len() > room;
    if truncated {
        if room == 0 || options.truncation == Truncation::Refuse {
            return Err(Refusal::TooLong);
        }
        match options.truncation {
            Truncation::PromptStart => {
                let kept = usize::from(Some(prompt[0]) == leading_bos);
                prompt.drain(kept..kept + prompt.len() - room);
            }
            Truncation::PromptEnd | Truncation::Refuse => prompt.truncate(room),
        }
    }
    Ok((TokenizedPair { prompt, chosen, rejected, origin }, truncated))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Format;

    fn fitted(
        max_length: usize,
        truncation: Truncation,
        bos: Option<u32>,
    ) -> std::result::Result<(Vec<u32>, bool), Refusal> {
        let tokens =
            Tokens { prompt: vec![1, 2, 3, 4], chosen: vec![5, 6], rejected: vec![7, 8, 9], seam_merged: false };
        let options = Options { format: Format::Auto, max_length, truncation, limit: 0 };
        let (pair, cut) = fit(tokens, (0, 1), bos, &options)?;
        assert_eq!((pair.chosen, pair.rejected, pair.origin), (vec![5, 6], vec![7, 8, 9], (0, 1)));
        Ok((pair.prompt, cut))
    }

    #[test]
    fn only_the_prompt_is_cut() {
        use Truncation::{PromptEnd, PromptStart, Refuse};
        for truncation in [Refuse, PromptStart, PromptEnd] {
            assert_eq!(fitted(7, truncation, None), Ok((vec![1, 2, 3, 4], false)));
            assert_eq!(fitted(3, truncation, None), Err(Refusal::TooLong));
            assert_eq!(fitted(0, truncation, None), Err(Refusal::TooLong));
        }
        assert_eq!(fitted(6, Refuse, None), Err(Refusal::TooLong));
        assert_eq!(fitted(6, PromptStart, None), Ok((vec![2, 3, 4], true)));
        assert_eq!(fitted(6, PromptEnd, None), Ok((vec![1, 2, 3], true)));
        assert_eq!(fitted(4, PromptStart, None), Ok((vec![4], true)));
        assert_eq!(fitted(5, PromptStart, Some(1)), Ok((vec![1, 4], true)));
        assert_eq!(fitted(4, PromptStart, Some(1)), Ok((vec![1], true)));
        assert_eq!(fitted(5, PromptStart, Some(9)), Ok((vec![3, 4], true)));
    }

    #[test]
    fn what_is_no_pair_as_tokens_is_refused() {
        let options = Options { format: Format::Auto, max_length: 9, truncation: Truncation::Refuse, limit: 0 };
        let refusal = |prompt: &[u32], chosen: &[u32], rejected: &[u32]| {
            let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(<[u32]>::to_vec);
            fit(Tokens { prompt, chosen, rejected, seam_merged: false }, (0, 1), None, &options).unwrap_err()
        };
        assert_eq!(refusal(&[], &[1], &[2]), Refusal::EmptyPrompt);
        assert_eq!(refusal(&[1], &[], &[2]), Refusal::EmptyAnswer);
        assert_eq!(refusal(&[1], &[2], &[2]), Refusal::IdenticalAnswers);
    }
}
