//! Several products of one input: a matrix each, or one matrix for all, whose outputs are taken apart.

use candle_core::{Error, Result, Tensor};

use super::linear::{Linear, Through};

/// `N` linear maps of one input.
#[derive(Debug)]
pub enum Parts<const N: usize> {
    /// A matrix each.
    Apart([Linear; N]),
    /// One matrix: all outputs of the first, then all of the next.
    Joined {
        /// `[Σ widths, inputs]`.
        linear: Linear,
        /// Outputs of each.
        widths: [usize; N],
    },
    /// One matrix: the outputs of all for the first head, then for the next.
    ByHead {
        /// `[heads · N · dim, inputs]`.
        linear: Linear,
        /// How many heads.
        heads: usize,
    },
}

/// `A · x` of each matrix, where it is adapted.
pub type Thins = Vec<Option<Tensor>>;

impl<const N: usize> Parts<N> {
    /// The matrices, in the order of their numbers.
    pub fn linears(&self) -> &[Linear] {
        match self {
            Self::Apart(linears) => linears,
            Self::Joined { linear, .. } | Self::ByHead { linear, .. } => std::slice::from_ref(linear),
        }
    }

    /// What each part gives for `x[tokens, inputs]`.
    pub fn forward(&self, x: &Tensor, through: Through) -> Result<([Tensor; N], Thins)> {
        let linears = self.linears();
        let thins = linears.iter().map(|linear| linear.thin(x, through)).collect::<Result<Thins>>()?;
        let outputs = Linear::apply_all(linears, x, &thins, through)?;
        Ok((self.take_apart(outputs)?, thins))
    }

    /// The gradient that reaches `x` from the parts' gradients `d`. Adds those of the adapters to theirs.
    pub fn backward(&self, x: &Tensor, thins: &Thins, d: [Tensor; N], through: Through) -> Result<Tensor> {
        Linear::backward_all(self.linears(), x, thins, &self.join(d)?, through)
    }

    /// From what each matrix gives to parts.
    fn take_apart(&self, mut outputs: Vec<Tensor>) -> Result<[Tensor; N]> {
        match self {
            Self::Apart(_) => {}
            Self::Joined { widths, .. } => {
                let all = outputs.remove(0);
                let mut at = 0;
                for width in widths {
                    outputs.push(all.narrow(1, at, *width)?.contiguous()?);
                    at += width;
                }
            }
            Self::ByHead { heads, .. } => {
                let all = outputs.remove(0);
                let (tokens, width) = all.dims2()?;
                let all = all.reshape((tokens, *heads, N, width / N / heads))?;
                for part in 0..N {
                    outputs.push(all.narrow(2, part, 1)?.contiguous()?.reshape((tokens, width / N))?);
                }
            }
        }
        outputs.try_into().map_err(|outputs: Vec<Tensor>| Error::Msg(format!("{} parts of {N}", outputs.len())))
    }

    /// From the gradients of parts to those of what each matrix gives.
    fn join(&self, d: [Tensor; N]) -> Result<Vec<Tensor>> {
        match self {
            Self::Apart(_) => Ok(d.into()),
            Self::Joined { .. } => Ok(vec![Tensor::cat(&d, 1)?]),
            Self::ByHead { heads, .. } => {
                let (tokens, width) = d[0].dims2()?;
                let by_head = |d: &Tensor| d.reshape((tokens, *heads, 1, width / heads));
                let d = d.iter().map(by_head).collect::<Result<Vec<_>>>()?;
                Ok(vec![Tensor::cat(&d, 2)?.reshape((tokens, N * width))?])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        kernels::oracle::{random, worst},
        model::lora::{Adapter, Shape},
        weights::matrix::FrozenMatrix,
    };

    /// Rows of a matrix `[12, 5]` for three parts of two heads of two.
    const BY_HEAD: [[u32; 4]; 3] = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]];
    const JOINED: [[u32; 4]; 3] = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]];

    fn linear(id: usize, weight: &Tensor) -> Linear {
        Linear { name: format!("part {id}"), id, weight: FrozenMatrix::of(weight), bias: None }
    }

    fn rows(of: &Tensor, rows: &[u32]) -> Tensor {
        of.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap()
    }

    /// An adapter of rank 2 on linear layers of five inputs with these B.
    fn adapter(a: &Tensor, bs: &[Tensor]) -> Adapter {
        let shape = |(linear, b): (usize, &Tensor)| {
            let outputs = b.dim(0).unwrap();
            Shape { module: String::new(), linear, r: 2, scale: 0.5, inputs: 5, outputs }
        };
        let adapter = Adapter::zeros(bs.iter().enumerate().map(shape).collect(), bs.len(), &Device::Cpu).unwrap();
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        adapter.set(bs.iter().flat_map(|b| [numbers(a), numbers(b)].concat()).collect()).unwrap();
        adapter
    }

    #[test]
    fn one_matrix_gives_what_its_rows_give_as_matrices_of_their_own() -> Result<()> {
        let (weight, a, b) = (random((12, 5), 1), random((2, 5), 2), random((12, 2), 3));
        let (x, d) = (random((7, 5), 4), [5, 6, 7].map(|seed| random((7, 4), seed)));
        let joined = Parts::<3>::Joined { linear: linear(0, &weight), widths: [4; 3] };
        for (order, one) in [(JOINED, joined), (BY_HEAD, Parts::ByHead { linear: linear(0, &weight), heads: 2 })] {
            let apart = Parts::Apart([0, 1, 2].map(|part| linear(part, &rows(&weight, &order[part]))));
            let adapters = [adapter(&a, std::slice::from_ref(&b)), adapter(&a, &order.map(|part| rows(&b, &part)))];
            let mut seen = Vec::new();
            for (parts, adapter) in [&one, &apart].into_iter().zip(&adapters) {
                let through = Through { adapter: Some(adapter), ..Through::default() };
                let (outputs, thins) = parts.forward(&x, through)?;
                let dx = parts.backward(&x, &thins, d.clone(), through)?;
                seen.push((outputs, dx));
            }
            for (one, apart) in seen[0].0.iter().zip(&seen[1].0) {
                assert!(worst(one, apart) < 2e-6);
            }
            assert!(worst(&seen[0].1, &seen[1].1) < 5e-6);
            let [whole, apart] = &adapters;
            let whole = whole.layer(0).unwrap();
            let apart = [0, 1, 2].map(|part| apart.layer(part).unwrap());
            for (part, apart) in apart.iter().enumerate() {
                assert!(worst(&rows(&whole.db, &order[part]), &apart.db) < 5e-6);
            }
            let sum = ((&apart[0].da + &apart[1].da)? + &apart[2].da)?;
            assert!(worst(&whole.da, &sum) < 5e-6);
        }
        Ok(())
    }
}
