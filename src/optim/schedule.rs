//! The learning rate as a pure function of the step, equal to transformers' `get_constant_schedule_with_warmup`,
//! `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`.

use crate::recipe::LrSchedule;

/// The rate used for step `step` (from 0) of `total`, with a peak of `peak` reached after `warmup` steps.
///
/// With warm-up the first step's rate is 0, and step `total` would be 0 for `linear` and `cosine`: the Hugging Face
/// Trainer's convention, which logs this rate beside the step that used it.
pub fn rate(step: usize, total: usize, warmup: usize, peak: f64, kind: LrSchedule) -> f64 {
    if step < warmup {
        return peak * (step as f64 / warmup as f64);
    }
    let after = total.saturating_sub(warmup).max(1) as f64;
    let factor = match kind {
        LrSchedule::Constant => 1.0,
        LrSchedule::Linear => total.saturating_sub(step) as f64 / after,
        LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * ((step - warmup) as f64 / after)).cos()),
    };
    peak * factor
}
