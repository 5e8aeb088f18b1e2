//! AdamW, RMSprop and the squared norm over one flat vector on a GPU: a launch that asks whether the step is
//! finite, and one that takes it.

use candle_core::{Result, Tensor};

use super::launch::{Launch, THREADS, room, run};

/// Threadgroups that stride over the vector; more than a laptop's GPU runs at once.
const GROUPS: usize = 1024;

/// The numbers of an AdamW step, as `src/optim/adamw.rs` has them.
#[derive(Debug, Clone, Copy)]
pub struct Adam {
    /// What gradients are multiplied by.
    pub grad_scale: f32,
    /// `1 − beta1`.
    pub weight: f32,
    /// `beta2`.
    pub keep: f32,
    /// `1 − beta2`.
    pub take: f32,
    /// `1 − rate · weight decay`.
    pub decay: f32,
    /// Root of the second moment's correction.
    pub root: f32,
    /// The rate over the first moment's correction.
    pub rate: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// The numbers of an RMSprop step, as `src/optim/rmsprop.rs` has them.
#[derive(Debug, Clone, Copy)]
pub struct Rmsprop {
    /// What gradients are multiplied by.
    pub grad_scale: f32,
    /// The L2 term's factor.
    pub decay: f32,
    /// How much of the mean square is kept.
    pub keep: f32,
    /// `1 − keep`.
    pub take: f32,
    /// The rate.
    pub rate: f32,
    /// Added to the root of the mean square.
    pub eps: f32,
}

fn groups(n: usize) -> [usize; 3] {
    [n.div_ceil(THREADS).min(GROUPS), 1, 1]
}

/// Takes the step in place; where a number would not be finite, changes nothing and returns false.
pub fn adam(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: Adam) -> Result<bool> {
    let Adam { grad_scale, weight, keep, take, decay, root, rate, eps } = step;
    let words = words(params, &[grad_scale, weight, keep, take, decay, root, rate, eps]);
    let groups = groups(params.elem_count());
    if !is_finite(&Launch { kernel: "adam_check", groups, words: &words }, &[params, grads, m, v])? {
        return Ok(false);
    }
    run(&Launch { kernel: "adam_step", groups, words: &words }, &[grads], &[params, m, v])?;
    Ok(true)
}

/// Takes the step in place; where a number would not be finite, changes nothing and returns false.
pub fn rmsprop(params: &Tensor, grads: &Tensor, square_avg: &Tensor, step: Rmsprop) -> Result<bool> {
    let Rmsprop { grad_scale, decay, keep, take, rate, eps } = step;
    let words = words(params, &[grad_scale, decay, keep, take, rate, eps]);
    let groups = groups(params.elem_count());
    if !is_finite(&Launch { kernel: "rmsprop_check", groups, words: &words }, &[params, grads, square_avg])? {
        return Ok(false);
    }
    run(&Launch { kernel: "rmsprop_step", groups, words: &words }, &[grads], &[params, square_avg])?;
    Ok(true)
}

/// The Euclidean norm: a sum in f32 a threadgroup, and those in f64 here.
pub fn norm(x: &Tensor) -> Result<f64> {
    let (groups, words) = (groups(x.elem_count()), words(x, &[]));
    let sums = room(groups[0], x)?;
    run(&Launch { kernel: "squares", groups, words: &words }, &[x], &[&sums])?;
    Ok(sums.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>().sqrt())
}

fn words(params: &Tensor, numbers: &[f32]) -> Vec<u32> {
    std::iter::once(params.elem_count() as u32).chain(numbers.iter().map(|number| number.to_bits())).collect()
}

fn is_finite(check: &Launch, tensors: &[&Tensor]) -> Result<bool> {
    let bad = room(check.groups[0], tensors[0])?;
    run(check, tensors, &[&bad])?;
    Ok(bad.to_vec1::<f32>()?.into_iter().all(|count| count == 0.0))
}
