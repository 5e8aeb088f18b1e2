//! A smaller base made of a large one, a block of rows at a time: memory stays at a few blocks whatever the model's
//! size.
//!
//! `nf4` writes a folder as bitsandbytes does, `gguf` one file as llama.cpp's converter does, with what `gguf_keys` and
//! `gguf_tokenizer` say in its metadata.

mod gguf;
mod gguf_keys;
mod gguf_tokenizer;
mod nf4;

use std::path::Path;

use rayon::prelude::*;

use crate::model::{Config, decoder::Decoder};
use crate::weights::{ModelFolder, StoredMatrix, StoredTensor};
use crate::{Error, Result};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// bitsandbytes' 4-bit normal floats, as a folder.
    Nf4,
    /// ggml's 8 bit, as a GGUF file.
    Q8_0,
    /// ggml's 4-bit blocks of 256, as a GGUF file; Q5_0 where rows are no such blocks.
    Q4K,
}

/// What became of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Its name in the source.
    pub name: String,
    /// The format that it has now.
    pub format: String,
    /// Bytes that it takes now.
    pub bytes: u64,
    /// What was lost.
    pub error: Loss,
}

/// The difference of numbers from those of the source.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Loss {
    /// Sum of squared differences.
    pub squares: f64,
    /// Sum of squares of the source's numbers.
    pub source: f64,
    /// The largest absolute difference.
    pub most: f64,
}

impl Loss {
    /// Counts numbers and what they became.
    pub fn see(&mut self, source: &[f32], now: &[f32]) {
        for (source, now) in source.iter().zip(now) {
            let (source, off) = (f64::from(*source), f64::from(*source) - f64::from(*now));
            self.squares += off * off;
            self.source += source * source;
            self.most = self.most.max(off.abs());
        }
    }

    /// Counts another's numbers too.
    pub fn add(&mut self, other: Self) {
        self.squares += other.squares;
        self.source += other.source;
        self.most = self.most.max(other.most);
    }

    /// The norm of the difference over the norm of the source.
    pub fn relative(self) -> f64 {
        if self.source == 0.0 { 0.0 } else { (self.squares / self.source).sqrt() }
    }
}

/// Writes the model at `path` to `out`, which must not exist yet; calls `told` for each tensor written, and asks `poll`
/// between blocks whether to stop.
///
/// # Errors
/// [`Error::Recipe`] where `out` is taken; [`Error::Input`] where the model is not one that can be written so, or its
/// weights are not those of its config; [`Error::Resource`] where the disk has too little room; [`Error::Run`] where
/// writing fails; what `told` and `poll` say. `out` is then left absent.
pub fn quantize(
    path: &Path,
    to: To,
    out: &Path,
    told: &mut dyn FnMut(&Written) -> Result<()>,
    poll: &dyn Fn() -> Result<()>,
) -> Result<()> {
    super::merge::refuse_taken(out)?;
    let model = ModelFolder::open(path)?;
    if !model.quantised().is_empty() {
        return Err(Error::input(format!(
            "{}: the model is quantised already ({}); what is lost twice is lost for good. Name the unquantised model",
            path.display(),
            model.quantised().join(", ")
        )));
    }
    let config = Config::read(path)?;
    Decoder::check(&model, &config)?;
    match to {
        To::Nf4 => nf4::write(&model, &config, out, told, poll),
        To::Q8_0 | To::Q4K => gguf::write(&model, &config, to, out, told, poll),
    }
}

/// Rows worked on at a time, so that they hold about a million numbers.
const BLOCK: usize = 1 << 20;

/// Hands a tensor's rows, some at a time and in order, to `take`, with the bytes that `encode` makes of each row and
/// the numbers that it reads back from them. `order` says which row of the tensor stands in a place.
fn each_block(
    tensor: &StoredTensor,
    poll: &dyn Fn() -> Result<()>,
    order: impl Fn(usize) -> usize + Sync,
    encode: impl Fn(&[f32], &mut Vec<u8>, &mut [f32]) + Sync,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<Loss> {
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let mut all = Loss::default();
    if rows * columns == 0 {
        return Ok(all);
    }
    let step = (BLOCK / columns).max(1);
    for first in (0..rows).step_by(step) {
        poll()?;
        let one = |place: usize| {
            let (mut row, mut back, mut bytes) = (vec![0f32; columns], vec![0f32; columns], Vec::new());
            let at = order(place);
            tensor.decode(at..at + 1, 0..columns, &mut row);
            encode(&row, &mut bytes, &mut back);
            let mut loss = Loss::default();
            loss.see(&row, &back);
            (bytes, loss)
        };
        let done: Vec<(Vec<u8>, Loss)> = (first..rows.min(first + step)).into_par_iter().map(one).collect();
        for (bytes, loss) in done {
            take(&bytes)?;
            all.add(loss);
        }
    }
    Ok(all)
}
