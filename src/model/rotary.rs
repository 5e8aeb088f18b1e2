//! Cosines and sines of the rotary angles.

use candle_core::{Device, Result, Tensor};

/// The frequencies of a model's rotary positions: one set, or one for each kind of layer, or none.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// The sets, by the number that a layer names.
    pub sets: Vec<Frequencies>,
}

/// One set of frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians a position, one for each pair of coordinates that turns: `[rotated / 2]`.
    pub radians: Vec<f32>,
    /// What cosines and sines are multiplied with (YaRN's attention factor).
    pub scale: f32,
}

/// Cosines and sines at a batch's positions.
#[derive(Debug, Clone)]
pub struct Angles {
    /// `[tokens, rotated / 2]`.
    pub cos: Tensor,
    /// `[tokens, rotated / 2]`.
    pub sin: Tensor,
}

impl Rotary {
    /// The angles of every set at these positions.
    pub fn angles(&self, positions: &[usize], device: &Device) -> Result<Vec<Angles>> {
        self.sets.iter().map(|set| set.angles(positions, device)).collect()
    }
}

impl Frequencies {
    fn angles(&self, positions: &[usize], device: &Device) -> Result<Angles> {
        let shape = (positions.len(), self.radians.len());
        // the angle is rounded to f32, as the reference implementation does
        let angles = || positions.iter().flat_map(|&p| self.radians.iter().map(move |f| p as f32 * f));
        let table = |of: fn(f32) -> f32| {
            Tensor::from_vec(angles().map(|x| of(x) * self.scale).collect(), shape, &Device::Cpu)?.to_device(device)
        };
        Ok(Angles { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }
}
