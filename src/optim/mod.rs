//! Optimizers, rate schedules and clipping over one flat vector of parameters.
//!
//! Every LoRA matrix is a view of one contiguous f32 tensor `[n]` and every gradient a view of another, so an
//! optimizer is a few elementwise passes over two vectors. [`adamw`] and [`rmsprop`] hold the formulas, `elementwise`
//! the passes, [`clip`] the global norm, [`schedule`] the rate.

pub mod adamw;
pub mod clip;
mod elementwise;
pub mod rmsprop;
pub mod schedule;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::recipe;
use crate::weights::safetensors::Stored;
use crate::weights::{self, SafetensorsFile, SafetensorsWriter};
use crate::{Error, Result};
pub use adamw::AdamW;
pub use clip::{Gradient, global_norm};
pub use rmsprop::Rmsprop;
pub use schedule::rate;

/// Name of the number of steps taken, in a state file's metadata.
const STEP: &str = "step";

/// Numbers turned into bytes at once.
const PIECE: usize = 1 << 16;

/// The optimizers that a recipe can name.
#[derive(Debug)]
pub enum Optimizer {
    /// AdamW.
    AdamW(AdamW),
    /// RMSprop.
    Rmsprop(Rmsprop),
}

impl Optimizer {
    /// The recipe's optimizer with zero moments for `params` (`[n]`, f32, contiguous).
    pub fn new(train: &recipe::Train, params: &Tensor) -> Result<Self> {
        Ok(match train.optimizer {
            recipe::Optimizer::Adamw => Self::AdamW(AdamW::new(params, train.adam_betas, train.weight_decay)?),
            recipe::Optimizer::Rmsprop => Self::Rmsprop(Rmsprop::new(params, train.weight_decay)?),
        })
    }

    /// One update of `params` in place, so that views of it see the new values. Where a parameter or a moment would not
    /// be finite after it, nothing is changed and false returned.
    ///
    /// `params` is `[n]`, f32 and contiguous, and only this changes it from the first step on to the next
    /// [`Optimizer::load_state`]; the gradient is not changed; `lr` is this step's rate.
    pub fn step(&mut self, params: &Tensor, gradient: Gradient, lr: f64) -> Result<bool> {
        match self {
            Self::AdamW(it) => it.step(params, gradient, lr),
            Self::Rmsprop(it) => it.step(params, gradient, lr),
        }
    }

    /// Steps taken so far and the moments, each `[n]` f32, under torch's names.
    pub fn state(&self) -> (u64, Vec<(String, Tensor)>) {
        let (step, moments) = self.moments();
        (step, moments.into_iter().map(|(name, moment)| (name.to_string(), moment.clone())).collect())
    }

    /// Takes over a state made by [`Optimizer::state`] of the same kind and size. The tensors are updated in place from
    /// then on.
    pub fn load_state(&mut self, step: u64, mut tensors: HashMap<String, Tensor>) -> Result<()> {
        let mut loaded = Vec::new();
        for (name, own) in self.moments().1 {
            let tensor = tensors.remove(name).ok_or_else(|| {
                Error::input(format!("the optimizer's state has no tensor {name:?}: it belongs to another optimizer"))
            })?;
            if tensor.dims() != own.dims() || tensor.dtype() != DType::F32 {
                return Err(Error::input(format!(
                    "the optimizer's state {name:?} is {:?} {:?}, expected F32 {:?}: it belongs to another adapter",
                    tensor.dtype(),
                    tensor.dims(),
                    own.dims()
                )));
            }
            loaded.push(tensor.to_device(own.device())?);
        }
        let mut loaded = loaded.into_iter();
        match self {
            Self::AdamW(it) => {
                it.step = step;
                #[cfg(any(test, feature = "cuda", feature = "metal"))]
                (it.largest = None);
                for (own, new) in [&mut it.exp_avg, &mut it.exp_avg_sq].into_iter().zip(&mut loaded) {
                    *own = new;
                }
            }
            Self::Rmsprop(it) => {
                it.step = step;
                #[cfg(any(test, feature = "cuda", feature = "metal"))]
                (it.largest = None);
                for (own, new) in [&mut it.square_avg].into_iter().zip(&mut loaded) {
                    *own = new;
                }
            }
        }
        Ok(())
    }

    /// Writes the state as a safetensors file: the moments, and the number of steps as `step` in its metadata.
    ///
    /// # Errors
    /// [`Error::Run`] where a moment is not finite or the file cannot be written; [`Error::Resource`] on a full disk.
    pub fn save(&self, path: &Path) -> Result<()> {
        let (step, moments) = self.moments();
        let entries: Vec<_> = moments
            .iter()
            .map(|(name, moment)| (name.to_string(), weights::DType::F32, moment.dims().to_vec()))
            .collect();
        let mut file = SafetensorsWriter::create(path, &entries, &[(STEP, &step.to_string())])?;
        for (name, moment) in moments {
            let values = moment.to_vec1::<f32>()?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::run(format!("{}: {name} is not finite and is not saved", path.display())));
            }
            let mut bytes = Vec::new();
            for values in values.chunks(PIECE) {
                bytes.clear();
                weights::DType::F32.encode(values, &mut bytes);
                file.write(name, &bytes)?;
            }
        }
        file.finish()
    }

    /// Takes over a state written by [`Optimizer::save`].
    ///
    /// # Errors
    /// [`Error::Input`] where it is none, is of another optimizer or size, or is not finite.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let bad = |what: String| Error::input(format!("{}: {what}", path.display()));
        let file = SafetensorsFile::open(path)?;
        let step = file.metadata().get(STEP).and_then(|step| step.parse().ok());
        let step = step.ok_or_else(|| bad(format!("no {STEP:?} with the number of steps taken")))?;
        let mut tensors = HashMap::new();
        for (name, entry) in file.entries() {
            let bytes = file.bytes(name).filter(|_| entry.dtype == Stored::Float(weights::DType::F32));
            let bytes = bytes.ok_or_else(|| bad(format!("{name:?} is not stored as F32")))?;
            let mut values = vec![0f32; entry.shape.iter().product()];
            weights::DType::F32.decode(bytes, &mut values);
            if values.iter().any(|value| !value.is_finite()) {
                return Err(bad(format!("{name:?} is not finite; use an earlier checkpoint")));
            }
            tensors.insert(name.clone(), Tensor::from_vec(values, entry.shape.as_slice(), &Device::Cpu)?);
        }
        self.load_state(step, tensors).map_err(|error| bad(error.to_string()))
    }

    /// Steps taken and the moments by name.
    fn moments(&self) -> (u64, Vec<(&'static str, &Tensor)>) {
        match self {
            Self::AdamW(it) => (it.step, vec![("exp_avg", &it.exp_avg), ("exp_avg_sq", &it.exp_avg_sq)]),
            Self::Rmsprop(it) => (it.step, vec![("square_avg", &it.square_avg)]),
        }
    }
}

#[cfg(test)]
mod tests;
