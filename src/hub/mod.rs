//! Models and data files by their hub names, in the public cache layout.
