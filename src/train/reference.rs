//! The reference: the same weights with the adapter off, or with the adapter that the run started from.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{
    Error, Result,
    data::TokenizedPair,
    kernels::compute::Compute,
    model::{linear::Through, lora::Adapter},
    objective::reference_cache::{ReferenceCache, row_hash},
};

/// Names, with the type of the products, the arithmetic that log-probs in a cache depend on: raised when results change by
/// a bit.
const ARITHMETIC: &[u8] = b"cpu 5";

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

    /// How the reference goes through the model.
    pub fn through(&self) -> Through<'_> {
        Through::of(self.adapter.as_ref())
    }

    /// Summed log-probs of a pair's chosen and rejected answer, where they were computed before.
    pub fn known(&self, pair: &TokenizedPair) -> Option<[f64; 2]> {
        self.cache.as_ref()?.get(&row_hash(pair))
    }

    /// Keeps a pair's sums.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the row, where they are not; they are not kept.
    pub fn learn(&mut self, pair: &TokenizedPair, sums: [f64; 2]) -> Result<()> {
        if !sums.iter().all(|sum| sum.is_finite()) {
            let why = "the reference's log-probs are not finite: the weights of the base or of the start adapter hold a \
                       NaN or overflow; fetch the files again or use another model";
            return Err(Error::NotFinite { why: why.into(), rows: vec![pair.origin], outside: true });
        }
        self.cache.as_mut().map_or(Ok(()), |cache| cache.put(row_hash(pair), sums))
    }

    /// Brings what was computed to the disk.
    pub fn flush(&mut self) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), ReferenceCache::flush)
    }
}
