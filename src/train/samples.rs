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
    /// tuned model from the base, in nats a sample; none where another temperature than 1 drew from another model.
    pub kl: Option<f64>,
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

/// Draws samples as the recipe says, `at_once` of them together; `poll` is looked at on the way, `shown` hears how many
/// are done.
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
    let as_it_is = samples.temperature == 1.0;
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
            if as_it_is {
                ratios.extend(log_ratios(base, &ids, &after, tuned)?);
            }
            for (before, after) in before.iter().zip(&after) {
                let text = |answer: &[u32]| base.tokenizer.decode_after(&ids, answer);
                drawn.push(Sample { prompt: prompt.clone(), base: text(before)?, tuned: text(after)? });
            }
            shown(drawn.len() as u64);
        }
    }
    let positive = labels.map(|labels| labels.shares(&drawn));
    let kl = as_it_is.then(|| ratios.iter().sum::<f64>() / ratios.len().max(1) as f64);
    Ok(Drawn { samples: drawn, positive, kl })
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
        let wrong = |what: String| {
            let expected = "expected {\"positive\": [words], \"negative\": [words]}";
            Error::input(format!("{}: {what}; {expected}", path.display()))
        };
        let Self { positive, negative } = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        // as a sample is split: anything else would never be found
        match positive.iter().chain(&negative).find(|word| word.is_empty() || !word.chars().all(char::is_alphabetic)) {
            Some(word) => Err(wrong(format!("{word:?} is no word of letters alone"))),
            None => {
                let lowercase = |words: HashSet<String>| words.iter().map(|word| word.to_lowercase()).collect();
                Ok(Self { positive: lowercase(positive), negative: lowercase(negative) })
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(positive: &str) -> Result<Labels> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labels.json");
        fs::write(&path, format!(r#"{{"positive": ["{positive}"], "negative": ["bad"]}}"#)).unwrap();
        Labels::read(&path)
    }

    #[test]
    fn a_word_is_found_however_it_is_written() {
        let great = labels("Great").unwrap();
        assert!(great.is_positive("A GREAT film."));
        assert!(!great.is_positive("great, but bad"));
    }

    #[test]
    fn a_word_that_could_not_be_found_is_refused() {
        for word in ["must-see", "don't", "two words", ""] {
            let error = labels(word).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains(&format!("{word:?} is no word of letters alone")), "{error}");
        }
    }
}
