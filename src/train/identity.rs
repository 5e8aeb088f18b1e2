//! What a run is made of, as fingerprints: a checkpoint is gone on with by the same run alone.

use sha2::{Digest, Sha256};

use super::checkpoint::MadeOf;
use crate::{
    Result,
    data::{TokenizedPair, dataset},
    recipe::Recipe,
};

/// Fingerprints of the settings, rows and weights that decide the result; `start` are the adapter's values as the run
/// begins. Where it runs, what it shows and how often it evaluates and saves may change.
pub fn made_of(recipe: &Recipe, train: &[TokenizedPair], base: &[u8; 32], start: &[f32]) -> Result<MadeOf> {
    let train_settings =
        crate::recipe::Train { eval_every: 0, save_every: 0, keep_checkpoints: 1, ..recipe.train.clone() };
    let adapter = crate::recipe::Adapter { start_from: None, ..recipe.adapter.clone() };
    let bf16 = recipe.memory.compute == crate::recipe::Compute::Bf16;
    let settings = serde_json::to_vec(&(&adapter, recipe.data.shuffle, &recipe.objective, &train_settings, bf16))
        .map_err(|error| crate::Error::run(format!("the recipe cannot be fingerprinted: {error}")))?;
    let mut values = Sha256::new();
    start.iter().for_each(|value| values.update(value.to_le_bytes()));
    Ok(MadeOf {
        recipe: hex(&Sha256::digest(settings)),
        data: hex(&dataset::fingerprint(train)),
        base: hex(base),
        start: hex(&values.finalize()),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
