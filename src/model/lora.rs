//! The matrices that learn (Hu et al. 2021): for an adapted layer, `y = W·x + scale · B·(A·x)`.
//!
//! All of them lie in one flat tensor, their gradients in another, so that clipping and the optimizer are one pass.

use candle_core::{DType, Device, Tensor};

use crate::{Result, random::Stream};

/// Which layer is adapted, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// The layer's name, as in `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The layer's number in the model.
    pub linear: usize,
    /// Rank.
    pub r: usize,
    /// What the update is multiplied with.
    pub scale: f64,
    /// The layer's inputs.
    pub inputs: usize,
    /// The layer's outputs.
    pub outputs: usize,
}

/// The matrices of one layer and their gradients: views of the flat tensors.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `[r, inputs]`.
    pub a: Tensor,
    /// `[outputs, r]`.
    pub b: Tensor,
    /// Gradient of `a`.
    pub da: Tensor,
    /// Gradient of `b`.
    pub db: Tensor,
    /// What the update is multiplied with.
    pub scale: f64,
}

/// A whole adapter.
#[derive(Debug)]
pub struct Adapter {
    /// The layers, in the order of their matrices.
    pub shapes: Vec<Shape>,
    /// All matrices: for each layer A, then B.
    pub values: Tensor,
    /// Their gradients.
    pub grads: Tensor,
    layers: Vec<Option<Lora>>,
}

impl Shape {
    fn len(&self) -> usize {
        self.r * (self.inputs + self.outputs)
    }
}

impl Adapter {
    /// An adapter of zeros on `device` for a model of `linears` layers.
    pub fn zeros(shapes: Vec<Shape>, linears: usize, device: &Device) -> Result<Self> {
        let total = shapes.iter().map(Shape::len).sum::<usize>();
        let values = Tensor::zeros(total, DType::F32, device)?;
        let grads = values.zeros_like()?;
        let mut layers = vec![None; linears];
        let mut at = 0;
        for shape in &shapes {
            let view = |flat: &Tensor, at: usize, rows: usize, columns: usize| -> Result<Tensor> {
                Ok(flat.narrow(0, at, rows * columns)?.reshape((rows, columns))?)
            };
            let b_at = at + shape.r * shape.inputs;
            layers[shape.linear] = Some(Lora {
                a: view(&values, at, shape.r, shape.inputs)?,
                b: view(&values, b_at, shape.outputs, shape.r)?,
                da: view(&grads, at, shape.r, shape.inputs)?,
                db: view(&grads, b_at, shape.outputs, shape.r)?,
                scale: shape.scale,
            });
            at += shape.len();
        }
        Ok(Self { shapes, values, grads, layers })
    }

    /// A fresh adapter as PEFT starts one: A uniform in `±1/√inputs` (Kaiming with a = √5), B zero.
    pub fn fresh(shapes: Vec<Shape>, linears: usize, seed: u64, device: &Device) -> Result<Self> {
        let adapter = Self::zeros(shapes, linears, device)?;
        let mut all = Vec::with_capacity(adapter.values.elem_count());
        for shape in &adapter.shapes {
            let bound = 1.0 / (shape.inputs as f64).sqrt();
            let stream = Stream::new(seed, "lora-init").at(shape.linear as u64);
            let uniform = |i| ((2.0 * stream.uniform(i) - 1.0) * bound) as f32;
            all.extend((0..(shape.r * shape.inputs) as u64).map(uniform));
            all.resize(all.len() + shape.outputs * shape.r, 0.0);
        }
        adapter.set(all)?;
        Ok(adapter)
    }

    /// Puts new values into all matrices: for each layer A, then B.
    pub fn set(&self, values: Vec<f32>) -> Result<()> {
        let values = Tensor::from_vec(values, self.values.shape(), &Device::Cpu)?;
        Ok(self.values.slice_set(&values.to_device(self.values.device())?, 0, 0)?)
    }

    /// The matrices of layer `linear`, if it is adapted.
    pub fn layer(&self, linear: usize) -> Option<&Lora> {
        self.layers[linear].as_ref()
    }

    /// Sets all gradients to zero.
    pub fn clear_grads(&self) -> Result<()> {
        Ok(self.grads.zero_set()?)
    }
}
