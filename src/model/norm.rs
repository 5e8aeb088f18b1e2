//! A norm with its frozen weights.

use candle_core::{Result, Tensor};

use crate::kernels::{
    layer_norm::{layer_norm, layer_norm_backward},
    norm::{rms_norm, rms_norm_backward},
};

/// RMSNorm, or layer norm where there is a bias.
#[derive(Debug)]
pub struct Norm {
    /// `[width]`; rows of a multiple of that are normed piece by piece.
    pub weight: Tensor,
    /// `[width]`.
    pub bias: Option<Tensor>,
    /// Added under the root.
    pub eps: f64,
}

impl Norm {
    /// The norm of `x[tokens, pieces · width]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let pieces = self.pieces(x)?;
        let y = match &self.bias {
            None => rms_norm(&pieces, &self.weight, self.eps),
            Some(bias) => layer_norm(&pieces, &self.weight, bias, self.eps),
        };
        y?.reshape(x.shape())
    }

    /// The gradient that reaches `x` through the norm, plus `residual`, the gradient that reaches it past the norm.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let (pieces, dy, residual) = (self.pieces(x)?, self.pieces(dy)?, self.pieces(residual)?);
        let dx = match &self.bias {
            None => rms_norm_backward(&pieces, &self.weight, self.eps, &dy, &residual),
            Some(_) => layer_norm_backward(&pieces, &self.weight, self.eps, &dy, &residual),
        };
        dx?.reshape(x.shape())
    }

    fn pieces(&self, x: &Tensor) -> Result<Tensor> {
        x.reshape(((), self.weight.dim(0)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    #[test]
    fn pieces_of_a_row_are_normed_for_themselves() -> Result<()> {
        let norm = Norm { weight: random(6, 1), bias: None, eps: 1e-3 };
        let (x, dy) = (random((3, 12), 2), random((3, 12), 3));
        let form = |[x]: [&Tensor; 1]| {
            let pieces = x.reshape((6, 6))?;
            let rms = (pieces.sqr()?.mean_keepdim(1)? + 1e-3)?.sqrt()?;
            pieces.broadcast_div(&rms)?.broadcast_mul(&norm.weight.to_dtype(x.dtype())?)?.reshape((3, 12))
        };
        assert!(worst(&norm.forward(&x)?, &form([&x])?) < 2e-6);
        gradients_hold([&norm.backward(&x, &dy, &dy.zeros_like()?)?], [&x], &dy, form, 1e-6)
    }
}
