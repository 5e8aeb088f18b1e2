//! Pairs through the model: summed log-probs, losses, gradients, sweep by sweep.

use super::reference::Reference;
use crate::{
    Error, Result,
    data::TokenizedPair,
    engine::{
        pack::{Packed, Tree, pack},
        pass::{Engine, Micro},
        schedule,
    },
    kernels::dropout::Dropout,
    model::{linear::Through, lora::Adapter},
    objective::{AnswerSums, Means, Metrics, PairLogps, logps::TokenScore, loss},
    random::Stream,
    recipe::Objective,
    report::{Figures, Phase, Progress},
};

/// Pairs that are evaluated together.
pub const EVALUATED: usize = 8;

/// What a model says of a pair.
struct Scored {
    /// Summed log-probs of the chosen and the rejected answer.
    sums: [f64; 2],
    /// What else is logged of the chosen and the rejected answer.
    logged: [AnswerSums; 2],
}

/// Dropout of one step.
#[derive(Debug, Clone, Copy)]
pub struct StepDropout {
    /// Probability.
    pub p: f64,
    /// The step's own random numbers.
    pub stream: Stream,
}

/// Averages over pairs as the policy scores them; none where there are no pairs.
///
/// # Errors
/// Those of [`Engine::forward`]; [`Error::NotFinite`] naming the row whose log-probs or loss are not.
pub fn evaluate(
    engine: Engine,
    pairs: &[TokenizedPair],
    reference: &mut Reference,
    objective: &Objective,
    policy: Through,
    progress: &Progress,
) -> Result<Option<Means>> {
    let pairs: Vec<&TokenizedPair> = pairs.iter().collect();
    let mut metrics = Metrics::new(objective.beta);
    let mut stage = progress.start(Phase::Evaluation, 0, pairs.len() as u64);
    for (chunk, done) in pairs.chunks(EVALUATED).zip((EVALUATED..).step_by(EVALUATED)) {
        add(engine, chunk, reference, objective, policy, &mut metrics)?;
        stage.update(done.min(pairs.len()) as u64, Figures::default());
    }
    stage.finish();
    Ok(metrics.mean())
}

/// Puts pairs, as the policy scores them, into `metrics`.
fn add(
    engine: Engine,
    pairs: &[&TokenizedPair],
    reference: &mut Reference,
    objective: &Objective,
    policy: Through,
    metrics: &mut Metrics,
) -> Result<()> {
    for sweep in cut(pairs, engine.schedule.sweep) {
        let batches = batches(engine, sweep)?;
        let mut ref_logps = RefLogps::look_up(reference, &batches);
        let mut scores =
            engine.forward(&[through_all(&batches, policy), ref_logps.missing(reference, &batches)].concat())?;
        ref_logps.learn(reference, &batches, scores.split_off(batches.len()))?;
        for ((batch, scores), ref_logps) in batches.iter().zip(&scores).zip(ref_logps.sums()) {
            for ((pair, scored), ref_logps) in batch.pairs.iter().zip(read(&batch.packed, scores)).zip(ref_logps) {
                measure(pair, &scored, ref_logps, objective, metrics)?;
            }
        }
    }
    Ok(())
}

/// Puts the gradient of the pairs' mean loss into the adapter's, and the pairs into `metrics`.
///
/// # Errors
/// Those of [`Engine::forward_saving`]; [`Error::NotFinite`] naming the row whose log-probs or loss are not.
pub fn gradient(
    engine: Engine,
    pairs: &[&TokenizedPair],
    reference: &mut Reference,
    objective: &Objective,
    (adapter, dropout): (&Adapter, Option<StepDropout>),
    metrics: &mut Metrics,
) -> Result<()> {
    adapter.clear_grads()?;
    let mut first_row = 0;
    for sweep in cut(pairs, engine.schedule.sweep) {
        let batches = batches(engine, sweep)?;
        let mut policy = through_all(&batches, Through::of(Some(adapter)));
        for (micro, batch) in policy.iter_mut().zip(&batches) {
            micro.through.dropout = dropout.map(|StepDropout { p, stream }| Dropout { p, stream, first_row });
            first_row += batch.packed.tokens.ids.len() as u64;
        }
        let mut ref_logps = RefLogps::look_up(reference, &batches);
        let (scores, reference_scores, saved) =
            engine.forward_saving(&policy, &ref_logps.missing(reference, &batches))?;
        ref_logps.learn(reference, &batches, reference_scores)?;
        let mut d_logps = Vec::with_capacity(batches.len());
        for ((batch, scores), ref_logps) in batches.iter().zip(&scores).zip(ref_logps.sums()) {
            let mut d_batch = vec![0f32; batch.packed.rows.len()];
            let scored = read(&batch.packed, scores).zip(ref_logps);
            for (i, (pair, (scored, ref_logps))) in batch.pairs.iter().zip(scored).enumerate() {
                let slopes = measure(pair, &scored, ref_logps, objective, metrics)?;
                for (answer, slope) in slopes.into_iter().enumerate() {
                    d_batch[batch.packed.answers[2 * i + answer].clone()].fill((slope / pairs.len() as f64) as f32);
                }
            }
            d_logps.push(d_batch);
        }
        engine.backward(&policy, saved, &d_logps)?;
    }
    Ok(())
}

/// Pairs that pass a layer at once.
struct Batch<'a, 'p> {
    pairs: &'a [&'p TokenizedPair],
    packed: Packed,
}

/// Cuts a sweep into micro-batches.
fn batches<'a, 'p>(engine: Engine, sweep: &'a [&'p TokenizedPair]) -> Result<Vec<Batch<'a, 'p>>> {
    let batch = |pairs: &'a [&'p TokenizedPair]| {
        let trees: Vec<_> = pairs.iter().map(|pair| tree(pair)).collect();
        Ok(Batch { pairs, packed: pack(&trees, &engine.model.rotary, &engine.model.device)? })
    };
    cut(sweep, engine.schedule.micro).map(batch).collect()
}

fn through_all<'a>(batches: &'a [Batch], through: Through<'a>) -> Vec<Micro<'a>> {
    batches.iter().map(|batch| Micro { packed: &batch.packed, through }).collect()
}

/// The reference's log-probs of a sweep's pairs: their two sums a pair, micro-batch by micro-batch, where all of one's
/// are known.
struct RefLogps(Vec<Option<Vec<[f64; 2]>>>);

impl RefLogps {
    /// What is known of each micro-batch as a whole.
    fn look_up(reference: &Reference, batches: &[Batch]) -> Self {
        Self(batches.iter().map(|batch| batch.pairs.iter().map(|pair| reference.known(pair)).collect()).collect())
    }

    /// The micro-batches to compute.
    fn missing<'a>(&self, reference: &'a Reference, batches: &'a [Batch]) -> Vec<Micro<'a>> {
        let missing = self.0.iter().zip(batches).filter(|(known, _)| known.is_none());
        missing.map(|(_, batch)| Micro { packed: &batch.packed, through: reference.through() }).collect()
    }

    /// Takes in the scores of what was missing.
    fn learn(&mut self, reference: &mut Reference, batches: &[Batch], scores: Vec<Vec<TokenScore>>) -> Result<()> {
        let missing = self.0.iter_mut().zip(batches).filter(|(known, _)| known.is_none());
        for ((known, batch), scores) in missing.zip(scores) {
            let sums: Vec<_> = read(&batch.packed, &scores).map(|scored| scored.sums).collect();
            for (pair, sums) in batch.pairs.iter().zip(&sums) {
                reference.learn(pair, *sums)?;
            }
            *known = Some(sums);
        }
        Ok(())
    }

    /// The sums of each micro-batch's pairs, once nothing is missing.
    fn sums(self) -> impl Iterator<Item = Vec<[f64; 2]>> {
        self.0.into_iter().map(Option::unwrap_or_default)
    }
}

/// Puts a scored pair into `metrics`; returns the loss's derivatives by its two summed log-probs.
///
/// # Errors
/// [`Error::NotFinite`] naming the row, where its loss or a derivative of it is not finite.
fn measure(
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
    if ![grad.loss, grad.d_chosen, grad.d_rejected].iter().all(|number| number.is_finite()) {
        let why = format!(
            "the loss is not finite (log-probs {chosen:e} and {rejected:e}, the reference's {ref_chosen:e} and \
             {ref_rejected:e}); lower train.learning_rate, or look at the row"
        );
        return Err(Error::NotFinite { why, rows: vec![pair.origin], outside: false });
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

/// Cuts pairs into runs of at most so many tokens, or of one pair.
fn cut<'a, 'p>(pairs: &'a [&'p TokenizedPair], most: usize) -> impl Iterator<Item = &'a [&'p TokenizedPair]> {
    schedule::cut(pairs, most, |pair| tokens(pair))
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
