//! `inspect`: what a folder is: a model, an adapter, a checkpoint or a run.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::args::InspectArgs;
use super::stdout;
use crate::export::targets::last_part;
use crate::export::{AdapterFolder, adapter_config};
use crate::model::{Config, Rope, RopeScaling};
use crate::outside;
use crate::recipe::Recipe;
use crate::report::units;
use crate::store::{self, MANIFEST};
use crate::train::checkpoint;
use crate::train::folder::{ADAPTER, METRICS, RECIPE};
use crate::weights::ModelFolder;
use crate::{Error, Result};

/// What is told of a metrics row, by the end of its name.
const TOLD: [&str; 6] = ["step", "epoch", "loss", "rewards/accuracies", "rewards/margins", "learning_rate"];

/// What is found out, in the order in which it is told.
type Facts = Map<String, Value>;

/// Runs the command.
///
/// # Errors
/// [`Error::Input`] where the folder is none of these, or is broken.
pub fn run(args: InspectArgs) -> Result<()> {
    let facts = describe(&args.path)?;
    if args.json { stdout::json(&facts) } else { stdout::write(text(&facts).as_bytes()) }
}

fn describe(path: &Path) -> Result<Facts> {
    let holds = |name: &str| path.join(name).exists();
    let (kind, facts) = if holds(RECIPE) {
        ("run", run_folder(path)?)
    } else if holds(checkpoint::STATE) {
        ("checkpoint", checkpoint_folder(path)?)
    } else if holds(adapter_config::FILE) {
        ("adapter", adapter(path)?)
    } else if holds("config.json") || !path.is_dir() {
        // What is no folder is told what a model should be.
        ("model", model(path)?)
    } else {
        return Err(Error::input(format!(
            "{}: neither a run ({RECIPE}) nor an adapter ({}) nor a model (config.json)",
            path.display(),
            adapter_config::FILE
        )));
    };
    let mut all = facts_of([("kind", json!(kind)), ("path", json!(path.display().to_string()))]);
    all.extend(facts);
    Ok(all)
}

fn model(path: &Path) -> Result<Facts> {
    let folder = ModelFolder::open(path)?;
    let config = Config::read(path)?;
    let (mut parameters, mut dtypes) = (0u64, BTreeMap::<String, u64>::new());
    for info in folder.names().filter_map(|name| folder.info(name)) {
        parameters += info.shape.iter().product::<usize>() as u64;
        *dtypes.entry(info.format).or_default() += 1;
    }
    let rope = |rope: &Rope| {
        let scaling = match rope.scaling {
            RopeScaling::None => "none",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Long { .. } => "longrope",
        };
        json!({"theta": rope.theta, "scaling": scaling, "coordinates": rope.dim})
    };
    let ropes: Vec<Value> = config.ropes.iter().map(rope).collect();
    Ok(facts_of([
        ("family", json!(config.family.model_type)),
        ("layers", json!(config.num_hidden_layers)),
        ("hidden_size", json!(config.hidden_size)),
        ("intermediate_size", json!(config.intermediate_size)),
        ("heads", json!(config.num_attention_heads)),
        ("key_value_heads", json!(config.num_key_value_heads)),
        ("head_dim", json!(config.head_dim)),
        ("vocabulary", json!(config.vocab_size)),
        ("head", json!(if config.tie_word_embeddings { "the embedding" } else { "its own" })),
        ("longest_text", json!(config.max_position_embeddings)),
        // the second is that of the layers with a window
        ("rope", if let [one] = &ropes[..] { one.clone() } else { json!(ropes) }),
        ("sliding_window", json!(config.sliding_window())),
        ("parameters", json!(parameters)),
        ("tensors", json!(dtypes)),
        ("bytes", json!(folder.total_bytes())),
    ]))
}

fn adapter(path: &Path) -> Result<Facts> {
    let adapter = AdapterFolder::read(path)?;
    let mut modules = BTreeMap::<&str, u64>::new();
    for matrix in &adapter.matrices {
        *modules.entry(last_part(&matrix.module)).or_default() += 1;
    }
    let config = &adapter.config;
    let mut facts = facts_of([
        ("base", json!(config.base_model_name_or_path)),
        ("r", json!(config.r)),
        ("lora_alpha", json!(config.lora_alpha)),
        ("use_rslora", json!(config.use_rslora)),
        ("modules", json!(modules)),
        ("parameters", json!(adapter.matrices.iter().map(|m| m.a.len() + m.b.len()).sum::<usize>())),
    ]);
    if path.join(MANIFEST).exists() {
        let files = store::verify(path).map_or_else(|e| e.to_string(), |()| "as they were written".into());
        facts.insert("files".into(), json!(files));
    }
    Ok(facts)
}

fn checkpoint_folder(path: &Path) -> Result<Facts> {
    let state = checkpoint::open(path)?;
    let mut facts = facts_of([("step", json!(state.step)), ("epoch", json!(state.epoch))]);
    facts.extend(adapter(path)?);
    Ok(facts)
}

fn run_folder(path: &Path) -> Result<Facts> {
    let recipe = Recipe::load_run(path, &[])?;
    let (last_step, last_eval) = last_rows(&path.join(METRICS))?;
    let finished = path.join(ADAPTER).join(adapter_config::FILE).exists();
    Ok(facts_of([
        ("base", json!(recipe.model.base)),
        ("r", json!(recipe.adapter.r)),
        ("loss", json!(recipe.objective.loss)),
        ("beta", json!(recipe.objective.beta)),
        ("batch_size", json!(recipe.train.batch_size)),
        ("learning_rate", json!(recipe.train.learning_rate)),
        ("last_step", last_step),
        ("last_eval", last_eval),
        ("checkpoints", json!(checkpoint::steps_of(path)?)),
        ("finished", json!(finished)),
    ]))
}

/// What is told of the last training row and of the last evaluation row; null where there is none.
fn last_rows(path: &Path) -> Result<(Value, Value)> {
    let mut last = (Value::Null, Value::Null);
    if !path.exists() {
        return Ok(last);
    }
    let file = BufReader::new(outside::open(path)?.0);
    for line in file.lines() {
        let line = line.map_err(|e| Error::reading(path, e))?;
        // A line that a dead process left half-written is none.
        let Ok(Value::Object(row)) = serde_json::from_str(&line) else { continue };
        let eval = row.contains_key("eval_loss");
        let told = |name: &str| TOLD.contains(&name.strip_prefix("eval_").unwrap_or(name));
        let row: Facts = row.into_iter().filter(|(name, _)| told(name)).collect();
        *(if eval { &mut last.1 } else { &mut last.0 }) = Value::Object(row);
    }
    Ok(last)
}

fn facts_of<const N: usize>(facts: [(&str, Value); N]) -> Facts {
    facts.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.to_string(), value)).collect()
}

/// One fact a line, the values in a column.
fn text(facts: &Facts) -> String {
    let width = facts.keys().map(String::len).max().unwrap_or(0);
    let line = |(name, value): (&String, &Value)| {
        let shown = match (name.as_str(), value.as_u64()) {
            ("bytes", Some(bytes)) => units::bytes(bytes),
            ("parameters", Some(count @ 1_000_000..)) => format!("{:.2} million", count as f64 / 1e6),
            _ => shown(value),
        };
        format!("{:width$}  {shown}\n", name.replace('_', " "))
    };
    facts.iter().map(line).collect()
}

fn shown(value: &Value) -> String {
    let joined = |parts: Vec<String>| if parts.is_empty() { "none".into() } else { parts.join(", ") };
    match value {
        // Names come from files of others: nothing in them may steer the terminal.
        Value::String(text) => text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::Array(list) => joined(list.iter().map(shown).collect()),
        Value::Object(map) => joined(map.iter().map(|(name, value)| format!("{name} {}", shown(value))).collect()),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_nothing_and_a_missing_one_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(describe(folder.path()).unwrap_err().to_string().contains("neither a run"));
        let missing = describe(&folder.path().join("x")).unwrap_err();
        assert!(missing.to_string().contains("no such folder") && missing.exit_code() == 3);
    }

    #[test]
    fn the_last_rows_are_told_whatever_stands_between() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS);
        let rows = [
            r#"{"step":1,"loss":0.69,"seconds":1}"#,
            r#"{"step":1,"eval_loss":0.7,"eval_rewards/accuracies":0.5}"#,
            r#"{"step":2,"loss":0.6,"rewards/margins":0.2}"#,
            r#"{"step":3,"lo"#,
        ];
        std::fs::write(&path, rows.join("\n")).unwrap();
        let (step, eval) = last_rows(&path).unwrap();
        assert_eq!(step, json!({"step": 2, "loss": 0.6, "rewards/margins": 0.2}));
        assert_eq!(eval, json!({"step": 1, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5}));
    }

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        let facts = facts_of([("base", json!("a\u{1b}[2Jb")), ("use_rslora", json!(true)), ("bytes", json!(3 << 20))]);
        assert_eq!(text(&facts), "base        a\u{fffd}[2Jb\nuse rslora  yes\nbytes       3.0 MiB\n");
    }
}
