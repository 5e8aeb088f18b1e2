//! The second half of a layer: norm, a wide middle, the way back to the residual.

use candle_core::{Result, Tensor};

use super::{
    join::Join,
    linear::{Linear, Through},
    norm::Norm,
    parts::{Parts, Thins},
};
use crate::kernels::{
    activation::{self, Activation},
    sum::add,
};

/// The frozen parts of a layer's MLP.
#[derive(Debug)]
pub struct Mlp {
    /// Before it; none: its input is used as it is.
    pub norm: Option<Norm>,
    /// What widens.
    pub up: Up,
    /// Between the matrices.
    pub activation: Activation,
    /// `[hidden, intermediate]`.
    pub down: Linear,
    /// What becomes of its output.
    pub join: Join,
}

/// The matrices that read the input, all `[intermediate, hidden]`.
#[derive(Debug)]
pub enum Up {
    /// `f(gate(x)) · up(x)`.
    Gated(Parts<2>),
    /// `f(up(x))`.
    Plain(Parts<1>),
}

/// What led to the last product.
pub struct Inner {
    /// The normed input `[tokens, hidden]`, unless it is to be computed again.
    normed: Option<Tensor>,
    thins: Thins,
    wide: Wide,
    /// What remains to be done from.
    pub last: Last,
}

/// What the last product reads.
pub struct Last {
    /// `[tokens, intermediate]`, unless it is to be computed again.
    act: Option<Tensor>,
    thin: Option<Tensor>,
    /// Where a norm follows, what it reads: then the last product is done.
    output: Option<Tensor>,
}

/// What the activation read.
enum Wide {
    Gated([Tensor; 2]),
    Plain([Tensor; 1]),
}

impl Inner {
    /// Lets go of what costs little to compute again.
    pub fn slim(&mut self) {
        (self.normed, self.last.act) = (None, None);
    }
}

impl Mlp {
    /// Its linear layers, in the order of their numbers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let up = match &self.up {
            Up::Gated(parts) => parts.linears(),
            Up::Plain(parts) => parts.linears(),
        };
        up.iter().chain([&self.down])
    }

    /// The way up to the last product, and that product only where a norm follows it.
    pub fn inner(&self, x: &Tensor, through: Through) -> Result<Inner> {
        let normed = self.normed(x)?;
        let (wide, thins) = match &self.up {
            Up::Gated(parts) => {
                let (wide, thins) = parts.forward(&normed, through)?;
                (Wide::Gated(wide), thins)
            }
            Up::Plain(parts) => {
                let (wide, thins) = parts.forward(&normed, through)?;
                (Wide::Plain(wide), thins)
            }
        };
        let act = self.activated(&wide)?;
        let thin = self.down.thin(&act, through)?;
        let output = match &self.join.norm {
            Some(_) => Some(self.down.apply(&act, thin.as_ref(), through)?),
            None => None,
        };
        Ok(Inner { normed: Some(normed), thins, wide, last: Last { act: Some(act), thin, output } })
    }

    fn normed(&self, x: &Tensor) -> Result<Tensor> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => Ok(x.clone()),
        }
    }

    fn activated(&self, wide: &Wide) -> Result<Tensor> {
        match wide {
            Wide::Gated([gate, up]) => activation::gated(self.activation, gate, up),
            Wide::Plain([up]) => activation::apply(self.activation, up),
        }
    }

    /// `residual` with this half's output added.
    pub fn add(&self, residual: &Tensor, last: &Last, through: Through) -> Result<Tensor> {
        match (&last.output, &last.act) {
            (Some(output), _) => self.join.forward(residual, output),
            (None, Some(act)) => self.join.forward(residual, &self.down.apply(act, last.thin.as_ref(), through)?),
            (None, None) => candle_core::bail!("the last product's input was let go of"),
        }
    }

    /// The gradient that reaches this half's input `x`: `d`, what reaches it past this half, and what `d` as the
    /// gradient of this half's output adds.
    pub fn backward(&self, x: &Tensor, inner: Inner, d: &Tensor, through: Through) -> Result<Tensor> {
        let Inner { normed, thins, wide, last: Last { act, thin, output } } = inner;
        let d_output = self.join.backward(output.as_ref(), d)?;
        drop(output);
        let act = act.map_or_else(|| self.activated(&wide), Ok)?;
        let d_act = self.down.backward(&act, thin.as_ref(), &d_output, through)?;
        drop((act, d_output));
        let normed = || normed.map_or_else(|| self.normed(x), Ok);
        let d_normed = match (&self.up, wide) {
            (Up::Gated(parts), Wide::Gated([gate, up])) => {
                let (d_gate, d_up) = activation::gated_backward(self.activation, &gate, &up, &d_act)?;
                drop((gate, up, d_act));
                parts.backward(&normed()?, &thins, [d_gate, d_up], through)?
            }
            (Up::Plain(parts), Wide::Plain([up])) => {
                let d_up = activation::backward(self.activation, &up, &d_act)?;
                drop((up, d_act));
                parts.backward(&normed()?, &thins, [d_up], through)?
            }
            _ => candle_core::bail!("what an MLP kept is another's"),
        };
        match &self.norm {
            Some(norm) => norm.backward(x, &d_normed, d),
            None => add(&d_normed, d),
        }
    }
}
