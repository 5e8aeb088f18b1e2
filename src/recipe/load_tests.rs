//! Recipes read, resolved and written.

use std::path::PathBuf;

use super::super::schema::Kind;
use super::super::{Format, Loss, LrSchedule, Optimizer, Reference, TargetModules, Truncation};
use super::*;

/// A folder with a recipe of this text and rows `pairs.jsonl` beside it.
fn folder_with(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pairs.jsonl"), "").unwrap();
    let path = folder.path().join("my.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

const LEAST: &str = "model.base = \"owner/name\"\ndata.train = [\"pairs.jsonl\"]\n";

fn load(text: &str, set: &[&str]) -> Result<Recipe> {
    let (_folder, path) = folder_with(text);
    Recipe::load(&path, &set.iter().map(ToString::to_string).collect::<Vec<_>>())
}

/// The error of a bad recipe, without the folder.
fn error(text: &str, set: &[&str]) -> String {
    let error = load(text, set).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    message[message.find("my.toml").unwrap_or(0)..].to_string()
}

#[test]
fn the_least_recipe_gets_every_default() {
    let (folder, path) = folder_with(LEAST);
    let recipe = Recipe::load(&path, &[]).unwrap();
    let rows = folder.path().canonicalize().unwrap().join("pairs.jsonl");
    assert_eq!(recipe.model.base, "owner/name");
    assert_eq!(recipe.model.folder(), None);
    assert_eq!(recipe.model.revision, "main");
    let adapter = &recipe.adapter;
    assert_eq!((adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora), (16, 32.0, 0.0, false));
    assert_eq!(adapter.target_modules, TargetModules::Pattern("all-linear".into()));
    assert_eq!((&adapter.start_from, adapter.init_seed), (&None, 0));
    let data = &recipe.data;
    assert_eq!(data.train, [rows.to_str().unwrap()]);
    assert_eq!((data.eval.len(), data.eval_fraction, data.format), (0, 0.0, Format::Auto));
    assert_eq!((data.chat_template.as_str(), data.max_length), ("auto", 1024));
    assert_eq!((data.truncation, data.shuffle, data.limit), (Truncation::Refuse, true, 0));
    let objective = &recipe.objective;
    assert_eq!((objective.loss, objective.beta, objective.label_smoothing), (Loss::Sigmoid, 0.1, 0.0));
    assert_eq!(objective.reference, Reference::Start);
    let train = &recipe.train;
    assert_eq!((train.epochs, train.max_steps, train.batch_size, train.learning_rate), (1.0, 0, 16, 5e-6));
    assert_eq!((train.lr_schedule, train.warmup_steps, train.optimizer), (LrSchedule::Linear, 0, Optimizer::Adamw));
    assert_eq!((train.adam_betas, train.weight_decay, train.max_grad_norm), ([0.9, 0.999], 0.0, 1.0));
    assert_eq!((train.seed, train.eval_every, train.save_every, train.keep_checkpoints), (0, 0, 0, 2));
    assert!(recipe.memory.reference_cache);
    let samples = &recipe.samples;
    assert_eq!((samples.prompts.len(), samples.count, samples.max_new_tokens), (0, 8, 48));
    assert_eq!((samples.temperature, &samples.labels), (1.0, &None));
    assert_eq!(recipe.run.output, PathBuf::from("runs/my"));
    assert_eq!((recipe.run.device.as_str(), recipe.run.threads), ("auto", 0));
}

#[test]
fn a_resolved_recipe_names_every_key_and_loads_again() {
    let text = format!(
        "{LEAST}[adapter]\ntarget_modules = ['q_proj']\nr = 4\n[objective]\nloss = 'ipo_sum'\nbeta = 1\n\
         [train]\nlearning_rate = 3e-7\n[samples]\nprompts = ['a\\b', \"\\n\\nHuman: \"]\n"
    );
    let (folder, path) = folder_with(&text);
    let recipe = Recipe::load(&path, &[]).unwrap();
    let resolved = recipe.to_toml();
    let table: Table = resolved.parse().unwrap();
    let written: Vec<_> =
        table.iter().flat_map(|(s, keys)| keys.as_table().unwrap().keys().map(move |k| format!("{s}.{k}"))).collect();
    assert_eq!(written.len(), KEYS.len());
    assert!(KEYS.iter().all(|key| written.contains(&key.path())));

    let run = folder.path().join("elsewhere/run");
    std::fs::create_dir_all(&run).unwrap();
    std::fs::write(run.join(RESOLVED), resolved).unwrap();
    assert_eq!(Recipe::load(&run.join(RESOLVED), &[]).unwrap(), recipe);
    std::fs::remove_file(folder.path().join("pairs.jsonl")).unwrap();
    assert_eq!(Recipe::load_run(&run, &[]).unwrap(), recipe);
    assert!(Recipe::load(&run.join(RESOLVED), &[]).is_err());
}

#[test]
fn every_choice_of_the_schema_is_one_of_the_types() {
    for key in KEYS {
        let Kind::Choice(names) = key.kind else { continue };
        for name in names {
            load(LEAST, &[&format!("{}={name}", key.path())]).unwrap();
        }
    }
}

#[test]
fn set_wins_over_the_file_even_where_the_file_is_wrong() {
    let text = format!("{LEAST}train.seed = 1\ntrain.batch_size = 0\n");
    let set = ["train.batch_size=4", "train.seed=2", "train.seed=3", "run.device=cpu", "model.revision=12345e7"];
    let recipe = load(&text, &set).unwrap();
    assert_eq!((recipe.train.batch_size, recipe.train.seed), (4, 3));
    assert_eq!((recipe.run.device.as_str(), recipe.model.revision.as_str()), ("cpu", "12345e7"));
    let recipe = load(LEAST, &[r#"samples.prompts=["a", "b"]"#, "adapter.start_from=", "run.output=2026"]).unwrap();
    assert_eq!(recipe.samples.prompts, ["a", "b"]);
    assert_eq!((recipe.adapter.start_from, recipe.run.output), (None, PathBuf::from("2026")));
}

#[test]
fn paths_of_set_start_at_the_current_folder() {
    // Tests run in the package's folder.
    let recipe = load(LEAST, &["data.train=[\"Cargo.toml\"]", "model.base=src"]).unwrap();
    let here = std::env::current_dir().unwrap().canonicalize().unwrap();
    assert_eq!(recipe.data.train, [here.join("Cargo.toml").to_str().unwrap()]);
    assert_eq!(recipe.model.folder(), Some(here.join("src").as_path()));
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(
        error("[data]\ntrain = ['pairs.jsonl']", &[]),
        "my.toml:1: `model.base` is missing; expected a model folder, a `.gguf` file, or a hub id like `owner/name`"
    );
    assert!(error("model.base = 'a/b'\n\n[data]\n", &[]).starts_with("my.toml:3: `data.train` is missing"));
    let text = "model.base = 'a/b'\ndata.train = [\n  'pairs.jsonl',\n  'pears.jsonl',\n]\n";
    let message = error(text, &[]);
    assert!(message.starts_with("my.toml:4: `data.train`: there is no file "), "{message}");
    assert!(message.ends_with("pears.jsonl; did you mean `pairs.jsonl`?"), "{message}");
}

#[test]
fn the_first_error_of_the_file_is_reported() {
    let text = "[train]\nsedd = 1\n[adapter]\nrr = 2\n";
    assert_eq!(error(text, &[]), "my.toml:2: unknown key `train.sedd`; did you mean `seed`?");
}

#[test]
fn impossible_combinations_name_the_key_that_clashes() {
    for (set, start) in [
        (&["objective.loss=hinge", "objective.label_smoothing=0.1"][..], "`objective.label_smoothing` has no meaning"),
        (&["objective.loss=ipo", "objective.label_smoothing=0.1"], "`objective.label_smoothing` has no meaning"),
        (&["data.eval=[\"Cargo.toml\"]", "data.eval_fraction=0.1"], "`data.eval_fraction` and `data.eval`"),
        (&["train.eval_every=5"], "`train.eval_every` has no rows"),
        (&["train.max_steps=5", "train.warmup_steps=6"], "`train.warmup_steps` is 6, more than the 5"),
        (&["train.optimizer=rmsprop", "train.adam_betas=[0.9,0.95]"], "`train.adam_betas` has no meaning"),
        (&["train.save_every=5", "train.keep_checkpoints=0"], "`train.keep_checkpoints` is 0"),
        (&["adapter.start_from=src", "adapter.init_seed=1"], "`adapter.init_seed` has no meaning"),
        (&["model.base=src", "model.revision=v2"], "`model.revision` has no meaning"),
        (&["samples.labels=Cargo.toml"], "`samples.labels` has no samples"),
    ] {
        let message = error(LEAST, set);
        let key = start.split('`').nth(1).unwrap();
        let place = set.iter().find(|set| set.split_once('=').unwrap().0 == key).unwrap();
        assert!(message.starts_with(&format!("--set {place}: {start}")), "{message}");
    }
    for fine in [
        &["objective.loss=robust", "objective.label_smoothing=0.1"][..],
        &["train.max_steps=5", "train.warmup_steps=5"],
        &["train.warmup_steps=50"],
        &["train.optimizer=rmsprop"],
        &["train.eval_every=5", "data.eval_fraction=0.1"],
    ] {
        load(LEAST, fine).unwrap();
    }
}

#[test]
fn the_recipes_that_come_with_it_are_right() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    for entry in recipes.read_dir().unwrap() {
        read(&entry.unwrap().path(), &[], false).unwrap();
    }
    let hh = read(&recipes.join("hh.toml"), &[], false).unwrap();
    assert_eq!(hh.model.base, "HuggingFaceTB/SmolLM2-135M-Instruct");
    assert_eq!(hh.data.train, ["hf://datasets/Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"]);
    let quickstart = read(&recipes.join("quickstart.toml"), &[], false).unwrap();
    let assets = recipes.canonicalize().unwrap().parent().unwrap().join("assets/quickstart");
    assert_eq!(quickstart.model.folder(), Some(assets.join("base").as_path()));
    assert_eq!(quickstart.samples.labels, Some(assets.join("labels.json")));
}

/// A key's row in the reference table: default, what is expected, other programs' names.
#[test]
fn the_reference_table_says_what_the_schema_says() {
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes.md")).unwrap();
    for key in KEYS {
        let default = match key.absent {
            Absent::Required => "required".to_string(),
            Absent::Default(text) => format!("`{text}`"),
            Absent::RunsAndStem => "`\"runs/<recipe>\"`".to_string(),
        };
        let row = format!("| `{}` | {default} | {} |", key.path(), key.kind.expected());
        assert!(docs.contains(&row), "docs/recipes.md lacks a row that starts\n{row}");
    }
}
