//! Rotary positions in `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).

use serde_json::Value;

use super::family::{RopeTraits, Turning};
use super::rope::{Rope, RopeScaling, long_attention_factor, yarn_attention_factor};
use crate::Result;
use crate::keys::Keys;

/// The pretrained length of a model that was stretched; beside `rope_parameters` or within.
const ORIGINAL_MAX: &str = "original_max_position_embeddings";
/// The share of a head's coordinates that turn.
const SHARE: &str = "partial_rotary_factor";

/// The model's ropes: one, or that of layers without a window and that of layers with one.
pub(super) fn ropes(top: &Keys, traits: RopeTraits, max_positions: usize, head_dim: usize) -> Result<Vec<Rope>> {
    let reader = Reader { top, traits, max_positions, head_dim };
    // transformers lets a rope_scaling win over rope_parameters, and a theta inside over one outside.
    let (scaling, parameters) = (top.object("rope_scaling")?, top.object("rope_parameters")?);
    let Some((local_key, local_theta)) = traits.local else {
        return Ok(vec![reader.rope(&scaling.or(parameters).unwrap_or_else(|| top.clone()))?]);
    };
    let nested = |kind: &str| match &parameters {
        Some(parameters) => parameters.object(kind),
        None => Ok(None),
    };
    let full = scaling.or(nested("full_attention")?).unwrap_or_else(|| top.clone());
    let local = match nested("sliding_attention")? {
        Some(keys) => reader.rope(&keys)?,
        None => {
            let theta = top.positive(local_key)?.unwrap_or(f64::from(local_theta));
            Rope { dim: head_dim, theta: reader.above_one(theta)?, scaling: RopeScaling::None }
        }
    };
    Ok(vec![reader.rope(&full)?, local])
}

struct Reader<'a> {
    top: &'a Keys<'a>,
    traits: RopeTraits,
    max_positions: usize,
    head_dim: usize,
}

impl Reader<'_> {
    /// A rope whose parameters stand in `keys`, some of them perhaps outside of it.
    fn rope(&self, keys: &Keys) -> Result<Rope> {
        let theta = match keys.positive("rope_theta")? {
            Some(theta) => theta,
            None => self.top.positive(self.traits.theta_key)?.unwrap_or(f64::from(self.traits.theta)),
        };
        let dim = self.turning(keys)?;
        Ok(Rope { dim, theta: self.above_one(theta)?, scaling: self.scaling(keys, dim)? })
    }

    fn above_one(&self, theta: f64) -> Result<f64> {
        match theta > 1.0 {
            true => Ok(theta),
            false => Err(self.top.bad("rope_theta", &format!("{theta} is not above 1"))),
        }
    }

    /// How many coordinates of a head turn.
    fn turning(&self, keys: &Keys) -> Result<usize> {
        let (top, head_dim) = (self.top, self.head_dim);
        let (count, key) = match self.traits.turning {
            Turning::All => {
                for keys in [top, keys] {
                    if keys.positive(SHARE)?.is_some_and(|share| share != 1.0) {
                        return Err(keys.bad(SHARE, "heads that rotate in part are not read in this family"));
                    }
                }
                (head_dim, "head_dim")
            }
            Turning::Share(key, percent) => {
                let share = match keys.positive(SHARE)? {
                    Some(share) => share,
                    None => top.positive(key)?.unwrap_or(f64::from(percent) / 100.0),
                };
                ((head_dim as f64 * share) as usize, key)
            }
            Turning::Count(key, default) => match top.raw(key) {
                None => (default, key),
                Some(_) => (top.size(key)?, key),
            },
        };
        match (count, count.is_multiple_of(2)) {
            (2.., true) if count <= head_dim => Ok(count),
            (_, false) => Err(top.bad(key, &format!("{count} is odd: its halves are rotated in pairs"))),
            _ => Err(top.bad(key, &format!("{count} of a head's {head_dim} coordinates cannot turn"))),
        }
    }

    fn scaling(&self, keys: &Keys, dim: usize) -> Result<RopeScaling> {
        let (top, max_positions) = (self.top, self.max_positions);
        let kind = match keys.text("rope_type")? {
            Some(kind) => kind,
            None => keys.text("type")?.unwrap_or("default"),
        };
        let factor = || match keys.positive("factor")? {
            Some(factor) if factor >= 1.0 => Ok(factor),
            Some(factor) => Err(keys.bad("factor", &format!("{factor} is below 1"))),
            None => Err(keys.missing("factor")),
        };
        let original_max = || -> Result<usize> {
            let (outside, inside) = (top.optional_size(ORIGINAL_MAX)?, keys.optional_size(ORIGINAL_MAX)?);
            Ok(outside.or(inside).unwrap_or(max_positions))
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            // Phi-3's first names of it
            "longrope" | "su" | "yarn" if self.traits.long => {
                let original_max = original_max()?;
                let factor = keys.positive("factor")?.unwrap_or(max_positions as f64 / original_max as f64);
                let attention_factor = match keys.positive("attention_factor")? {
                    Some(stated) => stated,
                    None => long_attention_factor(factor, original_max),
                };
                Ok(RopeScaling::Long { factors: short_factors(keys, dim)?, attention_factor, original_max })
            }
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "dynamic" if dim < 4 => Err(top.bad("head_dim", "dynamic rope scaling needs heads of at least 4")),
            "dynamic" => Ok(RopeScaling::Dynamic { factor: factor()?, original_max: max_positions }),
            "yarn" => {
                let original_max = original_max()?;
                // A stated null means the ratio of the two lengths.
                let factor = match keys.raw("factor") {
                    Some(Value::Null) => max_positions as f64 / original_max as f64,
                    _ => factor()?,
                };
                let attention_factor = match keys.positive("attention_factor")? {
                    Some(stated) => stated,
                    None => yarn_attention_factor(factor, keys.number("mscale")?, keys.number("mscale_all_dim")?),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max,
                    beta_fast: keys.positive("beta_fast")?.unwrap_or(32.0),
                    beta_slow: keys.positive("beta_slow")?.unwrap_or(1.0),
                    attention_factor,
                    truncate: keys.flag("truncate")?.unwrap_or(true),
                })
            }
            "llama3" => {
                let stated = |key: &str| keys.positive(key)?.ok_or_else(|| keys.missing(key));
                let (low_freq_factor, high_freq_factor) = (stated("low_freq_factor")?, stated("high_freq_factor")?);
                if high_freq_factor <= low_freq_factor {
                    return Err(
                        keys.bad("high_freq_factor", &format!("it is not above low_freq_factor, {low_freq_factor}"))
                    );
                }
                let original_max = original_max()?;
                Ok(RopeScaling::Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_max })
            }
            other => {
                let long = if self.traits.long { ", longrope" } else { "" };
                let read = format!("{other:?} is not read; default, linear, dynamic{long}, yarn and llama3 are");
                Err(keys.bad("rope_type", &read))
            }
        }
    }
}

/// What stretches each wave up to the pretrained length.
fn short_factors(keys: &Keys, dim: usize) -> Result<Vec<f64>> {
    const KEY: &str = "short_factor";
    let number = |value: &Value| value.as_f64().filter(|factor| *factor > 0.0 && (*factor as f32).is_finite());
    let numbers = |value: &Value| value.as_array()?.iter().map(number).collect::<Option<Vec<f64>>>();
    let factors = keys.typed(KEY, "a list of positive numbers", numbers)?.ok_or_else(|| keys.missing(KEY))?;
    match factors.len() == dim / 2 {
        true => Ok(factors),
        false => Err(keys.bad(KEY, &format!("it has {} numbers, {} coordinates turn in pairs", factors.len(), dim))),
    }
}
