//! The run: epochs, steps, evaluation, signals, logs, checkpoints.
//!
//! [`open`] begins a run, [`run`] is its loop, `skip` leaves out a step, `leave` is its end. They stand on [`rows`],
//! [`base`] (the frozen model and its tokenizer), [`adapters`] (what learns, to and from PEFT's folders), [`pairs`] (a
//! batch's log-probs and gradients), [`mod@reference`] (what the policy is held to), [`samples`], [`steps`] (which
//! pairs a step takes), [`budget`] (what the run holds, and the plan that keeps it), and on [`folder`], [`mod@lock`],
//! [`identity`], [`checkpoint`], [`signals`] and [`watch`], which make a stopped run resumable. [`device`] chooses
//! where it computes, [`difference`] measures what a merge changes, [`origin`] says of an adapter what it was trained
//! on.

pub mod adapters;
pub mod base;
pub mod budget;
pub mod checkpoint;
pub mod device;
pub mod difference;
pub mod folder;
pub mod identity;
mod leave;
pub mod lock;
pub mod open;
pub mod origin;
pub mod pairs;
pub mod reference;
pub mod rows;
pub mod run;
pub mod samples;
pub mod signals;
mod skip;
pub mod steps;
pub mod watch;
