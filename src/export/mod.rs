//! How a trained adapter leaves: PEFT folders and merged weights.
