//! The run: epochs, steps, evaluation, signals, logs, checkpoints.
//!
//! [`checkpoint`] makes a stopped run resumable, [`signals`] turns Ctrl-C into a flag that the loop polls.

pub mod checkpoint;
pub mod signals;
