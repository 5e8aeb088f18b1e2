//! What a person sees: progress, metrics files, measured memory, the closing summary.
