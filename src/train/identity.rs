//! What a run is made of: a checkpoint is gone on with by the same run alone.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{base::Base, checkpoint::MadeOf, rows::Rows};
use crate::{
    Error, Result,
    data::{ChatTemplate, dataset},
    kernels::compute::Compute,
    recipe::Recipe,
    sha256::hex,
};

/// Settings that do not count: what they name is fingerprinted instead, or they change what is shown and kept alone.
const FREE: [&str; 7] = [
    "adapter.start_from",
    "data.train",
    "data.eval",
    "data.chat_template",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
];

/// The settings that decide the result, and fingerprints of base, rows and weights; `fingerprint` is the base's,
/// `start` the adapter's values as the run begins. Where it runs, what it holds in memory, what it shows and how often
/// it evaluates and saves may change.
pub fn made_of(recipe: &Recipe, base: &Base, fingerprint: &[u8; 32], rows: &Rows, start: &[f32]) -> Result<MadeOf> {
    let mut settings = BTreeMap::new();
    add(&mut settings, "adapter", &recipe.adapter)?;
    add(&mut settings, "data", &recipe.data)?;
    add(&mut settings, "objective", &recipe.objective)?;
    add(&mut settings, "train", &recipe.train)?;
    // Not what was asked for, but what multiplies here: their results differ.
    let compute = if base.compute == Compute::Bf16 { "bf16" } else { "f32" };
    settings.insert("memory.compute".into(), compute.into());
    let mut values = Sha256::new();
    start.iter().for_each(|value| values.update(value.to_le_bytes()));
    let template = ChatTemplate::choose(&recipe.data.chat_template, &base.tokenizer)?;
    Ok(MadeOf {
        settings,
        base: hex(fingerprint),
        template: template.map_or("none".into(), |template| hex(&Sha256::digest(template.source()))),
        tokenizer: hex(&base.tokenizer.fingerprint()),
        start: hex(&values.finalize()),
        data: hex(&dataset::fingerprint(&rows.train)),
        held_out: hex(&dataset::fingerprint(&rows.eval)),
    })
}

/// Puts a section's keys among the settings.
fn add(settings: &mut BTreeMap<String, Value>, name: &str, section: &impl Serialize) -> Result<()> {
    let section = serde_json::to_value(section)
        .map_err(|error| Error::run(format!("the recipe's [{name}] cannot be written down: {error}")))?;
    let keys = section.as_object().into_iter().flatten().map(|(key, value)| (format!("{name}.{key}"), value.clone()));
    settings.extend(keys.filter(|(key, _)| !FREE.contains(&key.as_str())));
    Ok(())
}
