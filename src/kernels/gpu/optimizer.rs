//! AdamW, RMSprop and the squared norm over one flat vector on a GPU: a step is one launch.
//!
//! It must change nothing where a number would not be finite after it. A step tells how large its numbers became, and
//! from that and the gradient's norm the next one is known to be finite before it is taken. Where it is not known (at
//! the first step, or with numbers near the end of f32) a launch before it asks every element.

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

/// The largest absolute values of parameters, first and second moments after a step, by threadgroup: `[groups, 3]`.
#[derive(Debug)]
pub struct Largest(Tensor);

impl Largest {
    fn read(&self) -> Result<[f64; 3]> {
        let rows = self.0.to_vec2::<f32>()?;
        Ok(std::array::from_fn(|i| rows.iter().map(|row| f64::from(row[i])).fold(0.0, f64::max)))
    }
}

/// What is known of the numbers that a step starts from.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The gradient's norm, as [`norm`] has it.
    pub norm: f64,
    /// What the step before returned, if nothing else has changed parameters and moments since.
    pub before: Option<&'a Largest>,
}

impl Known<'_> {
    /// Whether all of `most`, made of the largest parameter and moments and the largest gradient, are far from
    /// infinity.
    fn bounds<const N: usize>(self, most: impl Fn([f64; 3], f64) -> [f64; N]) -> Result<bool> {
        let Some(before) = self.before else { return Ok(false) };
        // twice for what sums of f32 squares lose, and more for squares that are too small for f32
        let gradient = 2.0 * self.norm + 1e-18;
        let far = f64::from(f32::MAX) / 4.0;
        Ok(most(before.read()?, gradient).into_iter().all(|number| number < far))
    }
}

impl Adam {
    fn is_finite(&self, known: Known) -> Result<bool> {
        let [scale, decay, rate, eps] = [self.grad_scale, self.decay, self.rate, self.eps].map(|x| f64::from(x.abs()));
        let bounds = known.bounds(|[p, m, v], gradient| {
            let g = scale * gradient;
            let over = (m + g) / eps;
            [v + g * g, over, p * decay.max(1.0) + rate * over]
        })?;
        Ok(bounds && self.root > 0.0)
    }
}

impl Rmsprop {
    fn is_finite(&self, known: Known) -> Result<bool> {
        let [scale, decay, rate, eps] = [self.grad_scale, self.decay, self.rate, self.eps].map(|x| f64::from(x.abs()));
        known.bounds(|[p, _, v], gradient| {
            let g = scale * gradient + decay * p;
            [v + g * g, g / eps, p + rate * g / eps]
        })
    }
}

/// Takes the step in place; where a number would not be finite, changes nothing and returns none.
pub fn adam(
    params: &Tensor,
    grads: &Tensor,
    [m, v]: [&Tensor; 2],
    known: Known,
    step: Adam,
) -> Result<Option<Largest>> {
    let Adam { grad_scale, weight, keep, take, decay, root, rate, eps } = step;
    let words = words(params, &[grad_scale, weight, keep, take, decay, root, rate, eps]);
    let groups = groups(params.elem_count());
    let check = Launch { kernel: "adam_check", groups, words: &words };
    if !step.is_finite(known)? && !is_finite(&check, &[params, grads, m, v])? {
        return Ok(None);
    }
    let largest = room((groups[0], 3), params)?;
    run(&Launch { kernel: "adam_step", groups, words: &words }, &[grads], &[params, m, v, &largest])?;
    Ok(Some(Largest(largest)))
}

/// Takes the step in place; where a number would not be finite, changes nothing and returns none.
pub fn rmsprop(
    params: &Tensor,
    grads: &Tensor,
    square_avg: &Tensor,
    known: Known,
    step: Rmsprop,
) -> Result<Option<Largest>> {
    let Rmsprop { grad_scale, decay, keep, take, rate, eps } = step;
    let words = words(params, &[grad_scale, decay, keep, take, rate, eps]);
    let groups = groups(params.elem_count());
    let check = Launch { kernel: "rmsprop_check", groups, words: &words };
    if !step.is_finite(known)? && !is_finite(&check, &[params, grads, square_avg])? {
        return Ok(None);
    }
    let largest = room((groups[0], 3), params)?;
    run(&Launch { kernel: "rmsprop_step", groups, words: &words }, &[grads], &[params, square_avg, &largest])?;
    Ok(Some(Largest(largest)))
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
