//! The commands: arguments in, printed results out; no tensors.
