//! Cosines and sines of the rotary angles.

use candle_core::{Device, Result, Tensor};

/// The frequencies of a model's rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians a position, one for each pair of coordinates: `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// What cosines and sines are multiplied with (YaRN's attention factor).
    pub scale: f32,
}

impl Rotary {
    /// Cosines and sines `[positions, head_dim / 2]`.
    pub fn angles(&self, positions: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
        let shape = (positions.len(), self.frequencies.len());
        // the angle is rounded to f32, as the reference implementation does
        let angles = || positions.iter().flat_map(|&p| self.frequencies.iter().map(move |f| p as f32 * f));
        let table = |of: fn(f32) -> f32| {
            Tensor::from_vec(angles().map(|x| of(x) * self.scale).collect(), shape, &Device::Cpu)?.to_device(device)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}
