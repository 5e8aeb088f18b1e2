//! What base and tuned model write: side by side, labelled where the recipe says how, and how far apart they are.

use std::{collections::HashSet, fs, path::Path};

use serde::Deserialize;

use super::base::Base;
use crate::{
    Error, Result,
    engine::{
        generate::{Sampling, generate},
        pack::{Tree, pack},
        pass::{Poll, forward},
    },
    model::{linear::Through, lora::Adapter},
    recipe::Samples,
    report::{Sample, summary::SampleFigures},
};

/// Samples drawn at once, at most: what their keys and values take stays small.
pub const AT_ONCE: usize = 64;

/// Samples of base and tuned model on the same prompts with the same random numbers.
#[derive(Debug)]
pub struct Drawn {
    /// Side by side.
    pub samples: Vec<Sample>,
    /// Share of samples labelled positive, base and tuned; none without labels.
    pub positive: Option<[f64; 2]>,
    /// Mean of `log π(y|x) − log π_base(y|x)` over the tuned model's samples: an estimate of the KL divergence of the
    /// tuned model from the base, in nats a sample.
    pub kl: f64,
}

/// Looks at what samples will need, before a run begins: its end is a bad time to learn that labels cannot be read.
pub fn check(base: &Base, samples: &Samples) -> Result<()> {
    samples.labels.as_deref().map(Labels::read).transpose()?;
    for (number, prompt) in samples.prompts.iter().enumerate() {
        base.check_room(ids(base, number, prompt)?.len(), samples.max_new_tokens)?;
    }
    Ok(())
}

/// The tokens of a prompt, of which there is at least one.
pub fn ids(base: &Base, number: usize, prompt: &str) -> Result<Vec<u32>> {
    let ids = base.tokenizer.encode(prompt, true)?;
    match ids.is_empty() {
        true => Err(Error::recipe(format!("samples.prompts: prompt {} has no token", number + 1))),
        false => Ok(ids),
    }
}

/// Draws samples as the recipe says, `at_once` of them together; `poll` is looked at on the way, `shown` hears how many are
/// done.
pub fn draw(
    base: &Base,
    adapter: &Adapter,
    samples: &Samples,
    seed: u64,
    at_once: usize,
    poll: Poll,
    mut shown: impl FnMut(u64),
) -> Result<Drawn> {
    let labels = samples.labels.as_deref().map(Labels::read).transpose()?;
    let tuned = Through::of(Some(adapter));
    let per_prompt = samples.count.div_ceil(samples.prompts.len().max(1));
    let (mut drawn, mut ratios) = (Vec::new(), Vec::new());
    for (number, prompt) in samples.prompts.iter().enumerate() {
        let ids = ids(base, number, prompt)?;
        for first in (0..per_prompt).step_by(at_once) {
            let sampling = Sampling {
                per_prompt: at_once.min(per_prompt - first),
                first,
                max_new_tokens: samples.max_new_tokens,
                temperature: samples.temperature,
                seed: seed.wrapping_add((number * per_prompt) as u64),
                stop: base.tokenizer.stop_ids().to_vec(),
            };
            let answers = |through| generate(&base.model, &[&ids], through, &sampling, poll);
            let (before, after) = (answers(Through::default())?, answers(tuned)?);
            ratios.extend(log_ratios(base, &ids, &after, tuned)?);
            for (before, after) in before.iter().zip(&after) {
                let text = |ids: &[u32]| base.tokenizer.decode(ids, true);
                drawn.push(Sample { prompt: prompt.clone(), base: text(before)?, tuned: text(after)? });
            }
            shown(drawn.len() as u64);
        }
    }
    let positive = labels.map(|labels| labels.shares(&drawn));
    Ok(Drawn { samples: drawn, positive, kl: ratios.iter().sum::<f64>() / ratios.len().max(1) as f64 })
}

/// `log π(y|x) − log π_base(y|x)` of each answer.
fn log_ratios(base: &Base, prompt: &[u32], answers: &[Vec<u32>], tuned: Through) -> Result<Vec<f64>> {
    let tree = Tree { prompt, answers: answers.iter().map(Vec::as_slice).collect() };
    let packed = pack(&[tree], &base.model.rotary, &base.model.device)?;
    let (before, after) = (forward(&base.model, &packed, Through::default())?, forward(&base.model, &packed, tuned)?);
    let ratio = |rows: &std::ops::Range<usize>| {
        rows.clone().map(|i| f64::from(after[i].logp) - f64::from(before[i].logp)).sum()
    };
    Ok(packed.answers.iter().map(ratio).collect())
}

/// Words that praise and words that pan.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    positive: HashSet<String>,
    negative: HashSet<String>,
}

impl Labels {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| Error::reading(path, error))?;
        serde_json::from_str(&text).map_err(|error| {
            let expected = "expected {\"positive\": [words], \"negative\": [words]}";
            Error::input(format!("{}: {error}; {expected}", path.display()))
        })
    }

    /// More words of praise than of blame.
    fn is_positive(&self, text: &str) -> bool {
        let words: Vec<String> =
            text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect();
        let count = |of: &HashSet<String>| words.iter().filter(|word| of.contains(*word)).count();
        count(&self.positive) > count(&self.negative)
    }

    fn shares(&self, samples: &[Sample]) -> [f64; 2] {
        let share = |of: fn(&Sample) -> &str| {
            samples.iter().filter(|sample| self.is_positive(of(sample))).count() as f64 / samples.len().max(1) as f64
        };
        [share(|sample| &sample.base), share(|sample| &sample.tuned)]
    }
}

impl Drawn {
    /// The figures.
    pub fn figures(&self) -> SampleFigures {
        SampleFigures { samples: self.samples.len(), positive: self.positive, kl: self.kl }
    }
}
