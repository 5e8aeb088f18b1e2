//! Rotary embeddings: the angles' inverse frequencies under every scaling that is read.
//!
//! The numbers are those of transformers' `modeling_rope_utils.py` (`ROPE_INIT_FUNCTIONS`), f32 where it computes in
//! f32 and f64 where it uses Python's floats; `tests/fixtures/rope.json` holds them.

use std::f64::consts::PI;

/// How positions become angles.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Coordinates of a head that turn; even.
    pub dim: usize,
    /// The base of the wavelengths.
    pub theta: f64,
    /// How the wavelengths are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How wavelengths are stretched for contexts longer than the pretrained one.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All alike.
    Linear {
        /// By how much.
        factor: f64,
    },
    /// NTK-aware, and only as far as a sequence goes beyond the pretrained length.
    Dynamic {
        /// By how much at most of the pretrained length.
        factor: f64,
        /// The pretrained length in tokens.
        original_max: usize,
    },
    /// Long waves are stretched, short ones are not, with a ramp in between (Peng et al. 2023).
    Yarn {
        /// By how much.
        factor: f64,
        /// The pretrained length in tokens.
        original_max: usize,
        /// Rotations over the pretrained length above which a wave is left alone.
        beta_fast: f64,
        /// Rotations below which it is stretched in full.
        beta_slow: f64,
        /// What cosines and sines are multiplied with.
        attention_factor: f64,
        /// Whether the ramp starts and ends at whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's: as YaRN, with the ramp over wavelengths.
    Llama3 {
        /// By how much.
        factor: f64,
        /// Waves longer than `original_max / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Waves shorter than `original_max / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// The pretrained length in tokens.
        original_max: usize,
    },
    /// LongRoPE (Ding et al. 2024), up to the pretrained length: each wave is stretched by a factor of its own. Beyond
    /// that length there would be other factors.
    Long {
        /// By how much, a number for each pair of coordinates.
        factors: Vec<f64>,
        /// What cosines and sines are multiplied with.
        attention_factor: f64,
        /// The pretrained length in tokens.
        original_max: usize,
    },
}

impl Rope {
    /// The inverse frequencies (`dim / 2` of them, radians a token) for a sequence of `seq_len` tokens, and the factor
    /// that cosines and sines are multiplied with. Only dynamic scaling looks at the length.
    pub fn inverse_frequencies(&self, seq_len: usize) -> (Vec<f32>, f32) {
        let dim = self.dim;
        let plain = |theta: f64| -> Vec<f32> { powers(theta, dim).iter().map(|power| 1.0 / power).collect() };
        match self.scaling {
            RopeScaling::None => (plain(self.theta), 1.0),
            RopeScaling::Linear { factor } => (plain(self.theta).into_iter().map(|f| f / factor as f32).collect(), 1.0),
            RopeScaling::Dynamic { factor, original_max } => {
                let beyond = seq_len.max(original_max) as f64 / original_max as f64;
                let dim = dim as f64;
                (plain(self.theta * (factor * beyond - (factor - 1.0)).powf(dim / (dim - 2.0))), 1.0)
            }
            RopeScaling::Yarn { factor, original_max, beta_fast, beta_slow, attention_factor, truncate } => {
                let ramp = self.yarn_ramp(original_max, beta_fast, beta_slow, truncate);
                let frequencies = powers(self.theta, dim).into_iter().zip(ramp).map(|(power, ramp)| {
                    let kept = 1.0 - ramp;
                    1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                });
                (frequencies.collect(), attention_factor as f32)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max } => {
                let (low, high, length) = (low_freq_factor as f32, high_freq_factor as f32, original_max as f32);
                let stretch = |frequency: f32| {
                    let wavelength = (2.0 * PI) as f32 / frequency;
                    if wavelength < length / high {
                        return frequency;
                    }
                    if wavelength > length / low {
                        return frequency / factor as f32;
                    }
                    let smooth = (length / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                };
                (plain(self.theta).into_iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Long { ref factors, attention_factor, .. } => {
                let stretched = powers(self.theta, dim).into_iter().zip(factors).map(|(p, f)| 1.0 / (*f as f32 * p));
                (stretched.collect(), attention_factor as f32)
            }
        }
    }

    /// How far each frequency is stretched: 0 not at all, 1 in full.
    fn yarn_ramp(&self, original_max: usize, fast: f64, slow: f64, truncate: bool) -> Vec<f32> {
        let dim = self.dim as f64;
        // The dimension whose wave turns so many times over the pretrained length.
        let dimension_of =
            |rotations: f64| dim * (original_max as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (dimension_of(fast), dimension_of(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..self.dim / 2).map(|i| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0)).collect()
    }
}

/// `theta^(2i / dim)`: the exponent rounded to f32 as torch does, the power itself in f64.
fn powers(theta: f64, dim: usize) -> Vec<f32> {
    let exponent = |i: usize| (2 * i) as f32 / dim as f32;
    (0..dim / 2).map(|i| f64::from(theta as f32).powf(f64::from(exponent(i))) as f32).collect()
}

/// YaRN's own factor for cosines and sines where the config states none.
pub(super) fn yarn_attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    match (mscale.filter(|m| *m != 0.0), mscale_all_dim.filter(|m| *m != 0.0)) {
        (Some(mscale), Some(all)) => scale(mscale) / scale(all),
        _ => scale(1.0),
    }
}

/// LongRoPE's own factor for cosines and sines where the config states none.
pub(super) fn long_attention_factor(factor: f64, original_max: usize) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_max as f64).ln()).sqrt() }
}
