//! The run's folder: made, or moved aside, or gone on with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// The resolved recipe in a run's folder.
pub const RECIPE: &str = "recipe.toml";
/// The metrics in a run's folder.
pub const METRICS: &str = "metrics.jsonl";
/// The reference's log-probs in a run's folder.
pub const REFERENCE: &str = "reference.cache";
/// The final adapter in a run's folder.
pub const ADAPTER: &str = "adapter";
/// The closing summary in a run's folder.
pub const SUMMARY: &str = "summary.json";
/// The curves in a run's folder.
pub const REPORT: &str = "report.html";

/// Makes the folder of a new run. An earlier run of that name is moved aside and its new place returned: nothing that
/// took a night is written over.
///
/// # Errors
/// [`Error::Recipe`] where something else than a run stands there.
pub fn begin(path: &Path) -> Result<Option<PathBuf>> {
    let mut moved = None;
    if path.exists() && !is_empty(path)? {
        if !path.join(RECIPE).is_file() {
            return Err(Error::recipe(format!(
                "run.output: {} holds something else than a run; name another folder",
                path.display()
            )));
        }
        let aside = (1..).map(|n| PathBuf::from(format!("{}.{n}", path.display()))).find(|aside| !aside.exists());
        if let Some(aside) = aside {
            fs::rename(path, &aside).map_err(|error| Error::writing(&aside, error))?;
            moved = Some(aside);
        }
    }
    fs::create_dir_all(path).map_err(|error| Error::writing(path, error))?;
    Ok(moved)
}

fn is_empty(path: &Path) -> Result<bool> {
    let mut entries =
        fs::read_dir(path).map_err(|error| Error::recipe(format!("run.output: {}: {error}", path.display())))?;
    Ok(entries.next().is_none())
}
