//! What a layer and the head hold while they work, counted: the same steps as [`super::block`] and [`super::linear`],
//! with sizes in the place of tensors. `tests/footprint.rs` holds these numbers to an allocator that counts.

use super::{block::Block, head::Head, join::Join, linear::Linear, lora::Shape, mlp::Up};

/// The widths that decide what a layer holds, in f32 numbers a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Widths {
    /// The residual stream.
    pub hidden: usize,
    /// All query heads.
    queries: usize,
    /// All key heads; as many for values.
    keys: usize,
    heads: usize,
    mlp: usize,
    qkv: Fan,
    query_norms: bool,
    output: Side,
    up: Fan,
    down: Side,
    /// Of the attention, of the MLP.
    norms: [bool; 2],
    joins: [Way; 2],
    side_by_side: bool,
    dropout: bool,
}

/// What a linear layer has besides its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    /// Rank of its adapter; 0: none.
    r: usize,
    bias: bool,
}

/// Several products of one input.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fan {
    /// What the parts give.
    widths: Vec<usize>,
    /// Of each matrix: one a part, or one for all.
    sides: Vec<Side>,
}

/// A half's way back into the residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    norm: bool,
    scaled: bool,
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

impl Fan {
    /// What all parts give together.
    fn width(&self) -> usize {
        self.widths.iter().sum()
    }

    /// All thin products.
    fn thin(&self) -> usize {
        self.sides.iter().map(|side| side.r).sum()
    }
}

impl Widths {
    /// The widths of a layer under an adapter of these shapes.
    pub fn of(block: &Block, shapes: &[Shape], dropout: bool) -> Self {
        let side = |linear: &Linear| Side {
            r: shapes.iter().find(|shape| shape.linear == linear.id).map_or(0, |shape| shape.r),
            bias: linear.bias.is_some(),
        };
        let sides = |linears: &[Linear]| linears.iter().map(side).collect();
        let way = |join: &Join| Way { norm: join.norm.is_some(), scaled: join.scale != 1.0 };
        let Block { attention, mlp, side_by_side } = block;
        let (heads, wide) = (attention.heads, mlp.down.weight.inputs);
        let (queries, keys) = (heads.n * heads.dim, heads.kv * heads.dim);
        let up = match &mlp.up {
            Up::Gated(parts) => Fan { widths: vec![wide; 2], sides: sides(parts.linears()) },
            Up::Plain(parts) => Fan { widths: vec![wide], sides: sides(parts.linears()) },
        };
        Self {
            hidden: attention.output.weight.outputs,
            queries,
            keys,
            heads: heads.n,
            mlp: wide,
            qkv: Fan { widths: vec![queries, keys, keys], sides: sides(attention.qkv.linears()) },
            query_norms: attention.query_norms.is_some(),
            output: side(&attention.output),
            up,
            down: side(&mlp.down),
            norms: [attention.norm.is_some(), mlp.norm.is_some()],
            joins: [way(&attention.join), way(&mlp.join)],
            side_by_side: *side_by_side,
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

    /// What a layer keeps from its forward pass for its backward pass, but for its input.
    pub fn kept(&self) -> usize {
        let [attention, mlp] = self.joins.map(|way| if way.norm { self.hidden } else { 0 });
        self.projected() + self.queries + self.heads + self.output.r + attention + self.hidden + self.widened() + mlp
    }

    /// The most that a forward pass holds besides the layer's input; its output is in it.
    pub fn forward(&self) -> usize {
        let mut at = Ledger::default();
        self.project(&mut at);
        at.free(self.normed(0) + self.qkv.thin() + self.unnormed());
        at.take(self.queries + self.heads);
        at.free(self.heads + self.queries + 2 * self.keys);
        self.mix(&mut at);
        at.free(self.output.r + if self.joins[0].norm { self.hidden } else { 0 });
        self.widen(&mut at);
        at.free(self.normed(1) + self.up.thin() + self.up.width());
        self.add(&mut at);
        at.most
    }

    /// The most that a forward pass holds that keeps: what it computes on the way, and its output.
    pub fn forward_keeping(&self) -> usize {
        let mut at = self.recomputing();
        self.add(&mut at);
        at.most
    }

    /// The most that a backward pass holds besides the layer's input: what was kept, or is computed again, and the
    /// gradients at both ends are in it.
    pub fn backward(&self) -> usize {
        let mut at = self.recomputing();
        at.take(self.hidden);
        // the MLP
        let d_output = self.back_through_join(&mut at, self.joins[1]);
        at.take(self.mlp);
        self.back(&mut at, self.mlp, self.down);
        at.free(self.mlp + d_output);
        at.take(self.up.width());
        at.free(self.up.width() + self.mlp);
        self.fan_back(&mut at, self.hidden, &self.up);
        at.free(self.normed(1));
        at.take(self.hidden);
        // its thin products, its normed input's gradient, the middle
        at.free(self.up.thin() + self.down.r + 2 * self.hidden);
        if !self.side_by_side {
            at.free(self.hidden);
        }
        // the attention
        let d_output = self.back_through_join(&mut at, self.joins[0]);
        at.take(self.queries);
        self.back(&mut at, self.queries, self.output);
        at.free(d_output + if self.side_by_side { self.hidden } else { 0 });
        self.attend_back(&mut at);
        at.free(3 * self.queries + 2 * self.keys + self.heads);
        if self.query_norms {
            at.briefly(2 * self.queries);
            at.briefly(2 * self.keys);
            at.free(self.unnormed());
        }
        self.fan_back(&mut at, self.hidden, &self.qkv);
        at.take(self.hidden);
        at.most
    }

    /// The gradients of queries, keys and values; each query head has shares of its own in the latter two, until they
    /// are added up.
    fn attend_back(&self, at: &mut Ledger) {
        at.take(3 * self.queries);
        if self.queries > self.keys {
            for _ in 0..2 {
                at.take(self.keys);
                at.free(self.queries);
            }
        }
    }

    /// The ledger after everything that a backward pass needs was computed from the layer's input.
    fn recomputing(&self) -> Ledger {
        let mut at = Ledger::default();
        self.project(&mut at);
        at.take(self.queries + self.heads);
        self.mix(&mut at);
        self.widen(&mut at);
        at
    }

    /// The normed input of a half; none where the input is used as it is.
    fn normed(&self, half: usize) -> usize {
        if self.norms[half] { self.hidden } else { 0 }
    }

    /// Queries and keys before their norms.
    fn unnormed(&self) -> usize {
        if self.query_norms { self.queries + self.keys } else { 0 }
    }

    fn projected(&self) -> usize {
        self.qkv.thin() + self.unnormed() + self.queries + 2 * self.keys
    }

    fn widened(&self) -> usize {
        self.up.thin() + self.up.width() + self.down.r
    }

    fn project(&self, at: &mut Ledger) {
        at.take(self.normed(0));
        self.fan(at, self.hidden, &self.qkv);
        at.take(self.unnormed());
    }

    /// From mixed values to the middle.
    fn mix(&self, at: &mut Ledger) {
        self.thin(at, self.queries, self.output);
        self.apply(at, self.hidden, self.output);
        self.join(at, self.joins[0]);
        at.free(if self.joins[0].norm { 0 } else { self.hidden });
    }

    /// From the middle to what the last product reads; where a norm follows it, that product too.
    fn widen(&self, at: &mut Ledger) {
        at.take(self.normed(1));
        self.fan(at, self.hidden, &self.up);
        at.take(self.mlp);
        self.thin(at, self.mlp, self.down);
        if self.joins[1].norm {
            self.apply(at, self.hidden, self.down);
        }
    }

    /// The layer's output.
    fn add(&self, at: &mut Ledger) {
        if !self.joins[1].norm {
            self.apply(at, self.hidden, self.down);
        }
        self.join(at, self.joins[1]);
    }

    /// `x + scale · norm(y)`, `y` being held.
    fn join(&self, at: &mut Ledger, way: Way) {
        let on_the_way = self.hidden * (usize::from(way.norm) + usize::from(way.scaled));
        at.take(on_the_way + self.hidden);
        at.free(on_the_way);
    }

    /// From the sum's gradient to that of `y`: returns what it holds besides the former, `y` being let go of.
    fn back_through_join(&self, at: &mut Ledger, way: Way) -> usize {
        at.take(if way.scaled { self.hidden } else { 0 });
        if !way.norm {
            return if way.scaled { self.hidden } else { 0 };
        }
        at.take(2 * self.hidden);
        // the zeros, the scaled gradient, and y
        at.free(2 * self.hidden + if way.scaled { self.hidden } else { 0 });
        self.hidden
    }

    /// Several products of one input.
    fn fan(&self, at: &mut Ledger, inputs: usize, fan: &Fan) {
        let joined = fan.sides.len() < fan.widths.len();
        for (side, width) in fan.sides.iter().zip(&fan.widths) {
            self.thin(at, inputs, *side);
            self.apply(at, if joined { fan.width() } else { *width }, *side);
        }
        if joined {
            at.briefly(fan.width());
        }
    }

    /// Their way back: the gradients of the outputs go, that of the input comes.
    fn fan_back(&self, at: &mut Ledger, inputs: usize, fan: &Fan) {
        at.take(inputs);
        let joined = fan.sides.len() < fan.widths.len();
        if joined {
            at.briefly(fan.width());
        }
        for (side, width) in fan.sides.iter().zip(&fan.widths) {
            self.back(at, inputs, *side);
            at.free(if joined { fan.width() } else { *width });
        }
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

    /// The most that the backward pass of a micro-batch holds, with what was kept for it and the gradient that it
    /// gives.
    pub fn backward(&self, tokens: usize, rows: usize) -> usize {
        (5 * rows + 2 * tokens) * self.hidden
    }
}
