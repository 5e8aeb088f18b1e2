//! How far a merged model is from the adapter that it was made of, measured on what the adapter itself writes.

use super::base::Base;
use crate::{
    Result,
    engine::{
        generate::{Sampling, generate},
        pack::{Tree, pack},
        pass::{Poll, forward},
    },
    model::{linear::Through, lora::Adapter},
};

/// Texts written a prompt, and their length: a few hundred tokens in all.
const TEXTS: usize = 4;
const TOKENS: usize = 48;

/// Differences of log-probs a token, in nats.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Difference {
    /// Tokens compared.
    pub tokens: usize,
    /// The largest.
    pub max: f64,
    /// The mean of their absolute values.
    pub mean: f64,
}

/// Compares base and adapter with the merged model, on texts that follow `prompts` (each at least one token); `poll` is
/// asked on the way whether to stop.
pub fn measure(base: &Base, adapter: &Adapter, merged: &Base, prompts: &[Vec<u32>], poll: Poll) -> Result<Difference> {
    let tuned = Through::of(Some(adapter));
    let new = TOKENS.min(base.positions() / 2).max(1);
    let stop = base.tokenizer.stop_ids().to_vec();
    let sampling = Sampling { per_prompt: TEXTS, first: 0, max_new_tokens: new, temperature: 1.0, seed: 0, stop };
    let mut differences = Vec::new();
    for prompt in prompts {
        // of a long prompt the end, so that the model has positions left for the texts
        let prompt = &prompt[prompt.len().saturating_sub(base.positions().saturating_sub(new).max(1))..];
        let texts = generate(&base.model, &[prompt], tuned, &sampling, poll)?;
        let tree = || Tree { prompt, answers: texts.iter().map(Vec::as_slice).collect() };
        let ours = forward(&base.model, &pack(&[tree()], &base.model.rotary, &base.model.device)?, tuned)?;
        let packed = pack(&[tree()], &merged.model.rotary, &merged.model.device)?;
        let theirs = forward(&merged.model, &packed, Through::default())?;
        differences.extend(ours.iter().zip(&theirs).map(|(ours, theirs)| f64::from((ours.logp - theirs.logp).abs())));
    }
    let max = differences.iter().copied().fold(0.0, f64::max);
    let mean = differences.iter().sum::<f64>() / differences.len().max(1) as f64;
    Ok(Difference { tokens: differences.len(), max, mean })
}
