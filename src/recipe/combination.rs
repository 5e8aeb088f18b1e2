//! Keys that cannot hold together, though each is right by itself.
//!
//! A value that would have no effect is refused rather than ignored. Only values that differ from the default are
//! refused: a resolved recipe writes all of them out and must load again.

use super::{Loss, Optimizer, Recipe, TargetModules};

/// A combination that cannot be: the key to name (`section`, `name`) and what is wrong.
pub(super) type Clash = (&'static str, &'static str, String);

/// The first impossible combination of a recipe.
pub(super) fn clash(recipe: &Recipe) -> Option<Clash> {
    let Recipe { model, adapter, data, objective, train, samples, .. } = recipe;
    if model.folder().is_some() && model.revision != "main" {
        return Some((
            "model",
            "revision",
            "has no meaning for a folder: it is for the hub; leave it away, or set it to `main`".into(),
        ));
    }
    if objective.label_smoothing > 0.0 && !matches!(objective.loss, Loss::Sigmoid | Loss::Robust) {
        return Some((
            "objective",
            "label_smoothing",
            "has no meaning for this `objective.loss`; set it to 0, or use `sigmoid` or `robust`".into(),
        ));
    }
    if !data.eval.is_empty() && data.eval_fraction > 0.0 {
        return Some(("data", "eval_fraction", "and `data.eval` both say what is held out; leave one away".into()));
    }
    if train.eval_every > 0 && data.eval.is_empty() && data.eval_fraction == 0.0 {
        return Some((
            "train",
            "eval_every",
            "has no rows to evaluate; set `data.eval` or `data.eval_fraction`, or set it to 0".into(),
        ));
    }
    if train.max_steps > 0 && train.warmup_steps > train.max_steps {
        return Some((
            "train",
            "warmup_steps",
            format!(
                "is {}, more than the {} of `train.max_steps`: the learning rate would never reach its peak; lower it",
                train.warmup_steps, train.max_steps
            ),
        ));
    }
    if train.optimizer == Optimizer::Rmsprop && train.adam_betas != [0.9, 0.999] {
        return Some(("train", "adam_betas", "has no meaning for `rmsprop`; leave it away, or use `adamw`".into()));
    }
    if train.save_every > 0 && train.keep_checkpoints == 0 {
        return Some((
            "train",
            "keep_checkpoints",
            "is 0, so that nothing of `train.save_every` would stay; set it to 1 or more".into(),
        ));
    }
    if adapter.start_from.is_some() && adapter.init_seed != 0 {
        return Some((
            "adapter",
            "init_seed",
            "has no meaning with `adapter.start_from`, which brings its own A; leave it away".into(),
        ));
    }
    let brought = [
        ("r", adapter.r != 16),
        ("lora_alpha", adapter.lora_alpha != 32.0),
        ("target_modules", adapter.target_modules != TargetModules::Pattern("all-linear".into())),
        ("use_rslora", adapter.use_rslora),
    ];
    if let (Some(_), Some((name, _))) = (&adapter.start_from, brought.into_iter().find(|(_, set)| *set)) {
        let why = "has no meaning with `adapter.start_from`, which brings its own; leave it away";
        return Some(("adapter", name, why.into()));
    }
    if samples.labels.is_some() && samples.prompts.is_empty() {
        return Some(("samples", "labels", "has no samples to label; set `samples.prompts`".into()));
    }
    None
}
