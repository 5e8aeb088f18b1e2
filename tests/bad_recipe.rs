//! Bad recipes and bad usage through the binary: exit code 2, and a message that names the place and what was meant.

use std::path::Path;
use std::process::{Command, Output};

/// A recipe that is right but for what a case puts into it, with the files that it names.
const GOOD: &str = r#"[model]
base = "./base"

[data]
train = ["pairs.jsonl"]
"#;

/// Runs `train bad.toml` on this text in a folder with a model folder `base` and rows `pairs.jsonl`.
fn train(recipe: &[u8], arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("base")).unwrap();
    std::fs::write(folder.path().join("pairs.jsonl"), "").unwrap();
    std::fs::write(folder.path().join("bad.toml"), recipe).unwrap();
    run_in(folder.path(), &[&["train", "bad.toml"], arguments].concat())
}

fn run_in(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dpo-lora")).args(arguments).current_dir(folder).output().unwrap()
}

/// The one line on stderr of a command that ended with exit code 2 and wrote no result.
fn message(output: Output) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr.trim_end().strip_prefix("error: ").expect("an error").to_string()
}

#[track_caller]
fn assert_parts(message: &str, start: &str, parts: &[&str]) {
    assert!(message.starts_with(start), "{message}\ndoes not start with {start}");
    for part in parts {
        assert!(message.contains(part), "{message}\nlacks {part}");
    }
}

/// Lines put after `GOOD` (whose last line is 5), the line that the error must name, and what it must say.
#[test]
fn a_bad_line_is_named() {
    let cases: &[(&str, usize, &[&str])] = &[
        ("[objective]\nbetta = 0.1", 7, &["unknown key `objective.betta`; did you mean `beta`?"]),
        ("[train]\nbeta = 0.1", 7, &["unknown key `train.beta`; `beta` belongs in [objective]"]),
        ("[train]\nlr = 1e-4", 7, &["did you mean `learning_rate`?"]),
        ("[train]\nnum_train_epochs = 1", 7, &["did you mean `epochs`?"]),
        ("[trian]\nseed = 1", 6, &["unknown section [trian]; did you mean [train]?"]),
        ("[memory]\nzzz = 1", 7, &["unknown key `memory.zzz`; [memory] holds `budget`, `reference_cache`, `compute`"]),
        ("[train]\nbatch_size = \"16\"", 7, &["the string \"16\"", "a whole number, at least 1", "without quotes"]),
        ("[train]\nbatch_size = 1.5", 7, &["`train.batch_size` is the number 1.5; expected a whole number"]),
        ("[train]\nbatch_size = 0", 7, &["`train.batch_size` is the number 0; expected a whole number, at least 1"]),
        ("[train]\nseed = 99999999999999999999", 7, &["99999999999999999999 is too large"]),
        ("[train]\nlearning_rate = -1e-5", 7, &["`train.learning_rate`", "at least 0"]),
        ("[train]\nepochs = 1e7", 7, &["`train.epochs`", "a number above 0, at most 1e6"]),
        ("[train]\nlearning_rate = inf", 7, &["`train.learning_rate`", "a finite number"]),
        ("[train]\nadam_betas = [0.9, 1.0]", 7, &["a list of two numbers, each a number in [0, 1)"]),
        ("[train]\nadam_betas = [0.9]", 7, &["a list of two numbers"]),
        ("[train]\noptimizer = \"adam\"", 7, &["one of `adamw`, `rmsprop`; did you mean `adamw`?"]),
        ("[adapter]\nr = 0", 7, &["`adapter.r` is the number 0"]),
        ("[adapter]\nlora_dropout = 1.0", 7, &["a number in [0, 1)"]),
        ("[adapter]\nuse_rslora = \"true\"", 7, &["expected `true` or `false`; write it without quotes"]),
        ("[adapter]\ntarget_modules = \"(q_proj\"", 7, &["the regex \"(q_proj\" cannot be used"]),
        ("[adapter]\nstart_from = \"runs/none\"", 7, &["`adapter.start_from`: there is no folder"]),
        ("[objective]\n\nbeta = 0", 8, &["`objective.beta` is the number 0; expected a finite number above 0"]),
        ("[objective]\nbeta = [0.1]", 7, &["is the list [0.1]; expected a finite number"]),
        ("[objective]\nlabel_smoothing = 0.5", 7, &["a number in [0, 0.5)"]),
        (
            "[objective]\nloss = \"sigmod\"",
            7,
            &["`sigmoid`, `robust`, `hinge`, `ipo`, `ipo_sum`; did you mean `sigmoid`?"],
        ),
        ("[objective]\nloss = \"hinge\"\nlabel_smoothing = 0.1", 8, &["`objective.label_smoothing` has no meaning"]),
        ("eval_fraction = 0.1\neval = [\"pairs.jsonl\"]", 6, &["`data.eval_fraction` and `data.eval`"]),
        ("eval_fraction = 1", 6, &["a number in [0, 1)"]),
        ("eval = \"pairs.jsonl\"", 6, &["expected a list of files; write [\"pairs.jsonl\"]"]),
        (
            "eval = [\n  \"pairs.jsonl\",\n  \"pairz.jsonl\",\n]",
            8,
            &["there is no file", "did you mean `pairs.jsonl`?"],
        ),
        ("eval = [\"*.json\"]", 6, &["no file matches"]),
        ("eval = [\"https://example.com/a.jsonl\"]", 6, &["expected a file, a glob or hf://datasets/OWNER/NAME/PATH"]),
        ("chat_template = \"atuo\"", 6, &["`data.chat_template`: there is no file", "expected `auto`, `none`"]),
        ("[train]\nmax_steps = 10\nwarmup_steps = 20", 8, &["is 20, more than the 10 of `train.max_steps`"]),
        ("[train]\nsave_every = 5\nkeep_checkpoints = 0", 8, &["`train.keep_checkpoints` is 0"]),
        ("[train]\neval_every = 5", 7, &["`train.eval_every` has no rows to evaluate"]),
        ("[train]\noptimizer = \"rmsprop\"\nadam_betas = [0.9, 0.95]", 8, &["`train.adam_betas` has no meaning"]),
        ("[samples]\nlabels = \"pairs.jsonl\"", 7, &["`samples.labels` has no samples"]),
        ("[run]\ndevice = \"gpu\"", 7, &["expected `auto`, `cpu`, `cuda:N` or `metal`"]),
        ("[train\nseed = 1", 6, &["not valid TOML"]),
        ("[train]\nseed = 1\nseed = 2", 8, &["not valid TOML: duplicate key"]),
        ("[train]\noptimizer = adamw", 7, &["not valid TOML"]),
    ];
    for (lines, line, parts) in cases {
        let message = message(train(format!("{GOOD}{lines}\n").as_bytes(), &[]));
        assert_parts(&message, &format!("bad.toml:{line}: "), parts);
    }
}

#[test]
fn a_bad_document_is_named() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("", "bad.toml:1: `model.base` is missing", &["hub id like `owner/name`"]),
        ("[model]\nbase = \"a/b\"\n[data]\nlimit = 1", "bad.toml:3: `data.train` is missing", &[]),
        ("beta = 0.1", "bad.toml:1: `beta` stands in no section; `beta` belongs in [objective]", &[]),
        ("model = \"a/b\"", "bad.toml:1: `model` is a section, not a value", &["write `model.base = "]),
        ("model.base = \"./bsae\"\ndata.train = []", "bad.toml:1: `model.base`: there is no folder", &["`base`?"]),
        ("model.base = \"a/b\"\ndata.train = []", "bad.toml:2: `data.train` is an empty list", &["at least one"]),
        ("model.base = \"a b\"\ndata.train = []", "bad.toml:1: `model.base`: \"a b\" is neither a hub id", &[]),
        ("model.base = \"pairs.jsonl\"\ndata.train = []", "bad.toml:1: `model.base`: ", &["is a file"]),
    ];
    for (recipe, start, parts) in cases {
        assert_parts(&message(train(recipe.as_bytes(), &[])), start, parts);
    }
    assert_parts(&message(train(b"\xff\xfe", &[])), "bad.toml: is not UTF-8 text", &[]);
}

#[test]
fn a_bad_argument_is_named() {
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&["--set", "train.sead=1"], "--set train.sead=1: unknown key `train.sead`; did you mean `seed`?", &[]),
        (&["--set", "beta=1"], "--set beta=1: `beta` stands in no section; `beta` belongs in [objective]", &[]),
        (&["--set", "train=1"], "--set train=1: `train` is a section, not a value", &["write `train.epochs = "]),
        (&["--set", "train.seed"], "--set train.seed: expected KEY=VALUE", &[]),
        (&["--set", "train.seed=one"], "--set train.seed=one: `train.seed` is the string \"one\"", &[]),
        (
            &["--set", "data.train=[pairs.jsonl]"],
            "--set data.train=[pairs.jsonl]: ",
            &["protect the list from the shell"],
        ),
        (&["--set", "data.train=[\"pear.jsonl\"]"], "--set data.train=", &["there is no file", "`pairs.jsonl`?"]),
        (&["--set", "objective.loss=IPO"], "--set objective.loss=IPO: ", &["did you mean `ipo`?"]),
        (&["--device", "cuda"], "--set run.device=cuda: ", &["did you mean `cuda:0`?"]),
        (&["--output", ""], "--set run.output=: `run.output` is an empty string; expected a folder to write", &[]),
        (
            &["--output", "./"],
            "--set run.output=./: `run.output`: \"./\" is no name for a folder; expected one like",
            &[],
        ),
        (
            &["--max-steps", "3", "--set", "train.warmup_steps=5"],
            "--set train.warmup_steps=5: `train.warmup_steps` is 5, more than the 3 of `train.max_steps`",
            &[],
        ),
    ];
    for (arguments, start, parts) in cases {
        assert_parts(&message(train(GOOD.as_bytes(), arguments)), start, parts);
    }
}

#[test]
fn a_recipe_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("hh.toml"), "").unwrap();
    let absent = message(run_in(folder.path(), &["train", "hhh.toml"]));
    assert_eq!(absent, "hhh.toml: there is no such recipe; did you mean `hh.toml`?");
    let is_folder = message(run_in(folder.path(), &["train", "."]));
    assert_eq!(is_folder, ".: is a folder; expected a recipe's file");
    let endless = message(run_in(folder.path(), &["train", "/dev/zero"]));
    assert_eq!(endless, "/dev/zero: no recipe has more than 1048576 bytes");
}

#[test]
fn bad_usage_ends_with_2_as_well() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in
        [&["trian"][..], &["train"], &["train", "a.toml", "--stes", "1"], &["train", "a", "--max-steps", "x"]]
    {
        let output = run_in(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn completions_name_the_commands() {
    let output = run_in(Path::new("."), &["completions", "bash"]);
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("--max-steps"));
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_dpo-lora"));
    let output = command.args(["completions", "bash"]).stdout(writer).output().unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
}
