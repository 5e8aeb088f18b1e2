//! What threads hold for products after the first: packed panels of either side stay for the next ones.

use super::{compute::Compute, gemm, thin};

/// The products of a pass.
#[derive(Debug, Clone, Copy)]
pub struct Products {
    /// Rows of a micro-batch.
    pub tokens: usize,
    /// Inputs or outputs of the widest matrix of a layer.
    pub widest: usize,
    /// The largest rank of an adapter.
    pub rank: usize,
    /// Where gradients are made: rows of the head at once, and its outputs.
    pub backward: Option<[usize; 2]>,
}

impl Products {
    /// Bytes that so many threads hold for them.
    pub fn bytes(&self, threads: usize, compute: Compute) -> usize {
        let Self { tokens, widest, rank, backward } = *self;
        let wide = widest.min(gemm::BLOCK);
        let thin = rank <= thin::THIN_ROWS && thin::available();
        // the largest left side; each by its rows and its depth
        let left = match backward {
            Some([rows, outputs]) => [
                // the gradients of a gate and of what it gates, which go back as one
                (tokens, 2 * widest),
                // an adapter's input, transposed, where the gradient of A is no thin product
                (if thin { 0 } else { widest }, tokens),
                // the gradients of logits
                (rows, outputs),
            ]
            .map(|(m, k)| gemm::left_words(m, k))
            .into_iter()
            .fold(0, usize::max),
            None => gemm::left_words(tokens, widest),
        };
        // as many columns are decoded on the way to their panels as a panel has
        let right = (gemm::PANELS + 1) * 32 * wide;
        let packed = (left + threads * right) * size_of::<u32>();
        #[cfg(target_arch = "x86_64")]
        if super::amx::available() {
            // adapters that are not thin are left for the general product then
            let general = if thin { 0 } else { packed };
            return general + super::tiles::held(self, threads, compute);
        }
        let _ = compute;
        packed
    }
}
