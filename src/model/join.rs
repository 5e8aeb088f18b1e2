//! Where a half of a layer joins the residual stream: `x + scale · norm(y)`.

use candle_core::{Result, Tensor};

use super::norm::Norm;
use crate::kernels::sum::add;

/// What is done to a half's output on its way into the residual.
#[derive(Debug)]
pub struct Join {
    /// Gemma's and OLMo's norm after a half.
    pub norm: Option<Norm>,
    /// Granite's multiplier; else 1.
    pub scale: f64,
}

impl Join {
    /// `x + scale · norm(y)`.
    pub fn forward(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        match &self.norm {
            Some(norm) => add(x, &self.scaled(&norm.forward(y)?)?),
            None => add(x, &self.scaled(y)?),
        }
    }

    /// The gradient that reaches `y` from the gradient `d` of the sum. `y` is needed where there is a norm.
    pub fn backward(&self, y: Option<&Tensor>, d: &Tensor) -> Result<Tensor> {
        let d = self.scaled(d)?;
        match self.norm.as_ref().zip(y) {
            Some((norm, y)) => norm.backward(y, &d, &d.zeros_like()?),
            None => Ok(d),
        }
    }

    fn scaled(&self, y: &Tensor) -> Result<Tensor> {
        if self.scale == 1.0 { Ok(y.clone()) } else { y * self.scale }
    }
}
