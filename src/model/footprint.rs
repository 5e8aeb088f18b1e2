//! What a layer and the head hold while they work, counted: the same steps as [`super::block`] and [`super::linear`], with
//! sizes in the place of tensors. `tests/footprint.rs` holds these numbers to an allocator that counts.

use super::{block::Block, head::Head, lora::Shape};

/// The widths that decide what a layer holds, in f32 numbers a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// The residual stream.
    pub hidden: usize,
    /// All query heads.
    queries: usize,
    /// All key heads; as many for values.
    keys: usize,
    mlp: usize,
    heads: usize,
    q: Side,
    k: Side,
    v: Side,
    o: Side,
    gate: Side,
    up: Side,
    down: Side,
    dropout: bool,
}

/// What a linear layer has besides its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    /// Rank of its adapter; 0: none.
    r: usize,
    bias: bool,
}

/// What is held, and the most that ever was.
#[derive(Debug, Default)]
struct Ledger {
    held: usize,
    most: usize,
}

impl Ledger {
    fn take(&mut self, numbers: usize) {
        self.held += numbers;
        self.most = self.most.max(self.held);
    }

    fn free(&mut self, numbers: usize) {
        self.held -= numbers;
    }

    /// Something that is gone when the step is over.
    fn briefly(&mut self, numbers: usize) {
        self.take(numbers);
        self.free(numbers);
    }
}

impl Widths {
    /// The widths of a layer under an adapter of these shapes.
    pub fn of(block: &Block, shapes: &[Shape], dropout: bool) -> Self {
        let side = |linear: &super::linear::Linear| Side {
            r: shapes.iter().find(|shape| shape.linear == linear.id).map_or(0, |shape| shape.r),
            bias: linear.bias.is_some(),
        };
        Self {
            hidden: block.o_proj.weight.outputs,
            queries: block.q_proj.weight.outputs,
            keys: block.k_proj.weight.outputs,
            mlp: block.gate_proj.weight.outputs,
            heads: block.heads.n,
            q: side(&block.q_proj),
            k: side(&block.k_proj),
            v: side(&block.v_proj),
            o: side(&block.o_proj),
            gate: side(&block.gate_proj),
            up: side(&block.up_proj),
            down: side(&block.down_proj),
            dropout,
        }
    }

    /// Keys and values of a token, as sampling caches them.
    pub fn cached(&self) -> usize {
        2 * self.keys
    }

    /// Cosines and sines of a token's angles.
    pub fn angles(&self) -> usize {
        self.queries / self.heads
    }

    /// What the layer keeps for its backward pass, but for its input.
    pub fn kept(&self) -> usize {
        self.projected() + self.queries + self.heads + self.gated()
    }

    /// The most that a forward pass holds besides the layer's input; its output is in it.
    pub fn forward(&self) -> usize {
        let mut at = Ledger::default();
        self.project(&mut at);
        at.free(self.hidden + self.q.r + self.k.r + self.v.r);
        at.take(self.queries + self.heads);
        at.free(self.heads + self.queries + 2 * self.keys);
        self.gate(&mut at);
        at.free(self.hidden + self.o.r + self.gate.r + self.up.r + 2 * self.mlp);
        self.apply(&mut at, self.hidden, self.down);
        at.take(self.hidden);
        at.most
    }

    /// The most that a forward pass holds that keeps: what is kept and the output are in it.
    pub fn forward_keeping(&self) -> usize {
        let mut at = self.recomputing();
        self.apply(&mut at, self.hidden, self.down);
        at.take(self.hidden);
        at.most
    }

    /// The most that a backward pass holds besides the layer's input: what was kept, or is computed again, and the
    /// gradients at both ends are in it.
    pub fn backward(&self) -> usize {
        let mut at = self.recomputing();
        at.take(self.hidden);
        // the MLP
        at.take(self.mlp);
        self.back(&mut at, self.mlp, self.down);
        at.free(self.mlp);
        at.take(2 * self.mlp);
        at.free(3 * self.mlp);
        at.take(self.hidden);
        self.back(&mut at, self.hidden, self.gate);
        self.back(&mut at, self.hidden, self.up);
        at.free(2 * self.mlp + self.hidden);
        at.take(self.hidden + self.queries);
        self.back(&mut at, self.queries, self.o);
        // the second half's rest: thin products, middle, the gradients of the MLP's norm and of the output
        at.free(self.o.r + self.gate.r + self.up.r + self.down.r + 3 * self.hidden);
        // the attention
        at.take(self.queries + 2 * self.keys);
        at.take(self.hidden);
        for side in [self.q, self.k, self.v] {
            self.back(&mut at, self.hidden, side);
        }
        at.take(self.hidden);
        at.most
    }

    /// The ledger after everything that is kept was computed from the layer's input.
    fn recomputing(&self) -> Ledger {
        let mut at = Ledger::default();
        self.project(&mut at);
        at.take(self.queries + self.heads);
        self.gate(&mut at);
        at
    }

    fn projected(&self) -> usize {
        self.hidden + self.q.r + self.k.r + self.v.r + self.queries + 2 * self.keys
    }

    fn gated(&self) -> usize {
        2 * self.hidden + self.o.r + self.gate.r + self.up.r + 3 * self.mlp + self.down.r
    }

    fn project(&self, at: &mut Ledger) {
        at.take(self.hidden);
        for (outputs, side) in [(self.queries, self.q), (self.keys, self.k), (self.keys, self.v)] {
            self.thin(at, self.hidden, side);
            self.apply(at, outputs, side);
        }
    }

    fn gate(&self, at: &mut Ledger) {
        self.thin(at, self.queries, self.o);
        self.apply(at, self.hidden, self.o);
        at.take(self.hidden);
        at.free(self.hidden);
        at.take(self.hidden);
        for side in [self.gate, self.up] {
            self.thin(at, self.hidden, side);
            self.apply(at, self.mlp, side);
        }
        at.take(self.mlp);
        self.thin(at, self.mlp, self.down);
    }

    /// A linear layer's thin product.
    fn thin(&self, at: &mut Ledger, inputs: usize, side: Side) {
        if side.r > 0 {
            if self.dropout {
                // a mask, and what it lets through
                at.briefly(2 * inputs);
                at.take(inputs + side.r);
                at.free(inputs);
            } else {
                at.take(side.r);
            }
        }
    }

    /// A linear layer's product.
    fn apply(&self, at: &mut Ledger, outputs: usize, side: Side) {
        at.take(outputs);
        if side.bias {
            at.briefly(outputs);
        }
    }

    /// A linear layer's backward pass.
    fn back(&self, at: &mut Ledger, inputs: usize, side: Side) {
        if side.r > 0 {
            at.take(side.r);
            if self.dropout {
                // the thin gradient's way back, a mask, and what it lets through
                at.briefly(3 * inputs);
            }
            at.free(side.r);
        }
    }
}

/// What decides how much the head holds, in f32 numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadWidths {
    hidden: usize,
    vocabulary: usize,
    bias: bool,
    cap: bool,
}

impl HeadWidths {
    /// The widths of a head.
    pub fn of(head: &Head) -> Self {
        Self {
            hidden: head.weight.inputs,
            vocabulary: head.weight.outputs,
            bias: head.bias.is_some(),
            cap: head.cap.is_some(),
        }
    }

    /// How many tokens the head knows.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The most that is held while `rows` positions are scored, the logits of `chunk` of them at once. The last layer's
    /// output is not in it; what the backward pass needs is.
    pub fn score(&self, rows: usize, chunk: usize, gradient: bool) -> usize {
        let states = if gradient { 3 } else { 2 };
        let logits = match (self.cap, gradient) {
            // the slope of the cap, and the gradient on both sides of it
            (true, true) => 3,
            _ if self.bias => 2,
            _ => 1,
        };
        states * rows * self.hidden + logits * rows.min(chunk) * self.vocabulary
    }

    /// What remains for the backward pass.
    pub fn kept(&self, rows: usize) -> usize {
        2 * rows * self.hidden
    }

    /// The most that the backward pass of a micro-batch holds, with what was kept for it and the gradient that it gives.
    pub fn backward(&self, tokens: usize, rows: usize) -> usize {
        (5 * rows + 2 * tokens) * self.hidden
    }
}
