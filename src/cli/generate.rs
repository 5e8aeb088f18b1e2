//! `generate`: text from a model, and from an adapter beside it.

use std::{fs, path::Path};

use serde::Serialize;

use super::{args::GenerateArgs, stdout};
use crate::{
    Error, Result,
    data::{ChatTemplate, Extras, Message},
    engine::generate::{Sampling, generate},
    export::AdapterFolder,
    model::linear::Through,
    report::Progress,
    train::{
        adapters,
        base::Base,
        device::{self, Compute},
        samples::AT_ONCE,
    },
};

/// One sample, as `--json` prints it.
#[derive(Serialize)]
struct Written<'a> {
    prompt: &'a str,
    model: &'a str,
    text: String,
}

/// Runs the command.
pub fn run(args: GenerateArgs) -> Result<()> {
    device::use_threads(args.threads.into());
    let adapter = args.adapter.as_deref().map(AdapterFolder::read).transpose()?;
    // an adapter of this model says which revision it was made on
    let made_on = adapter.as_ref().map(|adapter| &adapter.config);
    let made_on = made_on.filter(|made_on| made_on.base_model_name_or_path.as_deref() == Some(&args.model));
    let revision = args.revision.as_deref().or_else(|| made_on?.revision.as_deref()).unwrap_or("main");
    let device = device::choose(&args.device, &Progress::stderr())?;
    let base = Base::open(&args.model, revision, &device, Compute::F32)?;
    let adapter = adapter.as_ref().map(|adapter| adapters::from_folder(adapter, &base)).transpose()?;
    let prompts = match &args.prompts {
        Some(path) => lines(path)?,
        None => args.prompt.clone(),
    };
    let tuned = Through::of(adapter.as_ref());
    let models = match (adapter.is_some(), args.compare) {
        (true, true) => vec![("base", Through::default()), ("adapter", tuned)],
        (true, false) => vec![("adapter", tuned)],
        (false, _) => vec![("base", tuned)],
    };
    for (number, prompt) in prompts.iter().enumerate() {
        let ids = ids(&base, prompt, args.chat)?;
        base.check_room(ids.len(), args.max_new_tokens)?;
        for (model, through) in &models {
            for first in (0..args.count).step_by(AT_ONCE) {
                if !stdout::is_read() {
                    return Ok(());
                }
                let sampling = Sampling {
                    per_prompt: AT_ONCE.min(args.count - first),
                    max_new_tokens: args.max_new_tokens,
                    temperature: args.temperature,
                    first,
                    seed: args.seed.wrapping_add(number.wrapping_mul(args.count) as u64),
                    stop: base.tokenizer.stop_ids().to_vec(),
                };
                for answer in generate(&base.model, &[&ids], *through, &sampling, &|| Ok(()))? {
                    let text = base.tokenizer.decode_after(&ids, &answer)?;
                    match args.json {
                        true => stdout::json(&Written { prompt, model, text })?,
                        false if args.compare => stdout::line(format!("[{model}] {prompt}{text}\n"))?,
                        false => stdout::line(format!("{prompt}{text}\n"))?,
                    }
                }
            }
        }
    }
    Ok(())
}

fn ids(base: &Base, prompt: &str, chat: bool) -> Result<Vec<u32>> {
    let ids = if chat {
        let template = ChatTemplate::choose("auto", &base.tokenizer)?.ok_or_else(|| {
            Error::recipe(format!("--chat: {} brings no chat template; leave --chat away", base.path.display()))
        })?;
        let message = Message::from_iter([("role".into(), "user".into()), ("content".into(), prompt.into())]);
        base.tokenizer.encode(&template.render(&[message], &Extras::default(), true)?, false)?
    } else {
        base.tokenizer.encode(prompt, true)?
    };
    match ids.is_empty() {
        true => Err(Error::recipe("a prompt without a token has nothing to go on from")),
        false => Ok(ids),
    }
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).map_err(|error| Error::reading(path, error))?;
    let prompts: Vec<String> = text.lines().filter(|line| !line.is_empty()).map(str::to_string).collect();
    match prompts.is_empty() {
        true => Err(Error::input(format!("{}: holds no prompt; write one a line", path.display()))),
        false => Ok(prompts),
    }
}
