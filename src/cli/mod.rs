//! The commands: arguments in, printed results out; no tensors. One file a command.

pub mod args;
pub mod data_check;
pub mod eval;
pub mod export;
pub mod generate;
pub mod inspect;
pub mod plan;
pub mod quantize;
pub mod stdout;
pub mod train;

use clap::CommandFactory;

use crate::Result;
use args::{Args, Command, DataCommand};

/// Runs one command.
///
/// # Errors
/// Whatever stopped the command; [`crate::Error::exit_code`] says how the process ends.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Train(args) => train::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => {
            args.check()?;
            generate::run(args)
        }
        Command::Export(args) => {
            args.check()?;
            export::run(args)
        }
        Command::Data { command: DataCommand::Check(args) } => data_check::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "dpo-lora", &mut script);
            stdout::write(&script)
        }
    }
}
