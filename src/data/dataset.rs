//! Files of rows become pairs of tokens, and every row that does not is counted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::TokenizedPair;
use super::format::{Parsed, Refusal, Row, Shape};
use super::reader::Lines;
use super::report::{FileReport, Lengths, Report};
use super::template::ChatTemplate;
use super::tokenize::{fit, tokenize};
use super::tokenizer::Tokenizer;
use crate::recipe::{self, Format, Truncation};
use crate::{Error, Result, outside};

/// Rows read ahead and tokenised on all cores at once: enough to keep them busy, few enough to hold as text.
const CHUNK: usize = 1024;
/// Bytes of text after which a chunk takes no further row.
const CHUNK_BYTES: usize = 16 << 20;

/// The part of a recipe's `[data]` that says what a row becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How a row is read.
    pub format: Format,
    /// Most tokens of prompt + answer.
    pub max_length: usize,
    /// What happens to a row over `max_length`.
    pub truncation: Truncation,
    /// Most rows read, from the start; 0: all.
    pub limit: usize,
}

impl Options {
    /// For the rows to train on.
    pub fn train(data: &recipe::Data) -> Self {
        Self { limit: data.limit, ..Self::eval(data) }
    }

    /// For the rows held out: `limit` is not for them.
    pub fn eval(data: &recipe::Data) -> Self {
        Self { format: data.format, max_length: data.max_length, truncation: data.truncation, limit: 0 }
    }
}

/// Pairs, and what became of the rows they are from.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The pairs in the order of their rows.
    pub pairs: Vec<TokenizedPair>,
    /// What became of every row.
    pub report: Report,
}

/// What one row became.
enum Outcome {
    Used { pair: TokenizedPair, truncated: bool, seam_merged: bool },
    Refused(Refusal),
}

impl Dataset {
    /// Reads and tokenises `files` in the order given.
    ///
    /// # Errors
    /// [`Error::Input`] that names file and line: a file that cannot be read, a line that is no JSON object, a
    /// missing or wrong field, messages without a template or that the template refuses.
    pub fn load(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &Options,
    ) -> Result<Self> {
        let mut dataset = Self { pairs: Vec::new(), report: Report::default() };
        for (index, file) in files.iter().enumerate() {
            dataset.load_file(index as u32, file, tokenizer, template, options)?;
        }
        dataset.report.tokens = Lengths::of(&dataset.pairs);
        Ok(dataset)
    }

    /// These pairs, of which there must be one.
    ///
    /// # Errors
    /// [`Error::Input`] where there is none.
    pub fn usable(self) -> Result<Self> {
        if !self.pairs.is_empty() {
            return Ok(self);
        }
        let names: Vec<String> = self.report.files.iter().map(|file| file.path.display().to_string()).collect();
        let (names, summary) = (names.join(", "), self.report.summary());
        Err(Error::input(format!("{names}: no usable row ({summary})")))
    }

    fn load_file(
        &mut self,
        index: u32,
        file: &Path,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &Options,
    ) -> Result<()> {
        let mut lines = Lines::open(file)?;
        let mut shape = None;
        let before = self.report.rows;
        loop {
            let left = if options.limit == 0 { CHUNK } else { (options.limit - self.report.rows).min(CHUNK) };
            let chunk = chunk(&mut lines, left)?;
            let Some((line, first)) = chunk.first() else { break };
            let known = match shape {
                Some(shape) => shape,
                None => Self::shape_of(file, *line, first, template, options)?,
            };
            shape = Some(known);
            let outcome = |(line, text): &(u32, String)| {
                outcome(known, (index, *line), text, tokenizer, template, options)
                    .map_err(|error| at(file, *line, error))
            };
            let outcomes: Vec<Result<Outcome>> = chunk.par_iter().map(outcome).collect();
            for ((line, _), outcome) in chunk.iter().zip(outcomes) {
                self.count(outcome?, tokenizer, || format!("{}:{line}", file.display()));
            }
        }
        let rows = self.report.rows - before;
        // what `data.limit` left unread is not called empty
        if rows > 0 || options.limit == 0 || self.report.rows < options.limit {
            self.report.files.push(FileReport { path: file.to_owned(), shape, rows });
        }
        Ok(())
    }

    fn shape_of(
        file: &Path,
        line: u32,
        first: &str,
        template: Option<&ChatTemplate>,
        options: &Options,
    ) -> Result<Shape> {
        let object = object(first).map_err(|error| at(file, line, error))?;
        let shape = Shape::of(options.format, &object).map_err(|error| at(file, line, wrong(&error)))?;
        if matches!(shape, Shape::Messages | Shape::ImplicitMessages) && template.is_none() {
            let missing = "messages need a chat template and the model brings none (or the recipe says none); \
                           name a file as data.chat_template";
            return Err(at(file, line, Error::input(missing)));
        }
        Ok(shape)
    }

    fn count(&mut self, outcome: Outcome, tokenizer: &Tokenizer, place: impl FnOnce() -> String) {
        self.report.rows += 1;
        match outcome {
            Outcome::Refused(refusal) => self.report.refuse(refusal, place),
            Outcome::Used { pair, truncated, seam_merged } => {
                let endless = |answer: &[u32]| usize::from(!answer.iter().any(|id| tokenizer.stop_ids().contains(id)));
                self.report.used += 1;
                self.report.truncated += usize::from(truncated);
                self.report.seam_merges += usize::from(seam_merged);
                self.report.answers_without_end += endless(&pair.chosen) + endless(&pair.rejected);
                self.pairs.push(pair);
            }
        }
    }
}

/// SHA-256 of the pairs' tokens, in their order; where they come from does not count.
pub fn fingerprint(pairs: &[TokenizedPair]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for pair in pairs {
        for part in parts(pair) {
            hash.update((part.len() as u64).to_le_bytes());
            part.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
    }
    hash.finalize().into()
}

/// How many of the pairs held out are among those trained on: the same prompt, chosen and rejected.
pub fn trained_on(held_out: &[TokenizedPair], train: &[TokenizedPair]) -> usize {
    let asked: HashSet<_> = held_out.iter().map(parts).collect();
    let met: HashSet<_> = train.iter().map(parts).filter(|parts| asked.contains(parts)).collect();
    held_out.iter().filter(|pair| met.contains(&parts(pair))).count()
}

fn parts(pair: &TokenizedPair) -> [&[u32]; 3] {
    [&pair.prompt, &pair.chosen, &pair.rejected]
}

/// The next rows, `most` at most and no more than [`CHUNK_BYTES`] and one row of text, each with its line.
fn chunk(lines: &mut Lines, most: usize) -> Result<Vec<(u32, String)>> {
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while rows.len() < most && bytes < CHUNK_BYTES {
        let Some(row) = lines.next().transpose()? else { break };
        bytes += row.1.len();
        rows.push(row);
    }
    Ok(rows)
}

fn outcome(
    shape: Shape,
    origin: (u32, u32),
    text: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &Options,
) -> Result<Outcome> {
    let row: Row = match shape.parse(&object(text)?).map_err(|error| wrong(&error))? {
        Parsed::Pair(row) => row,
        Parsed::Refused(refusal) => return Ok(Outcome::Refused(refusal)),
    };
    let tokens = tokenize(&row, tokenizer, template)?;
    let seam_merged = tokens.seam_merged;
    Ok(match fit(tokens, origin, tokenizer.leading_bos(), options) {
        Ok((pair, truncated)) => Outcome::Used { pair, truncated, seam_merged },
        Err(refusal) => Outcome::Refused(refusal),
    })
}

fn object(text: &str) -> Result<Map<String, Value>> {
    if text.trim_start().starts_with('[') {
        return Err(Error::input(
            "a JSON list; rows are one JSON object a line (JSONL), so write each on its own line",
        ));
    }
    outside::json(text.as_bytes()).map_err(|error| {
        Error::input(format!("not a JSON object: {error}; rows are one JSON object a line, so mend or remove this one"))
    })
}

fn wrong(complaint: &str) -> Error {
    Error::input(format!(
        "{complaint}; rows hold prompt, chosen and rejected as text or as lists of messages, or whole dialogues as \
         chosen and rejected, alike in a file (data.format says which)"
    ))
}

fn at(file: &Path, line: u32, error: Error) -> Error {
    Error::input(format!("{}:{line}: {error}", file.display()))
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
