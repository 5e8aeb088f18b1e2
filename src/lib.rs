//! `dpo-lora`: preference alignment (DPO) of a language model by LoRA, in the memory a person has.
//!
//! Follow the data: [`recipe`] → [`data`] → [`weights`] → [`model`] → [`engine`] → [`objective`] → [`optim`] →
//! [`train`] → [`export`]. Beside them: [`cli`] has the commands, [`hub`] fetches models and files, [`kernels`]
//! compute, [`report`] tells, [`store`] writes; [`heap`] is the memory, [`confined`] and `outside` bound what
//! strangers' files may take of it; `keys` reads JSON, `sha256` hashes files, [`random`] draws numbers.

pub mod cli;
pub mod confined;
pub mod data;
pub mod engine;
pub mod error;
pub mod export;
pub mod heap;
pub mod hub;
pub mod kernels;
mod keys;
pub mod model;
pub mod objective;
pub mod optim;
mod outside;
pub mod random;
pub mod recipe;
pub mod report;
mod sha256;
pub mod store;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
