//! Pairs through the model: summed log-probs, losses, gradients, a bounded number of tokens at a time.

use crate::{
    Error, Result,
    data::TokenizedPair,
    engine::{
        pack::{Packed, Tree, pack},
        pass::{backward, forward, forward_saving},
    },
    kernels::dropout::Dropout,
    model::{decoder::Decoder, linear::Through, lora::Adapter},
    objective::{AnswerSums, Metrics, PairLogps, logps::TokenScore, loss},
    random::Stream,
    recipe::Objective,
};

/// Tokens that pass the layers together, unless one pair has more. Measured on SmolLM2: products run at full speed from
/// a few hundred tokens on, and what a layer holds grows with them.
const TOKENS: usize = 768;

/// What the policy says of a pair.
#[derive(Debug, Clone, Copy)]
pub struct Scored {
    /// Summed log-probs of the chosen and the rejected answer.
    pub sums: [f64; 2],
    /// What else is logged of the chosen and the rejected answer.
    pub logged: [AnswerSums; 2],
}

/// Called between micro-batches; an error ends the work there.
pub type Poll<'a> = &'a dyn Fn() -> Result<()>;

/// Scores pairs with the model as `through` says.
pub fn score(model: &Decoder, pairs: &[&TokenizedPair], through: Through, poll: Poll) -> Result<Vec<Scored>> {
    let mut scored = Vec::with_capacity(pairs.len());
    for micro in cut(pairs) {
        poll()?;
        let packed = packed(model, micro)?;
        scored.extend(read(&packed, &forward(model, &packed, through)?));
    }
    Ok(scored)
}

/// Dropout of one step.
#[derive(Debug, Clone, Copy)]
pub struct StepDropout {
    /// Probability.
    pub p: f64,
    /// The step's own random numbers.
    pub stream: Stream,
}

/// Puts the gradient of the pairs' mean loss into the adapter's, and the pairs into `metrics`.
///
/// `reference` holds the reference's summed log-probs, a pair each.
pub fn gradient(
    model: &Decoder,
    pairs: &[&TokenizedPair],
    reference: &[[f64; 2]],
    objective: &Objective,
    (adapter, dropout): (&Adapter, Option<StepDropout>),
    metrics: &mut Metrics,
    poll: Poll,
) -> Result<()> {
    adapter.clear_grads()?;
    let mut reference = reference.iter();
    let mut first_row = 0;
    for micro in cut(pairs) {
        poll()?;
        let packed = packed(model, micro)?;
        let dropout = dropout.map(|StepDropout { p, stream }| Dropout { p, stream, first_row });
        first_row += packed.tokens.ids.len() as u64;
        let through = Through { adapter: Some(adapter), dropout };
        let (scores, saved) = forward_saving(model, &packed, through)?;
        let mut d_logps = vec![0f32; packed.rows.len()];
        for (i, (scored, (pair, reference))) in read(&packed, &scores).zip(micro.iter().zip(&mut reference)).enumerate()
        {
            let slopes = measure(pair, &scored, *reference, objective, metrics)?;
            for (answer, slope) in slopes.into_iter().enumerate() {
                d_logps[packed.answers[2 * i + answer].clone()].fill((slope / pairs.len() as f64) as f32);
            }
        }
        backward(model, &packed, saved, &d_logps, through)?;
    }
    Ok(())
}

/// Puts a scored pair into `metrics`; returns the loss's derivatives by its two summed log-probs.
///
/// # Errors
/// [`Error::Run`] naming the row, where its loss is not finite.
pub fn measure(
    pair: &TokenizedPair,
    scored: &Scored,
    [ref_chosen, ref_rejected]: [f64; 2],
    objective: &Objective,
    metrics: &mut Metrics,
) -> Result<[f64; 2]> {
    let [chosen, rejected] = scored.sums;
    let (chosen_tokens, rejected_tokens) = (pair.chosen.len(), pair.rejected.len());
    let logps = PairLogps { chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens };
    let grad = loss(objective, &logps);
    if !grad.loss.is_finite() {
        let (file, line) = pair.origin;
        return Err(Error::run(format!(
            "the loss of row {line} of file {} is not finite (log-probs {chosen:e} and {rejected:e}, the reference's \
             {ref_chosen:e} and {ref_rejected:e}); lower train.learning_rate, or look at the row",
            file + 1
        )));
    }
    metrics.add(&logps, grad.loss, pair.prompt.len(), &scored.logged[0], &scored.logged[1]);
    Ok([grad.d_chosen, grad.d_rejected])
}

/// Tokens that a pair's run holds.
pub fn tokens(pair: &TokenizedPair) -> usize {
    tree(pair).tokens()
}

fn tree(pair: &TokenizedPair) -> Tree<'_> {
    Tree { prompt: &pair.prompt, answers: vec![&pair.chosen, &pair.rejected] }
}

fn packed(model: &Decoder, pairs: &[&TokenizedPair]) -> Result<Packed> {
    let trees: Vec<_> = pairs.iter().map(|pair| tree(pair)).collect();
    Ok(pack(&trees, &model.rotary, &model.device)?)
}

/// Cuts pairs into runs of at most [`TOKENS`] tokens, or of one pair.
fn cut<'a, 'p>(pairs: &'a [&'p TokenizedPair]) -> impl Iterator<Item = &'a [&'p TokenizedPair]> {
    let mut rest = pairs;
    std::iter::from_fn(move || {
        let mut held = 0;
        let fits = |pair: &&TokenizedPair| {
            held += tokens(pair);
            held <= TOKENS
        };
        let n = rest.iter().copied().take_while(fits).count().max(1).min(rest.len());
        let (micro, tail) = rest.split_at(n);
        rest = tail;
        (n > 0).then_some(micro)
    })
}

/// A pair's sums from its tokens' scores.
fn read<'a>(packed: &'a Packed, scores: &'a [TokenScore]) -> impl Iterator<Item = Scored> + use<'a> {
    let answer = |index: usize| {
        let tokens = &scores[packed.answers[index].clone()];
        let sum = |of: fn(&TokenScore) -> f32| tokens.iter().map(|token| f64::from(of(token))).sum::<f64>();
        let logged = AnswerSums {
            mean_logits: sum(|token| token.mean_logit),
            entropy: sum(|token| token.entropy),
            correct: tokens.iter().filter(|token| token.likeliest).count(),
        };
        (sum(|token| token.logp), logged)
    };
    (0..packed.answers.len() / 2).map(move |pair| {
        let ((chosen, chosen_logged), (rejected, rejected_logged)) = (answer(2 * pair), answer(2 * pair + 1));
        Scored { sums: [chosen, rejected], logged: [chosen_logged, rejected_logged] }
    })
}
