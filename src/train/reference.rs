//! The reference: the same weights with the adapter off, or with the adapter that the run started from.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::{adapters, base::Base};
use crate::{
    Error, Result,
    data::TokenizedPair,
    export::AdapterFolder,
    kernels::compute::Compute,
    model::{linear::Through, lora::Adapter},
    objective::reference_cache::{ReferenceCache, row_hash},
    recipe::Recipe,
};

/// Of the arithmetic that log-probs in a cache depend on, as are the kind of device and the type of the products:
/// raised when results change by a bit.
const VERSION: &str = " 8";

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

    /// What the recipe says, on the base's device.
    ///
    /// # Errors
    /// [`Error::Input`] where its adapter is unreadable or made for another base.
    pub fn of(recipe: &Recipe, base: &Base) -> Result<Self> {
        let adapter = |folder| adapters::from_folder(&AdapterFolder::read(folder)?, base);
        Ok(Self::new(recipe.reference_adapter().map(adapter).transpose()?))
    }

    /// Keeps what is computed in the file at `path`, and uses what is there, if it was computed on the same `kind` of
    /// device; `base` is the base's fingerprint; of so many `rows`.
    pub fn cached(self, path: &Path, base: &[u8; 32], kind: &str, compute: Compute, rows: usize) -> Result<Self> {
        let mut key = Sha256::new();
        key.update(kind);
        key.update(VERSION);
        key.update(compute.name());
        key.update(base);
        if let Some(adapter) = &self.adapter {
            for shape in &adapter.shapes {
                key.update(format!("{shape:?}"));
            }
            adapter.values.to_vec1::<f32>()?.iter().for_each(|value| key.update(value.to_le_bytes()));
        }
        Ok(Self { cache: Some(ReferenceCache::open(path, key.finalize().into(), rows)?), ..self })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_devices_and_of_products_share_no_cache() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let pair = TokenizedPair { prompt: vec![1], chosen: vec![2], rejected: vec![3], origin: (0, 1) };
        let at = |kind: &str, compute| {
            Reference::new(None).cached(&folder.path().join("reference.cache"), &[7; 32], kind, compute, 1)
        };
        let kept = || -> Result<()> {
            let mut reference = at("cpu", Compute::F32)?;
            reference.learn(&pair, [-1.0, -2.0])?;
            reference.flush()
        };
        kept()?;
        assert_eq!(at("cpu", Compute::F32)?.known(&pair), Some([-1.0, -2.0]));
        for (kind, compute) in [("cuda", Compute::F32), ("metal", Compute::F32), ("cpu", Compute::Bf16)] {
            assert_eq!(at(kind, compute)?.known(&pair), None, "{kind}, {compute:?}");
            kept()?;
        }
        Ok(())
    }
}
