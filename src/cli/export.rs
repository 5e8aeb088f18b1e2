//! `export`: a PEFT adapter, a GGUF adapter or a merged model.

use std::path::Path;

use candle_core::Device;

use super::args::{ExportArgs, ExportDtype, ExportTo};
use super::stdout;
use crate::engine::pass::Poll;
use crate::export::merge::refuse_taken;
use crate::export::{AdapterFolder, Training, gguf_adapter, merge};
use crate::hub;
use crate::recipe::Recipe;
use crate::store::Folder;
use crate::train::adapters;
use crate::train::base::Base;
use crate::train::device::Compute;
use crate::train::difference::{self, Difference};
use crate::train::folder::{RECIPE, adapter_of};
use crate::train::origin::Origin;
use crate::train::signals::Signals;
use crate::weights::DType;
use crate::{Error, Result};

/// Runs the command.
///
/// # Errors
/// [`Error::Recipe`] where OUT exists or the base is not the adapter's, [`Error::Input`] where the adapter is broken or
/// does not fit its base, [`Error::Stopped`] after a signal: OUT is then absent, or whole where it was written before.
pub fn run(args: ExportArgs) -> Result<()> {
    let signals = Signals::install()?;
    refuse_taken(&args.out)?;
    let source = adapter_of(&args.source)?;
    let mut adapter = AdapterFolder::read(&source)?;
    let named = args.base.is_some();
    if let Some(base) = args.base {
        adapter.config.base_model_name_or_path = Some(base);
        // it is a commit of the other base
        adapter.config.revision = None;
    }
    let revision = adapter.config.revision.as_deref().unwrap_or("main");
    let recipe = recipe_of(&source)?;
    match args.to {
        ExportTo::Peft => {
            signals.hold();
            let steps = Origin::of(&source)?.and_then(|origin| origin.steps());
            to_peft(&adapter, recipe.as_ref().map(|recipe| Training { recipe, steps }), &args.out)?;
            stdout::line(format!("PEFT adapter in {}", args.out.display()))?;
        }
        ExportTo::GgufAdapter => {
            let base = hub::model(&base_of(&adapter, &source)?, revision)?;
            signals.hold();
            gguf_adapter::write(&adapter, &base, &args.out)?;
            stdout::line(format!("GGUF adapter in {}", args.out.display()))?;
        }
        ExportTo::Merged => {
            let base = base_of(&adapter, &source)?;
            let base = Base::open(&base, revision, &Device::Cpu, Compute::F32)?;
            if let Some(origin) = Origin::of(&source)? {
                origin.check_base(&base, named, "--base MODEL")?;
            }
            signals.hold();
            let poll = || signals.stopped();
            merge(&base.folder, &adapter, &args.out, args.dtype.map(dtype), &poll)?;
            stdout::line(format!("Merged model in {}", args.out.display()))?;
            report_difference(&base, &adapter, &args.out, recipe.as_ref(), &poll)?;
        }
    }
    // one that came as the last file was written
    signals.stopped()
}

/// The name of the adapter's base. Where no revision says that it is the hub's, a folder of that name goes first, as in
/// PEFT.
fn base_of(adapter: &AdapterFolder, source: &Path) -> Result<String> {
    let named = adapter.config.base_model_name_or_path.as_deref().ok_or_else(|| {
        Error::recipe(format!("{}: the adapter does not name its base; add --base MODEL", source.display()))
    })?;
    if adapter.config.revision.is_some() { Ok(named.to_string()) } else { hub::folder_or_name(named) }
}

/// Opens the merged model and says how far it is from base and adapter, on what the adapter writes to the recipe's
/// prompts, or to nothing.
fn report_difference(
    base: &Base,
    adapter: &AdapterFolder,
    out: &Path,
    recipe: Option<&Recipe>,
    poll: Poll,
) -> Result<()> {
    let merged = Base::open(&hub::folder_or_name(&out.display().to_string())?, "main", &Device::Cpu, Compute::F32)?;
    let texts = recipe.map_or(&[][..], |recipe| &recipe.samples.prompts);
    let mut prompts = texts.iter().map(|text| base.tokenizer.encode(text, true)).collect::<Result<Vec<_>>>()?;
    prompts.retain(|prompt| !prompt.is_empty());
    if prompts.is_empty() {
        prompts.push(vec![base.tokenizer.eos_id()]);
    }
    let adapter = adapters::from_folder(adapter, base)?;
    let Difference { tokens, max, mean } = difference::measure(base, &adapter, &merged, &prompts, poll)?;
    stdout::line(format!(
        "Log-probs of {tokens} tokens that the adapter wrote: merged and adapter differ by {mean:.1e} on average, \
         {max:.1e} at most."
    ))
}

/// The recipe that an adapter was trained by, where it still lies in its run's folder.
fn recipe_of(adapter: &Path) -> Result<Option<Recipe>> {
    let run = adapter.parent().filter(|run| run.join(RECIPE).exists());
    run.map(|run| Recipe::load_run(run, &[])).transpose()
}

/// Writes the adapter with a model card that tells of its training.
fn to_peft(adapter: &AdapterFolder, training: Option<Training>, out: &Path) -> Result<()> {
    let folder = Folder::create_atomic(out)?;
    adapter.write(folder.path(), training)?;
    folder.finish()
}

fn dtype(name: ExportDtype) -> DType {
    match name {
        ExportDtype::Bf16 => DType::BF16,
        ExportDtype::F16 => DType::F16,
        ExportDtype::F32 => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{AdapterConfig, AdapterMatrix, adapter_config};
    use std::fs;

    const CONFIG: &str = r#"{"peft_type":"LORA","r":1,"lora_alpha":1,"target_modules":["x"],"revision":"0123abc"}"#;

    fn adapter_in(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(adapter_config::FILE), CONFIG).unwrap();
        let matrix = AdapterMatrix { module: "x".into(), a: vec![1.0], b: vec![2.0], r: 1, input: 1, output: 1 };
        let adapter = AdapterFolder { config: AdapterConfig::read(folder).unwrap(), matrices: vec![matrix] };
        adapter.write(folder, None).unwrap();
    }

    #[test]
    fn a_folder_goes_before_the_hub_where_no_revision_is_named() {
        let place = tempfile::tempdir().unwrap();
        adapter_in(place.path());
        let mut adapter = AdapterFolder::read(place.path()).unwrap();
        // tests run in the package's folder
        adapter.config.base_model_name_or_path = Some("assets/quickstart".into());
        let mut base = |revision: Option<&str>| {
            adapter.config.revision = revision.map(Into::into);
            base_of(&adapter, place.path()).unwrap()
        };
        assert_eq!(base(Some("main")), "assets/quickstart");
        assert_eq!(Path::new(&base(None)), std::env::current_dir().unwrap().join("assets/quickstart"));
    }

    #[test]
    fn an_adapter_is_written_once_and_under_the_base_that_is_named() {
        let place = tempfile::tempdir().unwrap();
        let (source, out) = (place.path().join("source"), place.path().join("out"));
        adapter_in(&source);
        let export = || {
            let (source, out, base) = (source.clone(), out.clone(), Some("owner/name".into()));
            run(ExportArgs { source, to: ExportTo::Peft, out, base, dtype: None })
        };
        export().unwrap();
        let read = AdapterFolder::read(&out).unwrap();
        assert_eq!(read.config.base_model_name_or_path.as_deref(), Some("owner/name"));
        assert_eq!(read.config.revision, None, "that of the base before");
        assert_eq!(read.matrices, AdapterFolder::read(&source).unwrap().matrices);
        assert_eq!(export().unwrap_err().exit_code(), 2);
    }
}
