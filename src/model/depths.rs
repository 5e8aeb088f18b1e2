//! What the products with a model's layers meet on the left, as `linear` and `parts` form them.

use super::{block::Block, linear::Linear, mlp::Up};
use crate::kernels::held::Depths;

impl Depths {
    /// Those of these layers.
    pub fn of<'a>(blocks: impl IntoIterator<Item = &'a Block>) -> Self {
        let mut depths = Self::default();
        for Block { attention, mlp, .. } in blocks {
            let up = match &mlp.up {
                Up::Gated(parts) => parts.linears(),
                Up::Plain(parts) => parts.linears(),
            };
            let one = std::slice::from_ref::<Linear>;
            for linears in [attention.qkv.linears(), one(&attention.output), up, one(&mlp.down)] {
                depths.forward.push(linears[0].weight.inputs);
                depths.backward.push(linears.iter().map(|linear| linear.weight.outputs).collect());
            }
        }
        // most layers are alike
        depths.forward.sort_unstable();
        depths.forward.dedup();
        depths.backward.sort_unstable();
        depths.backward.dedup();
        depths
    }
}
