//! The reference: the same weights with the adapter off, or with the adapter that the run started from.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::pairs::{Poll, measure, score};
use crate::{
    Error, Result,
    data::TokenizedPair,
    kernels::compute::Compute,
    model::{decoder::Decoder, linear::Through, lora::Adapter},
    objective::{
        Metrics,
        reference_cache::{ReferenceCache, row_hash},
    },
    recipe::Objective,
};

/// Names, with the type of the products, the arithmetic that log-probs in a cache depend on: raised when results change by
/// a bit.
const ARITHMETIC: &[u8] = b"cpu 2";

/// What the policy is held to.
#[derive(Debug)]
pub struct Reference {
    adapter: Option<Adapter>,
    cache: Option<ReferenceCache>,
}

impl Reference {
    /// The bare base, or the base with a fixed adapter. Nothing is kept on disk.
    pub fn new(adapter: Option<Adapter>) -> Self {
        Self { adapter, cache: None }
    }

    /// Keeps what is computed in the file at `path`, and uses what is there; `base` is the base's fingerprint.
    pub fn cached(self, path: &Path, base: &[u8; 32], compute: Compute) -> Result<Self> {
        let mut key = Sha256::new();
        key.update(ARITHMETIC);
        key.update(compute.name());
        key.update(base);
        if let Some(adapter) = &self.adapter {
            for shape in &adapter.shapes {
                key.update(format!("{shape:?}"));
            }
            adapter.values.to_vec1::<f32>()?.iter().for_each(|value| key.update(value.to_le_bytes()));
        }
        Ok(Self { cache: Some(ReferenceCache::open(path, key.finalize().into())?), ..self })
    }

    /// Summed log-probs of each pair's chosen and rejected answer.
    pub fn sums(&mut self, model: &Decoder, pairs: &[&TokenizedPair], poll: Poll) -> Result<Vec<[f64; 2]>> {
        let known = |cache: &ReferenceCache, pair: &TokenizedPair| cache.get(&row_hash(pair));
        let mut sums: Vec<_> =
            pairs.iter().map(|pair| self.cache.as_ref().and_then(|cache| known(cache, pair))).collect();
        let missing: Vec<_> =
            pairs.iter().zip(&sums).filter(|(_, sums)| sums.is_none()).map(|(pair, _)| *pair).collect();
        let through = Through { adapter: self.adapter.as_ref(), dropout: None };
        let mut computed = score(model, &missing, through, poll)?.into_iter();
        for (pair, sums) in pairs.iter().zip(&mut sums) {
            if sums.is_none()
                && let Some(scored) = computed.next()
            {
                if !scored.sums.iter().all(|sum| sum.is_finite()) {
                    let (file, line) = pair.origin;
                    return Err(Error::input(format!(
                        "the reference's log-probs of row {line} of file {} are not finite: the weights of the base or \
                         of the start adapter hold a NaN or overflow; fetch the files again or use another model",
                        file + 1
                    )));
                }
                *sums = Some(scored.sums);
                if let Some(cache) = &mut self.cache {
                    cache.put(row_hash(pair), scored.sums)?;
                }
            }
        }
        Ok(sums.into_iter().flatten().collect())
    }

    /// Puts pairs, as `policy` scores them, into `metrics`.
    pub fn measure(
        &mut self,
        model: &Decoder,
        pairs: &[&TokenizedPair],
        policy: Through,
        objective: &Objective,
        metrics: &mut Metrics,
        poll: Poll,
    ) -> Result<()> {
        let held_to = self.sums(model, pairs, poll)?;
        for ((pair, scored), held_to) in pairs.iter().zip(score(model, pairs, policy, poll)?).zip(held_to) {
            measure(pair, &scored, held_to, objective, metrics)?;
        }
        Ok(())
    }

    /// Brings what was computed to the disk.
    pub fn flush(&mut self) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), ReferenceCache::flush)
    }
}
