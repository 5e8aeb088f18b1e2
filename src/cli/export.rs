//! `export`: a PEFT adapter or a merged model.

use super::{
    args::{ExportArgs, ExportDtype, ExportTo},
    stdout,
};
use crate::{
    Error, Result,
    export::{AdapterFolder, merge, source},
    train::{adapters, base::Base, device, difference},
    weights::DType,
};

/// Runs the command.
pub fn run(args: ExportArgs) -> Result<()> {
    match args.to {
        ExportTo::Peft => {
            source::to_peft(&args.source, &args.out, args.base.as_deref())?;
            stdout::line(format!("PEFT adapter in {}", args.out.display()))
        }
        ExportTo::Merged => merged(&args),
    }
}

/// Merges, then opens what was written and says how far it is from base and adapter.
fn merged(args: &ExportArgs) -> Result<()> {
    let path = source::adapter_of(&args.source)?;
    let folder = AdapterFolder::read(&path)?;
    let named = args.base.clone().or_else(|| folder.config.base_model_name_or_path.clone());
    let name = named.ok_or_else(|| Error::recipe(format!("{}: names no base; add --base MODEL", path.display())))?;
    let revision = folder.config.revision.as_deref().unwrap_or("main");
    let device = device::choose("cpu")?;
    let base = Base::open(&name, revision, &device)?;
    merge(&base.folder, &folder, &args.out, args.dtype.map(DType::from))?;

    let adapter = adapters::from_folder(&folder, &base)?;
    let written = Base::open(&args.out.display().to_string(), "main", &device)?;
    let prompts = source::recipe_of(&path).map(|recipe| recipe.samples.prompts).unwrap_or_default();
    let mut prompts = prompts.iter().map(|prompt| base.tokenizer.encode(prompt, true)).collect::<Result<Vec<_>>>()?;
    prompts.retain(|prompt| !prompt.is_empty());
    if prompts.is_empty() {
        prompts.push(vec![base.tokenizer.eos_id()]);
    }
    let difference::Difference { tokens, max, mean } = difference::measure(&base, &adapter, &written, &prompts)?;
    stdout::line(format!(
        "Merged model in {}\nLog-probs of {tokens} tokens that the adapter wrote: merged and adapter differ by {mean:.1e} on \
         average, {max:.1e} at most.",
        args.out.display()
    ))
}

impl From<ExportDtype> for DType {
    fn from(dtype: ExportDtype) -> Self {
        match dtype {
            ExportDtype::Bf16 => Self::BF16,
            ExportDtype::F16 => Self::F16,
            ExportDtype::F32 => Self::F32,
        }
    }
}
