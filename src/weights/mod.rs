//! Model folders on disk, memory-mapped: what is frozen and how it multiplies.
