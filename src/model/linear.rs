//! A linear layer: a frozen matrix, perhaps a bias, perhaps an adapter.

use std::ops::Range;

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
    /// Rows whose gradients are summed apart before they are added up, so that a sum has the same bits however pairs
    /// are cut into micro-batches; none: all rows at once. Only the backward pass looks at them.
    pub runs: Option<&'a [Range<usize>]>,
}

impl<'a> Through<'a> {
    /// The base with an adapter, or bare; nothing is dropped.
    pub fn of(adapter: Option<&'a Adapter>) -> Self {
        Self { adapter, ..Self::default() }
    }
}

impl Linear {
    /// `A · dropout(x)`: `[tokens, r]`, where this layer is adapted.
    pub fn thin(&self, x: &Tensor, through: Through) -> Result<Option<Tensor>> {
        let Some(lora) = through.adapter.and_then(|adapter| adapter.layer(self.id)) else { return Ok(None) };
        let (a, compute) = (lora.a.t()?, self.weight.compute());
        match through.dropout {
            Some(dropout) => product(1.0, &dropout.apply(x, self.id)?, &a, compute),
            None => product(1.0, x, &a, compute),
        }
        .map(Some)
    }

    /// `W·x + bias + scale · B·thin`.
    pub fn apply(&self, x: &Tensor, thin: Option<&Tensor>, through: Through) -> Result<Tensor> {
        self.finished(self.weight.apply(x)?, thin, through)
    }

    /// [`Linear::apply`] of layers that read the same input.
    pub fn apply_all(layers: &[Self], x: &Tensor, thins: &[Option<Tensor>], through: Through) -> Result<Vec<Tensor>> {
        let weights: Vec<_> = layers.iter().map(|layer| &layer.weight).collect();
        let ys = FrozenMatrix::apply_all(&weights, x)?;
        layers.iter().zip(ys).zip(thins).map(|((layer, y), thin)| layer.finished(y, thin.as_ref(), through)).collect()
    }

    /// `y + bias + scale · B·thin`.
    fn finished(&self, mut y: Tensor, thin: Option<&Tensor>, through: Through) -> Result<Tensor> {
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let (Some(thin), Some(lora)) = (thin, through.adapter.and_then(|adapter| adapter.layer(self.id))) {
            add_product(&y, lora.scale, thin, &lora.b.t()?, self.weight.compute())?;
        }
        Ok(y)
    }

    /// The gradient that reaches `x`; adds those of A and B to the adapter's.
    pub fn backward(&self, x: &Tensor, thin: Option<&Tensor>, dy: &Tensor, through: Through) -> Result<Tensor> {
        let dx = FrozenMatrix::backward_all(&[&self.weight], &[dy])?;
        self.backward_of_adapter(x, thin, dy, &dx, through)?;
        Ok(dx)
    }

    /// [`Linear::backward`] of layers that read the same input.
    pub fn backward_all(
        layers: &[Self],
        x: &Tensor,
        thins: &[Option<Tensor>],
        dys: &[Tensor],
        through: Through,
    ) -> Result<Tensor> {
        let weights: Vec<_> = layers.iter().map(|layer| &layer.weight).collect();
        let dx = FrozenMatrix::backward_all(&weights, &dys.iter().collect::<Vec<_>>())?;
        for ((layer, thin), dy) in layers.iter().zip(thins).zip(dys) {
            layer.backward_of_adapter(x, thin.as_ref(), dy, &dx, through)?;
        }
        Ok(dx)
    }

    /// The adapter's share: adds to `dx` and to the gradients of A and B.
    fn backward_of_adapter(
        &self,
        x: &Tensor,
        thin: Option<&Tensor>,
        dy: &Tensor,
        dx: &Tensor,
        through: Through,
    ) -> Result<()> {
        let Some((thin, lora)) = thin.zip(through.adapter.and_then(|adapter| adapter.layer(self.id))) else {
            return Ok(());
        };
        let compute = self.weight.compute();
        let d_thin = product(lora.scale, dy, &lora.b, compute)?;
        let whole = 0..x.dim(0)?;
        let runs = through.runs.unwrap_or(std::slice::from_ref(&whole));
        // each run's sum is a product of its own
        let add_runs = |sum: &Tensor, scale: f64, left: &Tensor, right: &Tensor| {
            runs.iter().try_for_each(|run| {
                let rows = |x: &Tensor| x.narrow(0, run.start, run.len());
                add_product(sum, scale, &rows(left)?.t()?, &rows(right)?, compute)
            })
        };
        add_runs(&lora.db, lora.scale, dy, thin)?;
        match through.dropout {
            Some(dropout) => {
                add_runs(&lora.da, 1.0, &d_thin, &dropout.apply(x, self.id)?)?;
                let through_mask = dropout.apply(&product(1.0, &d_thin, &lora.a, compute)?, self.id)?;
                let sum = (dx + through_mask)?;
                dx.slice_set(&sum, 0, 0)
            }
            None => {
                add_runs(&lora.da, 1.0, &d_thin, x)?;
                add_product(dx, 1.0, &d_thin, &lora.a, compute)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::oracle::{gradients_hold, random, worst},
        model::lora::Shape,
        random::Stream,
    };

    const SCALE: f64 = 1.5;

    /// The second of two layers, 14 → 10, and an adapter of rank 3 for it alone.
    fn inputs() -> (Linear, Adapter, Tensor) {
        let (weight, bias) = (FrozenMatrix::of(&random((10, 14), 1)), Some(random(10, 2)));
        let shape = Shape { module: "down".into(), linear: 1, r: 3, scale: SCALE, inputs: 14, outputs: 10 };
        let adapter = Adapter::zeros(vec![shape], 2, &candle_core::Device::Cpu).unwrap();
        adapter.set(random(3 * (14 + 10), 3).to_vec1().unwrap()).unwrap();
        (Linear { name: "down".into(), id: 1, weight, bias }, adapter, random((6, 14), 4))
    }

    fn form([x, dropped, a, b]: [&Tensor; 4]) -> Result<Tensor> {
        let (w, bias) = (random((10, 14), 1).to_dtype(x.dtype())?, random(10, 2).to_dtype(x.dtype())?);
        let update = (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * SCALE)?;
        x.matmul(&w.t()?)?.broadcast_add(&bias)? + update
    }

    #[test]
    fn forward_and_backward_hold_with_and_without_dropout() -> Result<()> {
        let (linear, adapter, x) = inputs();
        let lora = adapter.layer(1).unwrap();
        let dropout = Dropout { p: 0.4, stream: Stream::new(1, "dropout"), first_row: 3 };
        for dropout in [None, Some(dropout)] {
            let through = Through { dropout, ..Through::of(Some(&adapter)) };
            let mask = match dropout {
                Some(dropout) => dropout.apply(&x.ones_like()?, 1)?,
                None => x.ones_like()?,
            };
            let form = |[x, a, b]: [&Tensor; 3]| form([x, &(x * mask.to_dtype(x.dtype())?)?, a, b]);
            let thin = linear.thin(&x, through)?;
            let y = linear.apply(&x, thin.as_ref(), through)?;
            assert!(worst(&y, &form([&x, &lora.a, &lora.b])?) < 5e-6);

            let dy = random((6, 10), 6);
            adapter.clear_grads().unwrap();
            let dx = linear.backward(&x, thin.as_ref(), &dy, through)?;
            let ours = [&dx, &lora.da, &lora.db];
            gradients_hold(ours, [&x, &lora.a, &lora.b], &dy, form, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn gradients_add_up() -> Result<()> {
        let (linear, adapter, x) = inputs();
        let (through, dy) = (Through::of(Some(&adapter)), random((6, 10), 6));
        let mut sums = vec![];
        for _ in 0..2 {
            let thin = linear.thin(&x, through)?;
            linear.backward(&x, thin.as_ref(), &dy, through)?;
            sums.push(adapter.grads.copy()?);
        }
        assert!(worst(&sums[1], &(&sums[0] * 2.0)?) < 1e-5);
        Ok(())
    }

    #[test]
    fn without_an_adapter_the_base_alone_counts() -> Result<()> {
        let (linear, adapter, x) = inputs();
        // an adapter that has nothing for this layer is none
        let other = Linear { id: 0, ..linear };
        let dy = random((6, 10), 6);
        for adapter in [None, Some(&adapter)] {
            let through = Through::of(adapter);
            assert!(other.thin(&x, through)?.is_none());
            let none = random((1, 1), 7).zeros_like()?;
            let (a, b) = (none.expand((3, 14))?.contiguous()?, none.expand((10, 3))?.contiguous()?);
            assert!(worst(&other.apply(&x, None, through)?, &form([&x, &x, &a, &b])?) < 5e-6);
            let dx = other.backward(&x, None, &dy, through)?;
            assert!(worst(&dx, &dy.matmul(&random((10, 14), 1))?) < 5e-6);
        }
        assert_eq!(worst(&adapter.grads, &adapter.grads.zeros_like()?), 0.0);
        Ok(())
    }
}
