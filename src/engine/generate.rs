//! Sampling: every prompt is read once, however many answers are drawn from it; all answers grow together.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::pack::{Tree, pack};
use super::pass::Poll;
use super::within_pool;
use crate::{
    Error, Result,
    kernels::attention::{Span, attention},
    model::{decoder::Decoder, linear::Through, tokens::Tokens},
    random::Stream,
};

/// How to sample.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// Answers drawn from each prompt.
    pub per_prompt: usize,
    /// The first one's number among the prompt's own, where they are not all drawn at once.
    pub first: usize,
    /// Most tokens an answer.
    pub max_new_tokens: usize,
    /// Softmax temperature; 0: the likeliest token.
    pub temperature: f64,
    /// An answer is a function of this, of the prompt and its place, and of the answer's number among the prompt's own.
    pub seed: u64,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
}

/// An answer in the making.
struct Growing {
    prompt: usize,
    random: Stream,
    tokens: Vec<u32>,
    /// Rows of the cache that are its own.
    rows: Range<usize>,
    done: bool,
}

/// Draws answers to `prompts`, in the order of the prompts; a stop token that was drawn is the last of its answer.
/// `poll` is looked at before every layer.
///
/// # Errors
/// What `poll` says; [`Error::Input`] where logits are not finite; [`Error::Tensor`] where the device fails or has no
/// room.
pub fn generate(
    model: &Decoder,
    prompts: &[&[u32]],
    through: Through,
    sampling: &Sampling,
    poll: Poll,
) -> Result<Vec<Vec<u32>>> {
    within_pool(|| generate_in_pool(model, prompts, through, sampling, poll))
}

fn generate_in_pool(
    model: &Decoder,
    prompts: &[&[u32]],
    through: Through,
    sampling: &Sampling,
    poll: Poll,
) -> Result<Vec<Vec<u32>>> {
    let trees: Vec<_> = prompts.iter().map(|prompt| Tree { prompt, answers: vec![] }).collect();
    let prompt_pack = pack(&trees, &model.rotary, &model.device)?;
    let prompt_rows = prompt_pack.tokens.ids.len();
    let room = sampling.max_new_tokens;
    let stream = Stream::new(sampling.seed, "sample");
    let mut growing: Vec<Growing> = (0..prompts.len() * sampling.per_prompt)
        .map(|i| {
            let (prompt, number) = (i / sampling.per_prompt, sampling.first + i % sampling.per_prompt);
            let first = prompt_rows + i * room;
            let random = stream.at(prompt as u64).at(number as u64);
            Growing { prompt, random, tokens: vec![], rows: first..first + room, done: room == 0 }
        })
        .collect();
    let mut cache = Cache::new(model, prompt_rows + growing.len() * room)?;
    let hidden = cache.prompts(model, &prompt_pack.tokens, through, poll)?;
    let last: Vec<_> = prompt_pack.tokens.spans.iter().map(|span| span.own.end as u32 - 1).collect();
    let first = logits(model, &hidden.index_select(&Tensor::new(last, &model.device)?, 0)?)?;
    for answer in growing.iter_mut().filter(|answer| !answer.done) {
        answer.draw(&first[answer.prompt], sampling);
    }
    while growing.iter().any(|answer| !answer.done) {
        let active: Vec<usize> = (0..growing.len()).filter(|&i| !growing[i].done).collect();
        let answers: Vec<&Growing> = active.iter().map(|&i| &growing[i]).collect();
        let hidden = cache.grow(model, &answers, &prompt_pack.tokens.spans, through, poll)?;
        for (row, &i) in logits(model, &hidden)?.iter().zip(&active) {
            growing[i].draw(row, sampling);
        }
    }
    Ok(growing.into_iter().map(|answer| answer.tokens).collect())
}

/// Logits of each row of `hidden[rows, hidden]`.
fn logits(model: &Decoder, hidden: &Tensor) -> Result<Vec<Vec<f32>>> {
    let logits: Vec<Vec<f32>> = model.head.logits(&model.final_norm(hidden)?)?.to_vec2()?;
    // a mask may leave single ones at minus infinity
    let usable = |row: &Vec<f32>| {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        most.is_finite() && !row.iter().any(|logit| logit.is_nan())
    };
    if !logits.iter().all(usable) {
        return Err(Error::input(
            "the model's logits are not finite: the weights of the base or of the adapter hold a NaN or overflow; fetch \
             the files again or use others",
        ));
    }
    Ok(logits)
}

impl Growing {
    fn draw(&mut self, logits: &[f32], sampling: &Sampling) {
        let token = pick(logits, sampling.temperature, self.random.uniform(self.tokens.len() as u64));
        self.tokens.push(token);
        self.done = self.tokens.len() == sampling.max_new_tokens || sampling.stop.contains(&token);
    }
}

/// The token at which the running sum of probabilities passes `random` in `[0, 1)`.
fn pick(logits: &[f32], temperature: f64, random: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let likeliest = || logits.iter().position(|logit| *logit == max).unwrap_or(0) as u32;
    if temperature == 0.0 {
        return likeliest();
    }
    let weight = |logit: f32| (f64::from(logit - max) / temperature).exp();
    let mut left = random * logits.iter().copied().map(weight).sum::<f64>();
    for (token, logit) in logits.iter().enumerate() {
        left -= weight(*logit);
        if left < 0.0 {
            return token as u32;
        }
    }
    likeliest()
}

/// Keys and values of all layers: prompts first, then room for each answer.
struct Cache {
    layers: Vec<(Tensor, Tensor)>,
}

impl Cache {
    fn new(model: &Decoder, rows: usize) -> Result<Self> {
        let room = |width| Tensor::zeros((rows, width), DType::F32, &model.device);
        let layer =
            |heads: crate::kernels::attention::Heads| Ok((room(heads.kv * heads.dim)?, room(heads.kv * heads.dim)?));
        Ok(Self { layers: model.blocks.iter().map(|block| layer(block.attention.heads)).collect::<Result<_>>()? })
    }

    /// Reads the prompts; returns the last layer's output for all their tokens.
    fn prompts(&mut self, model: &Decoder, tokens: &Tokens, through: Through, poll: Poll) -> Result<Tensor> {
        self.pass(model, tokens, &[(0..tokens.ids.len(), 0)], through, poll)
    }

    /// Reads the newest token of every answer; returns the last layer's output, a row an answer.
    fn grow(
        &mut self,
        model: &Decoder,
        answers: &[&Growing],
        prompts: &[Span],
        through: Through,
        poll: Poll,
    ) -> Result<Tensor> {
        let (mut ids, mut positions, mut spans, mut places) = (vec![], vec![], vec![], vec![]);
        for (row, answer) in answers.iter().enumerate() {
            let prefix = prompts[answer.prompt].own.clone();
            let n = answer.tokens.len();
            ids.extend(answer.tokens.last());
            positions.push(prefix.len() + n - 1);
            places.push((row..row + 1, answer.rows.start + n - 1));
            spans.push(Span { queries: row..row + 1, prefix, own: answer.rows.start..answer.rows.start + n });
        }
        let angles = model.rotary.angles(&positions, &model.device)?;
        self.pass(model, &Tokens { ids, positions, angles, spans, groups: vec![] }, &places, through, poll)
    }

    /// One pass; rows of new keys and values go to the places in the cache that `places` names.
    fn pass(
        &mut self,
        model: &Decoder,
        tokens: &Tokens,
        places: &[(Range<usize>, usize)],
        through: Through,
        poll: Poll,
    ) -> Result<Tensor> {
        let mut x = model.embed(tokens)?;
        for (block, (keys, values)) in model.blocks.iter().zip(&self.layers) {
            poll()?;
            let new = block.project(&x, tokens, through)?;
            for (rows, at) in places {
                keys.slice_set(&new.k.narrow(0, rows.start, rows.len())?, 0, *at)?;
                values.slice_set(&new.v.narrow(0, rows.start, rows.len())?, 0, *at)?;
            }
            let attended = attention(&new.q, keys, values, &tokens.spans, block.attention.heads)?;
            x = block.rest(&x, &attended.values, through)?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_picked_where_the_running_sum_passes_the_number() {
        // probabilities 1/8, 5/8, 2/8
        let logits = [1f32, 5.0, 2.0].map(f32::ln);
        for (random, token) in [(0.0, 0), (0.124, 0), (0.126, 1), (0.749, 1), (0.751, 2), (1.0 - 1e-16, 2)] {
            assert_eq!(pick(&logits, 1.0, random), token, "{random}");
        }
        // at temperature 1/2 the probabilities are squared: 1/30, 25/30, 4/30
        for (random, token) in [(0.033, 0), (0.034, 1), (0.866, 1), (0.867, 2)] {
            assert_eq!(pick(&logits, 0.5, random), token, "{random}");
        }
        assert_eq!(pick(&logits, 0.0, 0.99), 1);
        assert_eq!(pick(&[700.0, -700.0, 701.0], 0.01, 0.5), 2);
    }
}
