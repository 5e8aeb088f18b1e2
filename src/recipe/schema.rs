//! Every key of the recipe: its section, what it may hold, its default, and what other programs call it.

use super::nearest::listed;

/// The sections, in the order in which a resolved recipe is written.
pub(super) const SECTIONS: [&str; 8] = ["model", "adapter", "data", "objective", "train", "memory", "samples", "run"];

/// One key of the recipe.
pub(super) struct Key {
    /// Its section, one of [`SECTIONS`].
    pub section: &'static str,
    /// Its name in the section.
    pub name: &'static str,
    /// What it may hold.
    pub kind: Kind,
    /// What holds where the recipe does not name it.
    pub absent: Absent,
    /// Names of the same thing in TRL, PEFT or transformers: taken as a hint when the name is not found.
    pub others: &'static [&'static str],
}

/// What holds where a recipe does not name a key.
pub(super) enum Absent {
    /// The recipe is unusable.
    Required,
    /// This value, as TOML.
    Default(&'static str),
    /// `runs/` and the recipe's file name without its ending.
    RunsAndStem,
}

/// What a key may hold.
pub(super) enum Kind {
    /// A whole number from `least` to `most`.
    Whole { least: i64, most: i64 },
    /// A number in a range.
    Number(&'static Range),
    /// Two numbers in a range.
    Pair(&'static Range),
    /// `true` or `false`.
    Flag,
    /// A string that is not empty.
    Text,
    /// A list of strings that are not empty.
    Texts,
    /// One of these names.
    Choice(&'static [&'static str]),
    /// `auto`, `cpu`, `cuda:N` or `metal`.
    Device,
    /// `all-linear`, a regex, or a list of module names.
    Modules,
    /// A model's folder, GGUF file or hub id.
    Base,
    /// `auto`, `none`, or a template's file.
    Template,
    /// Files, globs or hub files of preference rows.
    Rows { at_least_one: bool },
    /// A file to read; empty: none.
    File,
    /// A folder to read; empty: none.
    Folder,
    /// A folder to write.
    Output,
    /// `auto`, or a size of memory.
    Budget,
}

/// A range of numbers and its name.
pub(super) struct Range {
    /// How an error and the reference table name it.
    pub text: &'static str,
    /// Whether a number lies in it. False for NaN.
    pub holds: fn(f64) -> bool,
}

const POSITIVE: Range = Range { text: "a finite number above 0", holds: |x| x > 0.0 && x.is_finite() };
const EPOCHS: Range = Range { text: "a number above 0, at most 1e6", holds: |x| x > 0.0 && x <= 1e6 };
const FROM_ZERO: Range = Range { text: "a finite number, at least 0", holds: |x| x >= 0.0 && x.is_finite() };
const SHARE: Range = Range { text: "a number in [0, 1)", holds: |x| (0.0..1.0).contains(&x) };
const BELOW_HALF: Range = Range { text: "a number in [0, 0.5)", holds: |x| (0.0..0.5).contains(&x) };

/// More than any run needs, and small enough that products of two such numbers stay inside 64 bits.
const MANY: i64 = 1_000_000_000;

const fn whole(least: i64, most: i64) -> Kind {
    Kind::Whole { least, most }
}

const fn key(section: &'static str, name: &'static str, kind: Kind, default: &'static str) -> Key {
    Key { section, name, kind, absent: Absent::Default(default), others: &[] }
}

impl Key {
    const fn also(self, others: &'static [&'static str]) -> Self {
        let Self { section, name, kind, absent, .. } = self;
        Self { section, name, kind, absent, others }
    }

    const fn required(self) -> Self {
        let Self { section, name, kind, others, .. } = self;
        Self { section, name, kind, absent: Absent::Required, others }
    }

    /// `section.name`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }
}

/// All keys, in the order in which a resolved recipe is written.
#[rustfmt::skip]
pub(super) static KEYS: &[Key] = &[
    key("model", "base", Kind::Base, "").required().also(&["model_name_or_path", "base_model_name_or_path", "name", "path"]),
    key("model", "revision", Kind::Text, r#""main""#).also(&["model_revision"]),

    key("adapter", "r", whole(1, 65_536), "16").also(&["lora_r", "rank"]),
    key("adapter", "lora_alpha", Kind::Number(&POSITIVE), "32.0").also(&["alpha"]),
    key("adapter", "lora_dropout", Kind::Number(&SHARE), "0.0").also(&["dropout"]),
    key("adapter", "target_modules", Kind::Modules, r#""all-linear""#).also(&["lora_target_modules"]),
    key("adapter", "use_rslora", Kind::Flag, "false").also(&["rslora"]),
    key("adapter", "start_from", Kind::Folder, r#""""#).also(&["adapter_name_or_path"]),
    key("adapter", "init_seed", whole(0, i64::MAX), "0"),

    key("data", "train", Kind::Rows { at_least_one: true }, "").required().also(&["train_dataset", "dataset_name", "dataset"]),
    key("data", "eval", Kind::Rows { at_least_one: false }, "[]").also(&["eval_dataset"]),
    key("data", "eval_fraction", Kind::Number(&SHARE), "0.0").also(&["test_size", "val_size"]),
    key("data", "format", Kind::Choice(&["auto", "text", "messages", "hh"]), r#""auto""#),
    key("data", "chat_template", Kind::Template, r#""auto""#).also(&["chat_template_path"]),
    key("data", "max_length", whole(2, MANY), "1024").also(&["max_seq_length", "cutoff_len"]),
    key("data", "truncation", Kind::Choice(&["refuse", "prompt_start", "prompt_end"]), r#""refuse""#).also(&["truncation_mode"]),
    key("data", "shuffle", Kind::Flag, "true"),
    key("data", "limit", whole(0, MANY), "0").also(&["max_samples", "max_train_samples"]),

    key("objective", "loss", Kind::Choice(&["sigmoid", "robust", "hinge", "ipo", "ipo_sum"]), r#""sigmoid""#).also(&["loss_type"]),
    key("objective", "beta", Kind::Number(&POSITIVE), "0.1"),
    key("objective", "label_smoothing", Kind::Number(&BELOW_HALF), "0.0"),
    key("objective", "reference", Kind::Choice(&["start", "base"]), r#""start""#).also(&["ref_model"]),

    key("train", "epochs", Kind::Number(&EPOCHS), "1.0").also(&["num_train_epochs"]),
    key("train", "max_steps", whole(0, MANY), "0"),
    key("train", "batch_size", whole(1, MANY), "16").also(&["per_device_train_batch_size", "gradient_accumulation_steps"]),
    key("train", "learning_rate", Kind::Number(&FROM_ZERO), "5e-6").also(&["lr"]),
    key("train", "lr_schedule", Kind::Choice(&["constant", "linear", "cosine"]), r#""linear""#).also(&["lr_scheduler_type"]),
    key("train", "warmup_steps", whole(0, MANY), "0").also(&["warmup_ratio"]),
    key("train", "optimizer", Kind::Choice(&["adamw", "rmsprop"]), r#""adamw""#).also(&["optim"]),
    key("train", "adam_betas", Kind::Pair(&SHARE), "[0.9, 0.999]").also(&["adam_beta1", "adam_beta2"]),
    key("train", "weight_decay", Kind::Number(&FROM_ZERO), "0.0"),
    key("train", "max_grad_norm", Kind::Number(&FROM_ZERO), "1.0"),
    key("train", "seed", whole(0, i64::MAX), "0").also(&["data_seed"]),
    key("train", "eval_every", whole(0, MANY), "0").also(&["eval_steps"]),
    key("train", "save_every", whole(0, MANY), "0").also(&["save_steps"]),
    key("train", "keep_checkpoints", whole(0, MANY), "2").also(&["save_total_limit"]),

    key("memory", "budget", Kind::Budget, r#""auto""#),
    key("memory", "reference_cache", Kind::Flag, "true").also(&["precompute_ref_log_probs"]),
    key("memory", "compute", Kind::Choice(&["auto", "f32", "bf16"]), r#""auto""#).also(&["bf16", "torch_dtype"]),

    key("samples", "prompts", Kind::Texts, "[]"),
    key("samples", "count", whole(1, MANY), "8").also(&["num_return_sequences"]),
    key("samples", "max_new_tokens", whole(1, MANY), "48"),
    key("samples", "temperature", Kind::Number(&FROM_ZERO), "1.0"),
    key("samples", "labels", Kind::File, r#""""#),

    Key { section: "run", name: "output", kind: Kind::Output, absent: Absent::RunsAndStem, others: &["output_dir"] },
    key("run", "device", Kind::Device, r#""auto""#),
    key("run", "threads", whole(0, 1024), "0"),
];

/// The key `section.name`.
pub(super) fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

impl Kind {
    /// What is expected, as an error and the reference table say it.
    pub fn expected(&self) -> String {
        match self {
            Self::Whole { least, most: MANY.. } => format!("a whole number, at least {least}"),
            Self::Whole { least, most } => format!("a whole number from {least} to {most}"),
            Self::Number(range) => range.text.into(),
            Self::Pair(range) => format!("a list of two numbers, each {}", range.text),
            Self::Flag => "`true` or `false`".into(),
            Self::Text => "a string that is not empty".into(),
            Self::Texts => "a list of strings, none empty".into(),
            Self::Choice(names) => format!("one of {}", listed(names)),
            Self::Device => "`auto`, `cpu`, `cuda:N` or `metal`".into(),
            Self::Modules => "`all-linear`, a regex, or a list of module names".into(),
            Self::Base => "a model folder, a `.gguf` file, or a hub id like `owner/name`".into(),
            Self::Template => "`auto`, `none`, or a template file".into(),
            Self::Rows { at_least_one: true } => "a list of files, at least one".into(),
            Self::Rows { at_least_one: false } => "a list of files".into(),
            Self::File => "a file, or `\"\"` for none".into(),
            Self::Folder => "a folder, or `\"\"` for none".into(),
            Self::Output => "a folder to write".into(),
            Self::Budget => "`auto`, or a size like `6GiB` or `800MiB`".into(),
        }
    }

    /// Whether every value is a string, so that on the command line the quotes may be left out whatever it looks
    /// like (a commit `12345e7` is not a number).
    pub fn is_text(&self) -> bool {
        match self {
            Self::Text | Self::Choice(_) | Self::Device | Self::Base | Self::Budget => true,
            Self::Template | Self::File | Self::Folder | Self::Output => true,
            Self::Whole { .. } | Self::Number(_) | Self::Pair(_) | Self::Flag => false,
            Self::Texts | Self::Modules | Self::Rows { .. } => false,
        }
    }
}
