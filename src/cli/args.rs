//! What may stand on the command line.

use std::path::{Path, PathBuf};

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum, ValueHint};

use crate::hub::folder_or_name;
use crate::{Error, Result};

/// Align a language model with preference pairs: DPO with LoRA, one frozen copy of the weights.
#[derive(Debug, Parser)]
#[command(name = "dpo-lora", version, arg_required_else_help = true)]
#[command(after_help = "\
Start:  dpo-lora train recipes/quickstart.toml

Results go to stdout, all else to stderr.
Exit codes: 0 done; 1 the run failed; 2 usage or recipe; 3 bad input; 4 not enough memory or disk;
129 / 130 / 143 stopped by a signal; a run saves its whole steps first.")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train an adapter by a recipe
    Train(TrainArgs),
    /// Say what a recipe's run would hold in memory, and what another budget would buy
    Plan(PlanArgs),
    /// Measure loss, accuracy and margins on held-out pairs
    Eval(EvalArgs),
    /// Write text with a model, and with an adapter beside it
    Generate(GenerateArgs),
    /// Write an adapter or a merged model for other programs
    Export(ExportArgs),
    /// Make a small, quantised base of a large one
    Quantize(QuantizeArgs),
    /// Look at preference rows
    Data {
        /// What to do with them.
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Say what a folder or a .gguf file is: a model, an adapter or a run
    Inspect(InspectArgs),
    /// Write a shell's completions to stdout
    #[command(after_help = "Example:  dpo-lora completions bash > ~/.local/share/bash-completion/completions/dpo-lora")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// `data …`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Read a recipe's rows: how many, how long, which are refused and why
    Check(DataCheckArgs),
}

/// Values over a recipe's own.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct SetArgs {
    /// Change a key of the recipe, for example train.seed=1; may be repeated
    ///
    /// The value is TOML; a string needs no quotes. A list needs the shell's:
    /// --set 'data.train=["a.jsonl", "b.jsonl"]'. Relative paths start at the current folder.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `train`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora train recipes/quickstart.toml
  dpo-lora train recipes/hh.toml --set train.learning_rate=1e-5 --output runs/slow
  dpo-lora train recipes/hh.toml --resume")]
pub struct TrainArgs {
    /// The recipe, a TOML file
    #[arg(value_hint = ValueHint::FilePath)]
    pub recipe: PathBuf,
    /// Values over the recipe's own.
    #[command(flatten)]
    pub set: SetArgs,
    /// Go on from the last checkpoint of the run's folder, or from this one
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1, value_hint = ValueHint::DirPath)]
    #[arg(value_parser = PathBufValueParser::new().try_map(checkpoint))]
    pub resume: Option<Option<PathBuf>>,
    /// With --resume: go on for more steps than the run had (train.max_steps, train.epochs)
    ///
    /// Learning rates are those of the longer run from here on.
    #[arg(long, requires = "resume")]
    pub extend: bool,
    /// Stop after N optimizer steps; the same as --set train.max_steps=N
    #[arg(long, value_name = "N")]
    pub max_steps: Option<usize>,
    /// auto, cpu, cuda:N or metal; the same as --set run.device=D
    #[arg(long, value_name = "D")]
    pub device: Option<String>,
    /// The run's folder; the same as --set run.output=DIR
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output: Option<String>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

impl TrainArgs {
    /// `--set`, and after it the options that stand for a `--set`, so that they win.
    pub fn overrides(&self) -> Vec<String> {
        let mut set = self.set.set.clone();
        set.extend(self.max_steps.map(|steps| format!("train.max_steps={steps}")));
        set.extend(self.device.as_ref().map(|device| format!("run.device={device}")));
        set.extend(self.output.as_ref().map(|output| format!("run.output={output}")));
        set
    }
}

/// `plan`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora plan recipes/hh.toml
  dpo-lora plan recipes/hh.toml --memory 200MiB")]
pub struct PlanArgs {
    /// The recipe, a TOML file
    #[arg(value_hint = ValueHint::FilePath)]
    pub recipe: PathBuf,
    /// Values over the recipe's own.
    #[command(flatten)]
    pub set: SetArgs,
    /// The most memory, like 8GiB; the same as --set memory.budget=SIZE
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Where it would run, like cuda:0; with --memory it need not be there. The same as --set run.device=NAME
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

impl PlanArgs {
    /// `--set`, and after it what stands for a `--set`, so that it wins.
    pub fn overrides(&self) -> Vec<String> {
        let memory = self.memory.as_ref().map(|size| format!("memory.budget={size}"));
        let device = self.device.as_ref().map(|name| format!("run.device={name}"));
        self.set.set.iter().cloned().chain(memory).chain(device).collect()
    }
}

/// `eval`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora eval runs/hh
  dpo-lora eval recipes/hh.toml --adapter runs/hh/checkpoint-192 --data held-out.jsonl --set data.format=auto")]
pub struct EvalArgs {
    /// A recipe, or a run's folder
    #[arg(value_name = "RECIPE|RUN", value_hint = ValueHint::AnyPath)]
    pub target: PathBuf,
    /// The adapter to measure; default: a run's own, and of a recipe the base alone
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: Option<PathBuf>,
    /// Rows instead of the recipe's held-out rows; may be repeated
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub data: Vec<String>,
    /// Values over the recipe's own.
    #[command(flatten)]
    pub set: SetArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `generate`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora generate HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt \"How do I pick a lock?\"
  dpo-lora generate assets/quickstart/base --adapter runs/quickstart/adapter --compare --prompt \"The film\"")]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "prompts"])))]
pub struct GenerateArgs {
    /// The model: a folder, a .gguf file or a hub id
    #[arg(value_hint = ValueHint::DirPath, value_parser = folder_or_name)]
    pub model: String,
    /// Branch, tag or commit on the hub; default: the one that the adapter was made on, or main
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// A PEFT adapter on it
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: Option<PathBuf>,
    /// A prompt to go on from; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// A file of prompts, one a line
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub prompts: Option<PathBuf>,
    /// Show base and adapter side by side
    #[arg(long, requires = "adapter")]
    pub compare: bool,
    /// Most tokens a sample
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// Softmax temperature; 0: always the likeliest token
    #[arg(long, value_name = "T", default_value = "1.0", value_parser = temperature)]
    pub temperature: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Samples a prompt
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one)]
    pub count: usize,
    /// Put each prompt into the model's chat template as a user's message
    #[arg(long)]
    pub chat: bool,
    /// auto, cpu, cuda:N or metal
    #[arg(long, value_name = "D", default_value = "auto")]
    pub device: String,
    /// Threads; 0: all cores
    #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub threads: u16,
    /// Print one JSON object a sample instead of text
    #[arg(long)]
    pub json: bool,
}

/// `export`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora export runs/hh --to merged hh-merged
  dpo-lora export runs/hh/checkpoint-192 --to peft hh-adapter
  dpo-lora export runs/hh --to gguf-adapter hh.gguf")]
pub struct ExportArgs {
    /// A run's folder, or an adapter's
    #[arg(value_name = "RUN|ADAPTER", value_hint = ValueHint::DirPath)]
    pub source: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    pub to: ExportTo,
    /// The folder or file to write
    #[arg(value_name = "OUT", value_hint = ValueHint::AnyPath)]
    pub out: PathBuf,
    /// The base model, where the adapter does not name it rightly
    #[arg(long, value_name = "MODEL", value_parser = folder_or_name)]
    pub base: Option<String>,
    /// The merged weights' type; default: the base's own
    #[arg(long, value_enum)]
    pub dtype: Option<ExportDtype>,
}

impl ExportArgs {
    /// Refuses what clap cannot: an option without a meaning for this `--to`.
    ///
    /// # Errors
    /// [`Error::Recipe`], a usage error.
    pub fn check(&self) -> Result<()> {
        match (self.to, self.dtype) {
            (ExportTo::Peft | ExportTo::GgufAdapter, Some(_)) => {
                Err(Error::recipe("--dtype is for --to merged: an adapter stays in its own type"))
            }
            _ => Ok(()),
        }
    }
}

impl GenerateArgs {
    /// Refuses what clap cannot: a revision of a folder or a file, as a recipe does.
    ///
    /// # Errors
    /// [`Error::Recipe`], a usage error.
    pub fn check(&self) -> Result<()> {
        match &self.revision {
            Some(revision) if revision != "main" && Path::new(&self.model).exists() => Err(Error::recipe(format!(
                "--revision has no meaning for {}: it is for the hub; leave it away",
                self.model
            ))),
            _ => Ok(()),
        }
    }
}

/// What `export` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportTo {
    /// A PEFT adapter
    Peft,
    /// The base with the adapter worked into its weights
    Merged,
    /// A GGUF file for llama.cpp's --lora and Ollama's ADAPTER
    GgufAdapter,
}

/// The type of merged weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportDtype {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
}

/// `quantize`
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  dpo-lora quantize HuggingFaceTB/SmolLM2-135M-Instruct --to q8_0 smollm2.gguf
  dpo-lora quantize big-model --to nf4 big-model-nf4")]
pub struct QuantizeArgs {
    /// The unquantised model: a folder or a hub id
    #[arg(value_hint = ValueHint::DirPath, value_parser = folder_or_name)]
    pub model: String,
    /// What to write
    #[arg(long, value_enum)]
    pub to: QuantizeTo,
    /// The folder (nf4) or file (q8_0, q4_k) to write
    #[arg(value_name = "OUT", value_hint = ValueHint::AnyPath)]
    pub out: PathBuf,
}

/// What `quantize` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeTo {
    /// bitsandbytes' 4-bit folder, which transformers loads
    Nf4,
    /// A GGUF file with 8 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// A GGUF file with 4.5 bits a weight (5.5 where rows are no multiples of 256)
    #[value(name = "q4_k")]
    Q4K,
}

impl QuantizeTo {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }
}

/// `data check`
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:  dpo-lora data check recipes/quickstart.toml --show 2")]
pub struct DataCheckArgs {
    /// The recipe, a TOML file
    #[arg(value_hint = ValueHint::FilePath)]
    pub recipe: PathBuf,
    /// Values over the recipe's own.
    #[command(flatten)]
    pub set: SetArgs,
    /// Print the tokens of the first N pairs by role
    #[arg(long, value_name = "N", default_value = "0")]
    pub show: usize,
    /// Print one JSON object a line instead of text
    #[arg(long)]
    pub json: bool,
}

/// `inspect`
#[derive(Debug, ClapArgs)]
#[command(after_help = "Example:  dpo-lora inspect runs/quickstart")]
pub struct InspectArgs {
    /// A model's, an adapter's or a run's folder, or a .gguf file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|number| *number >= 1).ok_or_else(|| "expected a whole number, at least 1".into())
}

/// `--resume` takes what follows it, a recipe too.
fn checkpoint(path: PathBuf) -> std::result::Result<PathBuf, &'static str> {
    let is_recipe = path.extension().is_some_and(|ending| ending == "toml") && !path.is_dir();
    if is_recipe { Err("it is no checkpoint's folder; put the recipe before --resume") } else { Ok(path) }
}

fn temperature(text: &str) -> std::result::Result<f64, String> {
    let fits = |number: &f64| *number >= 0.0 && number.is_finite();
    text.parse().ok().filter(fits).ok_or_else(|| "expected a finite number, at least 0".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> std::result::Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definitions_agree_with_themselves() {
        Args::command().debug_assert();
    }

    #[test]
    fn options_that_stand_for_a_set_win_over_it() {
        let line = "dpo-lora train r.toml --max-steps 3 --set train.max_steps=9 --device cpu --output out";
        let Command::Train(args) = parse(line).unwrap().command else { panic!("not train") };
        assert_eq!(args.overrides(), ["train.max_steps=9", "train.max_steps=3", "run.device=cpu", "run.output=out"]);
    }

    #[test]
    fn resume_takes_a_checkpoint_or_none() {
        let resume = |line: &str| match parse(line).unwrap().command {
            Command::Train(args) => args.resume,
            _ => panic!("not train"),
        };
        assert_eq!(resume("dpo-lora train r.toml"), None);
        assert_eq!(resume("dpo-lora train r.toml --resume"), Some(None));
        assert_eq!(resume("dpo-lora train r.toml --resume c-1"), Some(Some("c-1".into())));
        let error = parse("dpo-lora train --resume r.toml").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("put the recipe before --resume"), "{error}");
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        for line in [
            "dpo-lora generate m",
            "dpo-lora generate m --prompt a --prompts f",
            "dpo-lora generate m --prompt a --compare",
            "dpo-lora generate m --prompt a --temperature -1",
            "dpo-lora generate m --prompt a --temperature nan",
            "dpo-lora generate m --prompt a --count 0",
            "dpo-lora export r out",
            "dpo-lora export r out --to gguf",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        let Command::Export(args) = parse("dpo-lora export r --to peft o --dtype f32").unwrap().command else {
            panic!("not export")
        };
        assert_eq!(args.check().unwrap_err().exit_code(), 2);
        let revised = |model: &str, revision: &str| {
            let line = format!("dpo-lora generate {model} --revision {revision} --prompt a");
            let Command::Generate(args) = parse(&line).unwrap().command else { panic!("not generate") };
            args.check().map_err(|error| (error.exit_code(), error.to_string().contains("--revision")))
        };
        assert_eq!(revised("assets/quickstart", "v1"), Err((2, true)));
        assert_eq!(revised("assets/quickstart", "main"), Ok(()));
        assert_eq!(revised("owner/name", "v1"), Ok(()));
    }

    #[test]
    fn a_folder_in_the_current_one_is_a_folder() {
        let here = std::env::current_dir().unwrap();
        let model = |line: &str| match parse(line).unwrap().command {
            Command::Generate(args) => args.model,
            Command::Quantize(args) => args.model,
            Command::Export(args) => args.base.unwrap(),
            _ => panic!("no model"),
        };
        for line in ["generate NAME --prompt a", "quantize NAME --to nf4 out", "export r --to peft out --base NAME"] {
            let named = |name: &str| model(&format!("dpo-lora {}", line.replace("NAME", name)));
            assert_eq!(Path::new(&named("assets/quickstart")), here.join("assets/quickstart"), "{line}");
            assert_eq!(named("owner/name"), "owner/name", "{line}");
        }
    }
}
