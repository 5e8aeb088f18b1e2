//! The command line: parse, run one command, report, exit.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use dpo_lora::{confined::Allocator, heap::Heap};

/// Large blocks are resident as long as they are used, so that the plan of a run can be kept; chat templates and
/// tokenizers have a bound.
#[global_allocator]
static ALLOCATOR: Allocator<Heap> = Allocator::over(Heap);

fn main() -> ExitCode {
    dpo_lora::heap::one_for_all_threads();
    // A usage error ends the process here, with exit code 2.
    let args = dpo_lora::cli::args::Args::parse();
    match dpo_lora::cli::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where stderr is closed there is nobody left to tell; the exit code says it.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
