//! The recipe's rows: found, fetched where they are on a hub, tokenised, split.

use std::path::PathBuf;

use super::{base::Base, steps};
use crate::{
    Error, Result,
    data::{ChatTemplate, Dataset, Options, Report, TokenizedPair, reader, split_eval, trained_on},
    hub,
    recipe::Recipe,
    report::Progress,
};

/// Pairs to train on and pairs held out.
#[derive(Debug)]
pub struct Rows {
    /// To train on.
    pub train: Vec<TokenizedPair>,
    /// Held out; may be empty.
    pub eval: Vec<TokenizedPair>,
    /// What became of the training rows, and of those of `data.eval` where it names any.
    pub reports: (Report, Option<Report>),
}

impl Rows {
    /// Loads what the recipe names; says how many of the rows held out are trained on, too.
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(recipe: &Recipe, base: &Base) -> Result<Self> {
        let rows = Self::loaded(recipe, base)?;
        let (shared, held_out) = (trained_on(&rows.eval, &rows.train), rows.eval.len());
        if shared > 0 {
            Progress::stderr().note(&format!(
                "warning: {shared} of the {held_out} held-out rows are among the training rows; their figures say \
                 nothing of new rows"
            ));
        }
        Ok(rows)
    }

    fn loaded(recipe: &Recipe, base: &Base) -> Result<Self> {
        let train = load(&recipe.data.train, recipe, base, &Options::train(&recipe.data))?;
        if recipe.data.eval.is_empty() {
            let (kept, eval) = split_eval(train.pairs, recipe.data.eval_fraction, recipe.train.seed);
            return Ok(Self { train: kept, eval, reports: (train.report, None) });
        }
        let eval = load(&recipe.data.eval, recipe, base, &Options::eval(&recipe.data))?;
        Ok(Self { train: train.pairs, eval: eval.pairs, reports: (train.report, Some(eval.report)) })
    }
}

impl Rows {
    /// How many pairs a run of the recipe meets.
    pub fn met(&self, recipe: &Recipe) -> usize {
        let steps = steps::total(recipe, self.train.len());
        steps.saturating_mul(recipe.train.batch_size).min(self.train.len()) + self.eval.len()
    }

    /// `file:line` of a training row, or of one held out.
    pub fn place(&self, (file, line): (u32, u32), held_out: bool) -> String {
        let report = self.reports.1.as_ref().filter(|_| held_out).unwrap_or(&self.reports.0);
        match report.files.get(file as usize) {
            Some(file) => format!("{}:{line}", file.path.display()),
            None => format!("row {line} of file {}", file + 1),
        }
    }
}

/// The files and folders that a run of the recipe reads, but for those on a hub.
///
/// # Errors
/// Where a glob names no file.
pub fn read(recipe: &Recipe) -> Result<Vec<PathBuf>> {
    let rows = recipe.data.train.iter().chain(&recipe.data.eval).filter(|name| !name.starts_with("hf://"));
    let mut read = reader::expand(&rows.cloned().collect::<Vec<_>>())?;
    let template = Some(&recipe.data.chat_template).filter(|name| *name != "auto" && *name != "none");
    read.extend(template.map(Into::into));
    read.extend(recipe.model.folder().map(Into::into));
    read.extend(recipe.adapter.start_from.iter().chain(&recipe.samples.labels).cloned());
    Ok(read)
}

/// Loads the pairs of the files that `names` names: paths, globs, or files on a hub.
///
/// # Errors
/// As [`Dataset::load`], where a file is neither here nor to be had, where no row can be used, and where rows may be
/// longer than the model is exact.
pub fn load(names: &[String], recipe: &Recipe, base: &Base, options: &Options) -> Result<Dataset> {
    base.config.check_length(recipe.data.max_length)?;
    let template = ChatTemplate::choose(&recipe.data.chat_template, &base.tokenizer)?;
    let dataset = Dataset::load(&files(names)?, &base.tokenizer, template.as_ref(), options)?;
    dataset.usable().map_err(|error| Error::input(format!("{error}; see `dpo-lora data check`")))
}

/// The files that `names` names, on this machine.
pub fn files(names: &[String]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in names {
        match name.starts_with("hf://") {
            true => files.push(hub::data(name)?),
            false => files.extend(reader::expand(std::slice::from_ref(name))?),
        }
    }
    Ok(files)
}
