//! What an export starts from: a run's folder, a checkpoint or an adapter.

use std::path::{Path, PathBuf};

use super::adapter_config;
use super::peft::AdapterFolder;
use crate::recipe::Recipe;
use crate::store::Folder;
use crate::{Error, Result};

/// The adapter that `source` means: its own folder, or a finished run's `adapter/`.
///
/// # Errors
/// [`Error::Input`] where it is neither, with what to name instead.
pub fn adapter_of(source: &Path) -> Result<PathBuf> {
    if source.join(adapter_config::FILE).exists() {
        return Ok(source.to_path_buf());
    }
    let last = source.join("adapter");
    if last.join(adapter_config::FILE).exists() {
        return Ok(last);
    }
    let shown = source.display();
    Err(Error::input(if !source.is_dir() {
        format!("{shown}: there is no such folder")
    } else if source.join("recipe.toml").exists() {
        format!("{shown}: this run has not ended; resume it, or name one of its checkpoint-STEP folders")
    } else {
        format!("{shown}: neither a run's folder nor an adapter's ({} is missing)", adapter_config::FILE)
    }))
}

/// The recipe that an adapter was trained by, where it still lies in its run's folder.
pub fn recipe_of(adapter: &Path) -> Option<Recipe> {
    let text = std::fs::read_to_string(adapter.parent()?.join("recipe.toml")).ok()?;
    toml::from_str(&text).ok()
}

/// Writes the adapter that `source` means to `out`, which must not exist yet, in PEFT's format; `base` replaces the
/// name of its base.
///
/// # Errors
/// [`Error::Recipe`] where `out` is taken, those of [`AdapterFolder::read`] and [`AdapterFolder::write`] else.
pub fn to_peft(source: &Path, out: &Path, base: Option<&str>) -> Result<()> {
    let source = adapter_of(source)?;
    let mut adapter = AdapterFolder::read(&source)?;
    if let Some(base) = base {
        adapter.config.base_model_name_or_path = Some(base.to_string());
    }
    refuse_taken(out)?;
    let folder = Folder::create_atomic(out)?;
    adapter.write(folder.path(), recipe_of(&source).as_ref())?;
    folder.finish()
}

/// An export replaces nothing.
pub(super) fn refuse_taken(out: &Path) -> Result<()> {
    match out.exists() {
        true => Err(Error::recipe(format!("{}: it exists already; name a folder that does not", out.display()))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{AdapterConfig, AdapterMatrix};
    use std::fs;

    const CONFIG: &str = r#"{"peft_type":"LORA","r":1,"lora_alpha":1,"target_modules":["x"]}"#;

    fn adapter_in(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(adapter_config::FILE), CONFIG).unwrap();
        let matrix = AdapterMatrix { module: "x".into(), a: vec![1.0], b: vec![2.0], r: 1, input: 1, output: 1 };
        let adapter = AdapterFolder { config: AdapterConfig::read(folder).unwrap(), matrices: vec![matrix] };
        adapter.write(folder, None).unwrap();
    }

    #[test]
    fn a_run_means_its_last_adapter() {
        let run = tempfile::tempdir().unwrap();
        let said = |path: &Path| adapter_of(path).unwrap_err().to_string();
        assert!(said(run.path()).contains("neither a run's folder nor an adapter's"));
        assert!(said(&run.path().join("none")).contains("no such folder"));
        fs::write(run.path().join("recipe.toml"), "").unwrap();
        assert!(said(run.path()).contains("has not ended"));
        adapter_in(&run.path().join("adapter"));
        assert_eq!(adapter_of(run.path()).unwrap(), run.path().join("adapter"));
        assert_eq!(adapter_of(&run.path().join("adapter")).unwrap(), run.path().join("adapter"));
    }

    #[test]
    fn an_adapter_is_written_once_and_under_the_base_that_is_named() {
        let place = tempfile::tempdir().unwrap();
        let (source, out) = (place.path().join("source"), place.path().join("out"));
        adapter_in(&source);
        to_peft(&source, &out, Some("owner/name")).unwrap();
        let read = AdapterFolder::read(&out).unwrap();
        assert_eq!(read.config.base_model_name_or_path.as_deref(), Some("owner/name"));
        assert_eq!(read.matrices, AdapterFolder::read(&source).unwrap().matrices);
        assert_eq!(to_peft(&source, &out, None).unwrap_err().exit_code(), 2);
    }
}
