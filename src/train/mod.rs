//! The run: epochs, steps, evaluation, signals, logs, checkpoints.
