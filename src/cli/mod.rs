//! The commands: arguments in, printed results out; no tensors.

pub mod data_check;
