//! A linear layer: a frozen matrix, perhaps a bias, perhaps an adapter.

use candle_core::{Result, Tensor};

use super::lora::Adapter;
use crate::{
    kernels::{
        dropout::Dropout,
        product::{add_product, product},
    },
    weights::matrix::FrozenMatrix,
};

/// A linear layer of the base.
#[derive(Debug)]
pub struct Linear {
    /// Its name, as in `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Its number in the model.
    pub id: usize,
    /// `[outputs, inputs]`.
    pub weight: FrozenMatrix,
    /// `[outputs]`.
    pub bias: Option<Tensor>,
}

/// Which adapter a pass goes through, and what is dropped on the way in.
#[derive(Debug, Clone, Copy, Default)]
pub struct Through<'a> {
    /// None: the bare base.
    pub adapter: Option<&'a Adapter>,
    /// None outside of training.
    pub dropout: Option<Dropout>,
}

impl Linear {
    /// `A · dropout(x)`: `[tokens, r]`, where this layer is adapted.
    pub fn thin(&self, x: &Tensor, through: Through) -> Result<Option<Tensor>> {
        let Some(lora) = through.adapter.and_then(|adapter| adapter.layer(self.id)) else { return Ok(None) };
        let a = lora.a.t()?;
        match through.dropout {
            Some(dropout) => product(1.0, &dropout.apply(x, self.id)?, &a),
            None => product(1.0, x, &a),
        }
        .map(Some)
    }

    /// `W·x + bias + scale · B·thin`.
    pub fn apply(&self, x: &Tensor, thin: Option<&Tensor>, through: Through) -> Result<Tensor> {
        let mut y = self.weight.apply(x)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let (Some(thin), Some(lora)) = (thin, through.adapter.and_then(|adapter| adapter.layer(self.id))) {
            add_product(&y, lora.scale, thin, &lora.b.t()?)?;
        }
        Ok(y)
    }

    /// Adds the gradient that reaches `x` to `dx`, and those of A and B to the adapter's.
    pub fn backward(
        &self,
        x: &Tensor,
        thin: Option<&Tensor>,
        dy: &Tensor,
        dx: &Tensor,
        through: Through,
    ) -> Result<()> {
        self.weight.add_backward(dx, dy)?;
        let Some((thin, lora)) = thin.zip(through.adapter.and_then(|adapter| adapter.layer(self.id))) else {
            return Ok(());
        };
        let d_thin = product(lora.scale, dy, &lora.b)?;
        add_product(&lora.db, lora.scale, &dy.t()?, thin)?;
        match through.dropout {
            Some(dropout) => {
                add_product(&lora.da, 1.0, &d_thin.t()?, &dropout.apply(x, self.id)?)?;
                let through_mask = dropout.apply(&product(1.0, &d_thin, &lora.a)?, self.id)?;
                let sum = (dx + through_mask)?;
                dx.slice_set(&sum, 0, 0)
            }
            None => {
                add_product(&lora.da, 1.0, &d_thin.t()?, x)?;
                add_product(dx, 1.0, &d_thin, &lora.a)
            }
        }
    }
}
