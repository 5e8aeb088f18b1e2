//! Runs end to end through the binary, on a tiny model: what a run leaves behind, and what must not change it.

#[path = "support/tiny.rs"]
mod tiny;

use std::f64::consts::LN_2;
use std::fs;

use serde_json::Value;
use tiny::{RECIPE, Tiny, arguments, rows, stderr};

/// Names of a step's row, in order: TRL's, with what is ours at both ends.
const STEP_NAMES: [&str; 19] = [
    "step",
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "tokens",
    "seconds",
    "peak_bytes",
];

fn number(row: &Value, name: &str) -> f64 {
    row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"))
}

#[test]
fn a_run_leaves_its_folder_complete() {
    let tiny = Tiny::new();
    tiny.write("held-out.jsonl", rows(10));
    let set = [
        "data.eval=[\"held-out.jsonl\"]",
        "train.eval_every=5",
        "train.save_every=5",
        "train.epochs=2",
        "samples.prompts=[\"1: what\"]",
    ];
    let output = tiny.run(&arguments("a", &set, &[]));
    let (said, summary) = (stderr(&output), String::from_utf8(output.stdout).unwrap());
    assert!(output.status.success(), "{said}");

    let steps = tiny.rows_of("a", false);
    let checkpoints = ["checkpoint-10", "checkpoint-12"];
    let files = ["metrics.jsonl", "recipe.toml", "reference.cache", "report.html", "summary.json"];
    assert_eq!(tiny.names("runs/a"), [&[".lock", "adapter"], &checkpoints[..], &files].concat());
    assert_eq!(tiny.names("runs"), ["a"]);
    let adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"];
    assert_eq!(tiny.names("runs/a/adapter"), adapter);
    let mut checkpoint = [&adapter[..], &["optimizer.safetensors", "state.json"]].concat();
    checkpoint.sort();
    assert_eq!(tiny.names("runs/a/checkpoint-12"), checkpoint);
    // The last checkpoint is the final adapter.
    assert_eq!(tiny.digest("runs/a/checkpoint-12/adapter_model.safetensors"), tiny.adapter("a"));

    assert_eq!(steps.len(), 12);
    for (at, row) in steps.iter().enumerate() {
        let names: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, STEP_NAMES);
        assert_eq!(row["step"], at + 1);
    }
    assert_eq!(number(&steps[11], "epoch"), 2.0);
    let evaluated: Vec<u64> = tiny.rows_of("a", true).iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(evaluated, [0, 5, 10, 12]);
    let evaluation = &tiny.rows_of("a", true)[0];
    for name in &STEP_NAMES[2..13] {
        number(evaluation, &format!("eval_{name}"));
    }

    let report = tiny.read("runs/a/report.html");
    assert!(report.contains("<svg") && report.contains("1: what"), "{report}");

    // Results on stdout, all else on stderr.
    for part in ["Trained ", "Held out", "runs/a/adapter", "runs/a/report.html", "Next: dpo-lora export runs/a"] {
        assert!(summary.contains(part), "{part} is not in {summary}");
    }
    for part in [
        "train rows: 24 rows read, 24 used",
        "eval rows: 10 rows read",
        "the reference is the bare base",
        "training",
        "evaluation",
        "sampling",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!summary.contains("evaluation") && !said.contains("Next:"));
}

#[test]
fn the_first_step_has_margin_0_and_loss_ln_2_and_the_loss_falls() {
    let tiny = Tiny::new();
    tiny.train("a", &["data.eval_fraction=0.25"]);
    let (steps, evaluations) = (tiny.rows_of("a", false), tiny.rows_of("a", true));
    assert_eq!((number(&steps[0], "rewards/margins"), number(&steps[0], "loss")), (0.0, LN_2));
    assert_eq!(number(&steps[0], "rewards/accuracies"), 0.5);
    assert_eq!(number(&evaluations[0], "eval_rewards/margins"), 0.0);
    assert_eq!(number(&evaluations[0], "eval_rewards/accuracies"), 0.5);
    let after = evaluations.last().unwrap();
    assert!(number(after, "eval_loss") < 0.6 && number(after, "eval_rewards/accuracies") > 0.7, "{after}");
}

#[test]
fn the_resolved_recipe_is_the_run_and_runs_and_threads_change_nothing() {
    let tiny = Tiny::new();
    tiny.train("a", &["data.eval_fraction=0.25", "run.threads=1"]);
    tiny.train("b", &["data.eval_fraction=0.25", "run.threads=2"]);
    tiny.ok(&["train", "runs/a/recipe.toml", "--output", "runs/c", "--set", "run.threads=0"]);
    for run in ["b", "c"] {
        assert_eq!(tiny.adapter(run), tiny.adapter("a"), "{run}");
        assert_eq!(tiny.timeless_metrics(run), tiny.timeless_metrics("a"), "{run}");
    }
    let resolved = tiny.read("runs/a/recipe.toml");
    for line in ["weight_decay = 0.0", "chat_template = \"auto\"", "r = 4"] {
        assert!(resolved.contains(line), "{line} is not in {resolved}");
    }
}

#[test]
fn the_summary_as_json_is_one_object() {
    let tiny = Tiny::new();
    let text = tiny.ok(&arguments("a", &["data.eval_fraction=0.25"], &["--json", "--max-steps", "3"]));
    assert_eq!(text.lines().count(), 1, "{text}");
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&summary["steps"], &summary["pairs"]), (&Value::from(3), &Value::from(12)));
    assert_eq!(summary["before"]["accuracy"], 0.5);
    let after = tiny.rows_of("a", true).pop().unwrap();
    assert_eq!(summary["after"]["loss"], after["eval_loss"]);
    let made: Vec<&str> =
        summary["files"].as_array().unwrap().iter().map(|made| made["path"].as_str().unwrap()).collect();
    assert_eq!(made, ["runs/a/adapter", "runs/a/metrics.jsonl", "runs/a/report.html"]);
    assert!(made.iter().all(|path| tiny.path(path).exists()));
}

#[test]
fn an_earlier_run_is_moved_aside() {
    let tiny = Tiny::new();
    let one = ["train.max_steps=1"];
    tiny.train("a", &one);
    let first = tiny.adapter("a");
    let said = tiny.train("a", &["train.max_steps=2"]);
    assert!(said.contains("runs/a holds an earlier run; it is runs/a.1 now"), "{said}");
    tiny.train("a", &one);
    assert_eq!(tiny.names("runs"), ["a", "a.1", "a.2"]);
    assert_eq!((tiny.adapter("a.1"), tiny.adapter("a")), (first.clone(), first));
    assert_eq!(tiny.rows_of("a.2", false).len(), 2);

    fs::create_dir(tiny.path("runs/notes")).unwrap();
    tiny.write("runs/notes/mine.txt", "mine");
    let output = tiny.run(&arguments("notes", &[], &[]));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("runs/notes holds something else than a run"), "{}", stderr(&output));
    assert_eq!(tiny.names("runs/notes"), ["mine.txt"]);
    // a project with a recipe of its own is no run
    tiny.write("runs/notes/recipe.toml", RECIPE);
    let output = tiny.run(&arguments("notes", &[], &[]));
    assert!(stderr(&output).contains("runs/notes holds something else than a run"), "{}", stderr(&output));
    assert_eq!(tiny.names("runs/notes"), ["mine.txt", "recipe.toml"]);
}

/// A run that is refused for want of room has not touched the one before.
#[test]
fn without_room_no_earlier_run_is_moved_aside() {
    let tiny = Tiny::new();
    tiny.train("a", &["train.max_steps=1"]);
    let before = tiny.names("runs/a");
    let much = ["train.max_steps=1000000000", "train.save_every=1", "train.keep_checkpoints=1000000000"];
    for name in ["a", "new"] {
        let output = tiny.run(&arguments(name, &much, &[]));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(&format!("runs/{name}: the run needs ")) && said.contains("keep fewer"), "{said}");
    }
    assert_eq!((tiny.names("runs"), tiny.names("runs/a")), (vec!["a".to_string()], before));
}

#[test]
fn what_a_run_reads_is_not_moved_aside_by_it() {
    let tiny = Tiny::new();
    let one = ["train.max_steps=1"];
    tiny.train("a", &one);
    let before = tiny.names("runs/a");
    tiny.ok(&["export", "runs/a", "--to", "merged", "runs/a/merged"]);
    tiny.write("runs/a/mine.jsonl", rows(4));
    tiny.write("runs/a/labels.json", r#"{"positive": ["good"], "negative": ["bad"]}"#);
    tiny.write("runs/a/mine.jinja", tiny.bytes("base/chat_template.jinja"));
    for (key, name) in [
        ("model.base", "merged"),
        ("adapter.start_from", "adapter"),
        ("data.train", "mine.jsonl"),
        ("data.eval", "mine.jsonl"),
        ("data.chat_template", "mine.jinja"),
        ("samples.labels", "labels.json"),
    ] {
        let path = tiny.path("runs/a").join(name);
        let value = if key.starts_with("data.t") || key.starts_with("data.e") {
            format!("[\"{}\"]", path.display())
        } else {
            path.display().to_string()
        };
        let set = [format!("{key}={value}"), "adapter.r=16".into(), "adapter.lora_alpha=32".into()];
        let set = [&set[..], &["samples.prompts=[\"1: what\"]".into()]].concat();
        let output = tiny.run(&arguments("a", &set.iter().map(String::as_str).collect::<Vec<_>>(), &[]));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{key}: {said}");
        assert!(said.contains(&format!("/{name} lies in it; name another folder")), "{key}: {said}");
    }
    assert_eq!(tiny.names("runs"), ["a"]);
    assert!(before.iter().all(|name| tiny.path("runs/a").join(name).exists()));
    // its own recipe is read before it moves
    tiny.ok(&["train", "runs/a/recipe.toml"]);
    assert_eq!(tiny.names("runs"), ["a", "a.1"]);
}

#[test]
fn a_warm_up_that_outlasts_the_run_is_said() {
    let tiny = Tiny::new();
    let warning = "the learning rate never reaches its peak";
    assert!(tiny.train("a", &["train.warmup_steps=6"]).contains(warning));
    assert!(!tiny.train("b", &["train.warmup_steps=5"]).contains(warning));
}

#[test]
fn the_reference_cache_spares_work_and_changes_nothing() {
    let tiny = Tiny::new();
    let set = ["data.eval_fraction=0.25", "train.save_every=1", "train.keep_checkpoints=9"];
    tiny.train("a", &set);
    let (cache, adapter, metrics) =
        (tiny.digest("runs/a/reference.cache"), tiny.adapter("a"), tiny.timeless_metrics("a"));

    // Gone on with from its first step, the run finds every row in the cache and writes none.
    tiny.ok(&arguments("a", &set, &["--resume", "runs/a/checkpoint-1"]));
    assert_eq!((tiny.digest("runs/a/reference.cache"), tiny.adapter("a")), (cache.clone(), adapter.clone()));
    assert_eq!(tiny.timeless_metrics("a"), metrics);

    // Without the file it is made again, less the rows of the steps that are over.
    fs::remove_file(tiny.path("runs/a/reference.cache")).unwrap();
    tiny.ok(&arguments("a", &set, &["--resume", "runs/a/checkpoint-1"]));
    assert!(tiny.path("runs/a/reference.cache").exists());
    assert_eq!((tiny.adapter("a"), tiny.timeless_metrics("a")), (adapter.clone(), metrics.clone()));

    tiny.train("b", &[&set[..], &["memory.reference_cache=false"]].concat());
    assert!(!tiny.path("runs/b/reference.cache").exists());
    assert_eq!((tiny.adapter("b"), tiny.timeless_metrics("b")), (adapter, metrics));
}

#[test]
fn rows_that_stand_twice_are_held_to_the_same_reference() {
    let tiny = Tiny::new();
    // Most batches hold rows that an earlier one, or the first evaluation, brought into the cache, and rows that are
    // new.
    tiny.write("rows.jsonl", rows(9) + &rows(14));
    let set = ["data.eval_fraction=0.2", "train.epochs=2", "train.eval_every=1"];
    tiny.train("a", &set);
    tiny.train("b", &[&set[..], &["memory.reference_cache=false"]].concat());
    assert_eq!(number(&tiny.rows_of("a", false)[0], "rewards/margins"), 0.0);
    assert_eq!((tiny.adapter("a"), tiny.timeless_metrics("a")), (tiny.adapter("b"), tiny.timeless_metrics("b")));
}

#[test]
fn steps_are_counted_by_rows_epochs_and_limits() {
    let tiny = Tiny::new();
    let cases: [(&[&str], usize, f64); 6] = [
        (&[], 6, 1.0),
        (&["train.batch_size=5"], 5, 1.0),
        (&["train.epochs=1.4"], 9, 1.5),
        (&["train.max_steps=8", "train.epochs=0.5"], 8, 8.0 / 6.0),
        (&["data.limit=6"], 2, 1.0),
        (&["data.limit=6", "train.epochs=0.1"], 1, 0.5),
    ];
    for (number_of, (set, steps, epoch)) in cases.into_iter().enumerate() {
        let name = number_of.to_string();
        tiny.train(&name, set);
        let rows = tiny.rows_of(&name, false);
        assert_eq!((rows.len(), number(&rows[steps - 1], "epoch")), (steps, epoch), "{set:?}");
    }
    // A linear rate falls from the first step on and would be 0 one step after the last.
    let rates: Vec<f64> = tiny.rows_of("0", false).iter().map(|row| number(row, "learning_rate")).collect();
    assert_eq!((rates[0], rates.len()), (1e-2, 6));
    assert!(rates.windows(2).all(|pair| pair[1] < pair[0]) && rates[5] > 0.0, "{rates:?}");
    // 24 rows in fives: the last step of the epoch has four.
    let tokens: Vec<u64> = tiny.rows_of("1", false).iter().map(|row| row["tokens"].as_u64().unwrap()).collect();
    assert!(tokens[4] < tokens[..4].iter().sum::<u64>() / 4, "{tokens:?}");
}

#[test]
fn every_loss_starts_where_it_should_and_falls() {
    let tiny = Tiny::new();
    let cases: [(&[&str], f64); 7] = [
        (&["objective.loss=sigmoid"], LN_2),
        (&["objective.loss=sigmoid", "objective.label_smoothing=0.1"], LN_2),
        (&["objective.loss=robust", "objective.label_smoothing=0.1"], LN_2),
        (&["objective.loss=hinge"], 1.0),
        // (0 − 1 / 2β)²
        (&["objective.loss=ipo"], 25.0),
        (&["objective.loss=ipo_sum"], 25.0),
        (&["objective.beta=0.5"], LN_2),
    ];
    let mut adapters = Vec::new();
    for (number_of, (set, first)) in cases.into_iter().enumerate() {
        let name = number_of.to_string();
        tiny.train(&name, &[set, &["train.epochs=2"]].concat());
        let losses: Vec<f64> = tiny.rows_of(&name, false).iter().map(|row| number(row, "loss")).collect();
        assert!((losses[0] - first).abs() < 1e-12, "{set:?}: {losses:?}");
        assert!(losses[losses.len() - 1] < 0.95 * first, "{set:?}: {losses:?}");
        adapters.push(tiny.adapter(&name));
    }
    assert!((1..adapters.len()).all(|i| !adapters[..i].contains(&adapters[i])), "two losses made one adapter");
}

#[test]
fn settings_that_change_the_run_change_it_and_the_same_again() {
    let tiny = Tiny::new();
    tiny.train("plain", &[]);
    let cases: [&[&str]; 11] = [
        &["train.optimizer=rmsprop", "train.learning_rate=1e-3"],
        &["adapter.lora_dropout=0.2"],
        &["adapter.use_rslora=true"],
        &["adapter.target_modules=[\"q_proj\", \"v_proj\"]"],
        &["adapter.init_seed=1"],
        &["train.seed=1"],
        &["train.weight_decay=0.1"],
        &["train.max_grad_norm=0.1"],
        &["train.warmup_steps=3", "train.lr_schedule=cosine"],
        &["train.lr_schedule=constant"],
        &["data.shuffle=false"],
    ];
    let mut adapters = vec![tiny.adapter("plain")];
    for (number_of, set) in cases.into_iter().enumerate() {
        let (name, again) = (number_of.to_string(), format!("{number_of}-again"));
        tiny.train(&name, set);
        tiny.train(&again, &[set, &["run.threads=1"]].concat());
        assert_eq!(tiny.adapter(&name), tiny.adapter(&again), "{set:?}");
        assert!(!adapters.contains(&tiny.adapter(&name)), "{set:?} changed nothing");
        adapters.push(tiny.adapter(&name));
    }
}

#[test]
fn a_run_that_starts_from_an_adapter_is_held_to_it_or_to_the_base() {
    let tiny = Tiny::new();
    let set = ["data.eval_fraction=0.25"];
    tiny.train("first", &set);
    let last = tiny.rows_of("first", true).pop().unwrap();
    // An adapter brings its own rank.
    tiny.write("recipe.toml", RECIPE.replace("r = 4\nlora_alpha = 8", ""));
    let from = ["data.eval_fraction=0.25", "adapter.start_from=runs/first/adapter", "train.max_steps=2"];

    // made on a base by another name, which is not the one that it is trained on from here
    let config = "runs/first/adapter/adapter_config.json";
    tiny.set_json(config, "base_model_name_or_path", "owner/other".into());
    tiny.set_json(config, "revision", "v2".into());
    let said = tiny.train("start", &from);
    let config: Value = serde_json::from_str(&tiny.read("runs/start/adapter/adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], tiny.path("base").canonicalize().unwrap().display().to_string());
    assert_eq!(config["revision"], "main");
    assert!(said.contains("the reference is the base with ") && said.contains("runs/first/adapter"), "{said}");
    let (steps, evaluations) = (tiny.rows_of("start", false), tiny.rows_of("start", true));
    assert_eq!((number(&steps[0], "rewards/margins"), number(&steps[0], "loss")), (0.0, LN_2));
    assert_eq!(number(&evaluations[0], "eval_rewards/margins"), 0.0);
    assert_eq!(evaluations[0]["eval_logps/chosen"], last["eval_logps/chosen"]);

    let said = tiny.train("base", &[&from[..], &["objective.reference=base"]].concat());
    assert!(said.contains("the reference is the bare base"), "{said}");
    let (steps, evaluations) = (tiny.rows_of("base", false), tiny.rows_of("base", true));
    assert!(number(&steps[0], "rewards/margins") > 0.0);
    // Against the bare base it begins where the first run ended.
    assert_eq!(evaluations[0]["eval_rewards/margins"], last["eval_rewards/margins"]);
    assert_eq!(evaluations[0]["eval_loss"], last["eval_loss"]);
    assert_ne!(tiny.adapter("base"), tiny.adapter("start"));
}

#[test]
fn eval_says_what_the_run_logged() {
    let tiny = Tiny::new();
    tiny.train(
        "a",
        &["data.eval_fraction=0.25", "train.eval_every=2", "train.save_every=2", "train.keep_checkpoints=9"],
    );
    let logged = tiny.rows_of("a", true);
    let same = |arguments: &[&str], logged: &Value| {
        let said: Value = serde_json::from_str(&tiny.ok(&[&["eval"], arguments, &["--json"]].concat())).unwrap();
        let said = said.as_object().unwrap();
        assert_eq!(said.len(), 12, "{said:?}");
        said.iter().for_each(|(name, value)| assert_eq!(*value, logged[name], "{name} of {arguments:?}"));
    };
    same(&["runs/a"], logged.last().unwrap());
    same(&["runs/a", "--set", "run.threads=1"], logged.last().unwrap());
    same(&["runs/a", "--adapter", "runs/a/checkpoint-2"], &logged[1]);
    same(&["recipe.toml", "--set", "data.eval_fraction=0.25"], &logged[0]);

    // Rows named on the command line are measured whole.
    tiny.write("other.jsonl", rows(7));
    let text = tiny.ok(&["eval", "runs/a", "--data", "other.jsonl"]);
    assert!(text.lines().any(|line| line.split_whitespace().eq(["eval_pairs", "7.0000"])), "{text}");

    let output = tiny.run(&["eval", "recipe.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("holds no rows out") && output.stdout.is_empty(), "{}", stderr(&output));
}

#[test]
fn generate_writes_base_and_adapter_side_by_side() {
    let tiny = Tiny::new();
    tiny.train("a", &["train.epochs=4"]);
    let generate = |more: &[&str]| {
        tiny.ok(&[&["generate", "base", "--prompt", "1: what is tea like?", "--max-new-tokens", "12"], more].concat())
    };
    let greedy = ["--temperature", "0"];
    let tuned = ["--temperature", "0", "--adapter", "runs/a/adapter"];
    assert_eq!(generate(&greedy), generate(&greedy));
    assert_eq!(generate(&tuned), generate(&[&tuned[..], &["--threads", "1"]].concat()));
    assert_ne!(generate(&greedy), generate(&tuned));
    assert!(generate(&greedy).starts_with("1: what is tea like?"));
    let both = generate(&[&tuned[..], &["--compare"]].concat());
    assert_eq!(both, format!("[base] {}[adapter] {}", generate(&greedy), generate(&tuned)));

    let json = generate(&["--adapter", "runs/a/adapter", "--compare", "--json", "--count", "2", "--seed", "3"]);
    let samples: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of: Vec<&str> = samples.iter().map(|sample| sample["model"].as_str().unwrap()).collect();
    assert_eq!(of, ["base", "base", "adapter", "adapter"]);
    assert!(samples.iter().all(|sample| sample["prompt"] == "1: what is tea like?"));
    assert_ne!(samples[0]["text"], samples[1]["text"]);
    assert_eq!(json, generate(&["--adapter", "runs/a/adapter", "--compare", "--json", "--count", "2", "--seed", "3"]));
    assert_ne!(json, generate(&["--adapter", "runs/a/adapter", "--compare", "--json", "--count", "2", "--seed", "4"]));

    let output = tiny.run(&["generate", "base", "--prompt", "1: what", "--max-new-tokens", "1000000000"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("of its 512 positions left; set it to that or less"), "{}", stderr(&output));

    tiny.write("prompts.txt", "1: what\n\n2: what\n");
    let text = tiny.ok(&["generate", "base", "--prompts", "prompts.txt", "--chat", "--max-new-tokens", "4", "--json"]);
    let prompts: Vec<Value> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["prompt"].take()).collect();
    assert_eq!(prompts, ["1: what", "2: what"]);
}

#[test]
fn data_check_says_what_becomes_of_the_rows() {
    let tiny = Tiny::new();
    let refused = [
        r#"{"prompt": "a ", "chosen": "b", "rejected": "b"}"#,
        r#"{"prompt": "a ", "chosen": "", "rejected": "b"}"#,
        r#"{"prompt": "a ", "chosen": "one answer that is much too long for a length of sixty tokens and is refused, and then goes on and on", "rejected": "b"}"#,
    ];
    tiny.write("rows.jsonl", format!("{}\n{}\n", rows(4), refused.join("\n")));
    let check = ["data", "check", "recipe.toml", "--set", "data.max_length=60", "--set", "data.eval_fraction=0.5"];
    let text = tiny.ok(&check);
    for part in [
        "rows read                       7",
        "used                            4",
        "both answers are the same",
        "rows.jsonl:6",
        "held out",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json: Value = serde_json::from_str(&tiny.ok(&[&check[..], &["--json", "--show", "1"]].concat())).unwrap();
    assert_eq!(
        (&json["set"], &json["report"]["rows"], &json["report"]["used"]),
        (&"train".into(), &7.into(), &4.into())
    );
    assert_eq!(json["report"]["refused"]["too_long"]["count"], 1);
    assert_eq!(json["pairs"].as_array().unwrap().len(), 1);
    let held_out = json["held_out"].as_u64().unwrap();

    let shown = tiny.ok(&[&check[..], &["--show", "2"]].concat());
    assert_eq!(shown.matches("[chosen: ").count(), 2, "{shown}");
    assert!(shown.contains("<|im_end|>]") && !shown.contains('\u{1b}'), "{shown}");

    // also of rows of which none can be used
    let none = tiny.run(&["data", "check", "recipe.toml", "--set", "data.max_length=3"]);
    assert_eq!(none.status.code(), Some(3), "{}", stderr(&none));
    assert!(!stderr(&none).contains("data check"), "{}", stderr(&none));
    let text = String::from_utf8_lossy(&none.stdout);
    assert!(text.contains("used                            0") && text.contains("over max_length"), "{text}");

    // What it says is what a run does.
    let said = tiny.train("a", &["data.max_length=60", "data.eval_fraction=0.5"]);
    let expected = format!("{} pairs to train on, {held_out} held out", 4 - held_out);
    assert!(said.contains("7 rows read, 4 used") && said.contains(&expected), "{said}");
}

#[test]
fn rows_held_out_that_are_trained_on_are_said() {
    let tiny = Tiny::new();
    let all = rows(24);
    tiny.write(
        "some.jsonl",
        all.lines().take(3).collect::<Vec<_>>().join("\n") + "\n" + rows(25).lines().last().unwrap(),
    );
    let eval = "data.eval=[\"some.jsonl\"]";
    let said = tiny.train("a", &[eval, "train.max_steps=1"]);
    let warning =
        "warning: 3 of the 4 held-out rows are among the training rows; their figures say nothing of new rows";
    assert!(said.contains(warning), "{said}");
    let check = ["data", "check", "recipe.toml", "--set"];
    let text = tiny.ok(&[&check[..], &[eval]].concat());
    assert!(text.contains("also trained on                 3\n"), "{text}");
    // a file that is named twice is on both sides
    let twice = ["data.train=[\"rows.jsonl\",\"rows.jsonl\"]", "--set", "data.eval_fraction=0.1", "--json"];
    let json: Value = serde_json::from_str(&tiny.ok(&[&check[..], &twice].concat())).unwrap();
    assert!(json["also_trained_on"].as_u64() > Some(0), "{json}");
    let said = tiny.train("b", &["data.eval_fraction=0.25", "train.max_steps=1"]);
    assert!(!said.contains("held-out rows are among"), "{said}");
}

/// A model whose rope changes beyond a length is exact up to it alone, whatever rows a command reads.
#[test]
fn rows_longer_than_the_model_is_exact_are_refused() {
    let tiny = Tiny::new();
    tiny.set_json("base/config.json", "rope_scaling", serde_json::json!({"rope_type": "dynamic", "factor": 2.0}));
    let refused: [&[&str]; 3] = [
        &["train", "recipe.toml"],
        &["eval", "recipe.toml", "--data", "rows.jsonl"],
        &["data", "check", "recipe.toml"],
    ];
    for command in refused {
        let output = tiny.run(command);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("data.max_length is 1024, but of this model the rope is scaled dynamically beyond 512"),
            "{said}"
        );
    }
    tiny.ok(&["eval", "recipe.toml", "--data", "rows.jsonl", "--set", "data.max_length=512"]);
}
