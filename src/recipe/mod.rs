//! The recipe: what a person writes. A [`Recipe`] that exists is valid.
//!
//! `load` reads one: `source` takes the file and `--set` apart, `schema` says which keys there are, `value` checks
//! each value, `paths` resolves what it names, `globs` finds files, `budget` is a size of memory, `combination` checks
//! the whole; `nearest` guesses what was meant.

mod budget;
mod combination;
mod globs;
mod load;
mod nearest;
mod paths;
mod schema;
mod source;
mod value;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use budget::Budget;
pub(crate) use globs::matches;
pub use load::RESOLVED;

/// A whole recipe, every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The base model.
    pub model: Model,
    /// The LoRA adapter that learns.
    pub adapter: Adapter,
    /// The preference pairs.
    pub data: Data,
    /// The loss.
    pub objective: Objective,
    /// The run of the optimizer.
    pub train: Train,
    /// What may be held in memory and on disk.
    pub memory: Memory,
    /// Samples drawn at the end of a run.
    pub samples: Samples,
    /// Where and on what it runs.
    pub run: Run,
}

impl Recipe {
    /// The folder of the adapter that the reference goes through; none: the bare base.
    pub fn reference_adapter(&self) -> Option<&Path> {
        self.adapter.start_from.as_deref().filter(|_| self.objective.reference == Reference::Start)
    }
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Hub id, or a folder.
    pub base: String,
    /// Branch, tag or commit on the hub.
    pub revision: String,
}

/// `[adapter]`, with PEFT's names and meaning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    /// Rank.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Probability that an input of the adapter is dropped while training.
    pub lora_dropout: f64,
    /// Which linear layers are adapted.
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / sqrt(r)` instead.
    pub use_rslora: bool,
    /// A PEFT adapter to go on from; `""` in TOML: a fresh one.
    #[serde(with = "empty_is_none")]
    pub start_from: Option<PathBuf>,
    /// Seed of the fresh adapter's A.
    pub init_seed: u64,
}

/// Which linear layers are adapted, as PEFT reads it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `"all-linear"` (all but the head), or else a regex that must match the whole module name.
    Pattern(String),
    /// Names that match exactly or as the last dotted parts.
    List(Vec<String>),
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Files, globs, or `hf://datasets/OWNER/NAME/PATH`.
    pub train: Vec<String>,
    /// The same, held out.
    pub eval: Vec<String>,
    /// Share of the training rows held out where `eval` is empty.
    pub eval_fraction: f64,
    /// How a row is read.
    pub format: Format,
    /// The template that turns messages into text.
    pub chat_template: String,
    /// Most tokens of prompt + answer.
    pub max_length: usize,
    /// What happens to a row over `max_length`.
    pub truncation: Truncation,
    /// Whether rows are visited in a new order every epoch.
    pub shuffle: bool,
    /// Most rows read of `train`, from the start, refused ones included; 0: all.
    pub limit: usize,
}

/// How a row is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Told from the row's own shape.
    Auto,
    /// `prompt`, `chosen`, `rejected` as text.
    Text,
    /// Lists of `{role, content}`.
    Messages,
    /// Whole HH dialogues (`\n\nHuman: … \n\nAssistant: …`) in `chosen` and `rejected`.
    Hh,
}

/// What happens to a row over `max_length`. An answer is never cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The row is refused and counted.
    Refuse,
    /// The prompt loses its first tokens.
    PromptStart,
    /// The prompt loses its last tokens.
    PromptEnd,
}

/// `[objective]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Which loss.
    pub loss: Loss,
    /// The strength of the tie to the reference.
    pub beta: f64,
    /// Assumed share of flipped labels (cDPO with `sigmoid`, rDPO with `robust`).
    pub label_smoothing: f64,
    /// What the policy is held to.
    pub reference: Reference,
}

/// Preference losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DPO, equation 7 of Rafailov et al. 2023; cDPO with label smoothing.
    Sigmoid,
    /// Robust DPO (Chowdhury et al. 2024).
    Robust,
    /// SLiC's hinge (Zhao et al. 2023).
    Hinge,
    /// IPO on log-probs averaged over the answer's tokens, as TRL computes it.
    Ipo,
    /// IPO on summed log-probs, equation 17 of Azar et al. 2023.
    IpoSum,
}

/// What the policy is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The model as training begins (with `start_from`'s adapter).
    Start,
    /// The bare base.
    Base,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Train {
    /// Passes over the rows.
    pub epochs: f64,
    /// Optimizer steps; 0: by `epochs`.
    pub max_steps: usize,
    /// Pairs an optimizer step.
    pub batch_size: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the rate goes on after warm-up.
    pub lr_schedule: LrSchedule,
    /// Steps over which the rate rises from 0.
    pub warmup_steps: usize,
    /// Which optimizer.
    pub optimizer: Optimizer,
    /// AdamW's decay rates.
    pub adam_betas: [f64; 2],
    /// Decay of the adapter: decoupled with AdamW, an L2 term with RMSprop, as in torch.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0: never.
    pub max_grad_norm: f64,
    /// Seed of the order of rows, of which of them `eval_fraction` holds out, of dropout and of the samples.
    pub seed: u64,
    /// Evaluate every so many steps (and at the end); 0: before and after only.
    pub eval_every: usize,
    /// Save a checkpoint every so many steps; 0: only when stopped and at the end.
    pub save_every: usize,
    /// How many checkpoints stay; 0 keeps one, too.
    pub keep_checkpoints: usize,
}

/// How the rate goes on after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// Stays.
    Constant,
    /// Falls to 0 in a line.
    Linear,
    /// Falls to 0 in half a cosine.
    Cosine,
}

/// Which optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW with torch's defaults.
    Adamw,
    /// RMSprop with torch's defaults, the paper's choice.
    Rmsprop,
}

/// `[memory]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// The most memory that a run may take: anonymous, or a device's.
    pub budget: Budget,
    /// Keep the reference's log-probs on disk and use them again.
    pub reference_cache: bool,
    /// In which type the frozen matrices multiply.
    pub compute: Compute,
}

/// In which type the frozen matrices multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// f32 on a CPU, bf16 on an accelerator.
    Auto,
    /// f32.
    F32,
    /// bf16 with sums in f32, where the device multiplies it; else f32.
    Bf16,
}

/// `[samples]`: what base and tuned model write, shown at the end of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// Prompts to go on from, as text; none: no samples.
    pub prompts: Vec<String>,
    /// Samples drawn from base and tuned model each, spread over the prompts; rounded up to the same number for each.
    pub count: usize,
    /// Most tokens a sample.
    pub max_new_tokens: usize,
    /// Softmax temperature; 0: the likeliest token.
    pub temperature: f64,
    /// A file with `positive` and `negative` word lists by which samples are labelled; `""` in TOML: no labels.
    #[serde(with = "empty_is_none")]
    pub labels: Option<PathBuf>,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The run's folder; a relative one starts at the current folder.
    pub output: PathBuf,
    /// `auto`, `cpu`, `cuda:N` or `metal`.
    pub device: String,
    /// 0: all cores.
    pub threads: usize,
}

/// A path that may be absent; TOML has no null, so it is written as `""`.
mod empty_is_none {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&path.as_deref().map_or_else(Default::default, |path| path.to_string_lossy()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok((!text.is_empty()).then(|| text.into()))
    }
}
