//! The way from the last norm to logits: a frozen matrix, perhaps a bias, perhaps a soft cap.

use candle_core::{Result, Tensor};

use crate::{
    kernels::soft_cap::{soft_cap, soft_cap_slope},
    weights::matrix::FrozenMatrix,
};

/// The output head.
#[derive(Debug)]
pub struct Head {
    /// `[vocabulary, hidden]`.
    pub weight: FrozenMatrix,
    /// `[vocabulary]`.
    pub bias: Option<Tensor>,
    /// What logits stay below, softly.
    pub cap: Option<f64>,
}

impl Head {
    /// A matrix alone.
    pub fn plain(weight: FrozenMatrix) -> Self {
        Self { weight, bias: None, cap: None }
    }

    /// Logits `[positions, vocabulary]` of the normed hidden states `h[positions, hidden]`.
    pub fn logits(&self, h: &Tensor) -> Result<Tensor> {
        let mut logits = self.weight.apply(h)?;
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(bias)?;
        }
        match self.cap {
            Some(cap) => soft_cap(logits, cap),
            None => Ok(logits),
        }
    }

    /// The derivative of each logit by what it was before the cap; none where there is no cap.
    pub fn cap_slope(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        self.cap.map(|cap| soft_cap_slope(logits, cap)).transpose()
    }

    /// Adds to `dh` what the gradient `d_logits` gives, `cap_slope` being that of [`Head::cap_slope`].
    pub fn add_backward(&self, dh: &Tensor, d_logits: Tensor, cap_slope: Option<Tensor>) -> Result<()> {
        match cap_slope {
            Some(slope) => self.weight.add_backward(dh, &(d_logits * slope)?),
            None => self.weight.add_backward(dh, &d_logits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{gradients_hold, random, worst};

    #[test]
    fn bias_and_cap_hold_forward_and_backward() -> Result<()> {
        let (w, b, h, dy) = (random((30, 12), 1), random(30, 2), random((4, 12), 3), random((4, 30), 4));
        for (bias, cap) in [(None, None), (Some(&b), None), (None, Some(2.0)), (Some(&b), Some(0.5))] {
            let head = Head { weight: FrozenMatrix::of(&w), bias: bias.cloned(), cap };
            let form = |[h]: [&Tensor; 1]| {
                let mut y = h.matmul(&w.to_dtype(h.dtype())?.t()?)?;
                if let Some(bias) = bias {
                    y = y.broadcast_add(&bias.to_dtype(h.dtype())?)?;
                }
                match cap {
                    Some(cap) => (y / cap)?.tanh()? * cap,
                    None => Ok(y),
                }
            };
            let logits = head.logits(&h)?;
            assert!(worst(&logits, &form([&h])?) < 5e-6);
            let dh = h.zeros_like()?;
            head.add_backward(&dh, dy.copy()?, head.cap_slope(&logits)?)?;
            gradients_hold([&dh], [&h], &dy, form, 2e-6)?;
        }
        Ok(())
    }
}
