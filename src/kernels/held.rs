//! What threads hold for products after the first: packed panels of either side stay for the next ones.

use super::{compute::Compute, gemm};

/// Bytes that `threads` threads hold for products of `tokens` rows with matrices of up to `widest` inputs or outputs,
/// and, going `backward`, for the gradients of adapters on these.
pub fn products(tokens: usize, widest: usize, threads: usize, compute: Compute, backward: bool) -> usize {
    #[cfg(target_arch = "x86_64")]
    if super::amx::available() {
        return super::tiles::held(tokens, widest, threads, compute, backward);
    }
    let _ = compute;
    let wide = widest.min(gemm::BLOCK);
    let left = (tokens * wide).max(if backward { widest * tokens.min(gemm::BLOCK) } else { 0 });
    // as many columns are decoded on the way to their panels as a panel has
    let right = (gemm::PANELS + 1) * 32 * wide;
    (left + threads * right) * size_of::<u32>()
}
