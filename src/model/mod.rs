//! The decoder as a table of traits per family, forward and backward side by side; LoRA.
