//! What threads hold for products after the first: packed panels of either side stay for the next ones.

use std::slice::from_ref;

use super::{
    compute::Compute,
    gemm::{self, BLOCK, PANELS},
    thin,
};

/// Rows and columns that a format decodes together, whose borders a task's columns are widened to.
pub const DECODED: usize = 32;

/// How deep the left-hand sides are of the products with a model's layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// Forward: the inputs of matrices. Those of one input meet one left-hand side.
    pub forward: Vec<usize>,
    /// Backward: the outputs of matrices. Those of one input go back as one product.
    pub backward: Vec<Vec<usize>>,
}

impl Depths {
    /// Inputs or outputs of the widest matrix.
    pub fn widest(&self) -> usize {
        self.forward.iter().chain(self.backward.iter().flatten()).copied().max().unwrap_or(0)
    }
}

/// The products of a pass.
#[derive(Debug, Clone, Copy)]
pub struct Products<'a> {
    /// Rows of a micro-batch, at most.
    pub tokens: usize,
    /// Those with the layers' matrices.
    pub depths: &'a Depths,
    /// The largest rank of an adapter.
    pub rank: usize,
    /// Where gradients are made: rows of the head at once, and its outputs.
    pub backward: Option<[usize; 2]>,
}

/// The left-hand sides of a product: the most rows, and how deep each is.
pub(super) type Lefts<'a> = (usize, &'a [usize]);

impl Products<'_> {
    /// Bytes that so many threads hold for them, at most.
    pub fn bytes(&self, threads: usize, compute: Compute) -> usize {
        let (frozen, adapter) = (|| self.frozen(), || self.adapter());
        #[cfg(target_arch = "x86_64")]
        if super::amx::available() {
            // what an adapter leaves to the general product is in f32
            let general = left(adapter(), Compute::F32) + threads * right(adapter(), Compute::F32);
            return general * size_of::<u32>() + super::tiles::held(frozen, threads, compute);
        }
        let lefts = left(frozen(), compute).max(left(adapter(), Compute::F32));
        let rights = right(frozen(), compute).max(right(adapter(), Compute::F32)) + decoded(frozen(), compute);
        (lefts + threads * rights) * size_of::<u32>()
    }

    /// With frozen matrices.
    fn frozen(&self) -> impl Iterator<Item = Lefts<'_>> {
        let Depths { forward, backward } = self.depths;
        let back = self.backward.as_ref();
        let layers =
            forward.iter().map(from_ref).chain(back.into_iter().flat_map(|_| backward.iter().map(Vec::as_slice)));
        let head = back.map(|[rows, outputs]| (*rows, from_ref(outputs)));
        layers.map(|depths| (self.tokens, depths)).chain(head)
    }

    /// With an adapter's matrices, where they are not thin enough for kernels of their own.
    fn adapter(&self) -> impl Iterator<Item = Lefts<'_>> {
        let Depths { forward, backward } = self.depths;
        let general = |most: usize| !thin::available() || self.rank > most;
        let back = || backward.iter().flatten().filter(|_| self.backward.is_some());
        // an input or a gradient times a thin matrix, and what comes of it times the other
        let wide = forward.iter().chain(back()).filter(move |_| general(thin::THIN_ROWS));
        let low = Some(&self.rank).filter(|_| general(thin::LOW_ROWS));
        let of_tokens = wide.chain(low).map(|k| (self.tokens, from_ref(k)));
        // gradients of the thin matrices: sums over a pair's tokens, of which fewer may make a deeper block
        let rows = back().max().into_iter().chain(self.backward.map(|_| &self.rank));
        let sums = rows.filter(move |_| general(thin::THIN_COLUMNS)).flat_map(|rows| {
            let most = &self.tokens;
            [most, most.min(&BLOCK)].map(|k| (*rows, from_ref(k)))
        });
        of_tokens.chain(sums)
    }
}

/// Words of what all threads pack together.
fn left<'a>(products: impl Iterator<Item = Lefts<'a>>, compute: Compute) -> usize {
    products.map(|(rows, depths)| gemm::left_words(rows, depths, compute)).max().unwrap_or(0)
}

/// Words of the panels that a thread packs at once.
fn right<'a>(products: impl Iterator<Item = Lefts<'a>>, compute: Compute) -> usize {
    PANELS * gemm::panel(compute) * steps(products, compute)
}

/// Words of what a thread decodes on the way there: a panel's columns of a block, or some rows of a task's columns.
fn decoded<'a>(products: impl Iterator<Item = Lefts<'a>>, compute: Compute) -> usize {
    let panel = gemm::panel(compute);
    (panel * steps(products, compute) * compute.per_step()).max(DECODED * (PANELS * panel + DECODED))
}

/// Steps of the deepest block.
fn steps<'a>(products: impl Iterator<Item = Lefts<'a>>, compute: Compute) -> usize {
    products.flat_map(|(_, depths)| depths).map(|k| gemm::block_steps(*k, compute)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_tokens_than_the_most_may_be_one_block() {
        let depths = Depths { forward: vec![576], backward: vec![vec![1536, 1536]] };
        let bytes =
            |tokens| Products { tokens, depths: &depths, rank: 100, backward: Some([1, 1]) }.bytes(1, Compute::F32);
        let step = |tokens: usize| bytes(tokens + 1) >= bytes(tokens);
        assert!((1..2000).all(step), "more tokens hold no less");
        // a pair of one block, in a micro-batch of a few tokens more
        assert!(bytes(BLOCK + 8) >= BLOCK * 1536 * size_of::<u32>());
    }
}
