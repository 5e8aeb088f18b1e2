//! What threads hold for products after the first: packed panels of either side stay for the next ones.

use super::{compute::Compute, gemm, thin::THIN_ROWS};

/// Bytes that `threads` threads hold for products of `tokens` rows with matrices of up to `widest` inputs or outputs and
/// adapters of up to this rank on these; going `backward`, also for the adapters' gradients.
pub fn products(tokens: usize, widest: usize, rank: usize, threads: usize, compute: Compute, backward: bool) -> usize {
    let wide = widest.min(gemm::BLOCK);
    let left = (tokens * wide).max(if backward { widest * tokens.min(gemm::BLOCK) } else { 0 });
    // as many columns are decoded on the way to their panels as a panel has
    let right = (gemm::PANELS + 1) * 32 * wide;
    let packed = (left + threads * right) * size_of::<u32>();
    #[cfg(target_arch = "x86_64")]
    if super::amx::available() {
        // what is left for the general product then: adapters that are not thin
        let adapters = if rank > THIN_ROWS { packed } else { 0 };
        return adapters + super::tiles::held(tokens, widest, threads, compute, backward);
    }
    let _ = (rank, compute);
    packed
}
