//! The arithmetic: fused operations with one implementation a device and a plain-tensor fallback.
