//! The commands: arguments in, printed results out; no tensors. One file a command.

pub mod inspect;
pub mod stdout;
