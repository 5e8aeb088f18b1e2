//! `config.json`: the shapes and switches of a decoder, as transformers 4 and 5 write them.

use std::path::Path;

use serde_json::Value;

use super::family::{Bias, Cap, EmbeddingScale, Family, Qkv, Residual, Scale, Up, Windows};
use super::rope::{Rope, RopeScaling};
use super::rope_keys::ropes;
pub use crate::kernels::activation::Activation;
use crate::keys::Keys;
use crate::weights::{ModelFolder, config_object};
use crate::{Error, Result};

/// Far more than any model has; what is held for each layer is bounded by it.
const MAX_LAYERS: usize = 10_000;

/// What a decoder looks like. One that exists is consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which kind of decoder it is.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width within the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads a layer.
    pub num_attention_heads: usize,
    /// Key and value heads a layer; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// What norms add under their root.
    pub norm_eps: f64,
    /// The MLP's activation.
    pub activation: Activation,
    /// How positions become angles; a layer names one of these.
    pub ropes: Vec<Rope>,
    /// What differs between layers.
    pub layers: Vec<LayerTraits>,
    /// Whether attention and MLP both read the layer's input.
    pub side_by_side: bool,
    /// The longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output has one.
    pub output_bias: bool,
    /// Whether the MLP's matrices have biases.
    pub mlp_bias: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: f64,
    /// What attention and MLP are multiplied with before they are added to the residual.
    pub residual_scale: f64,
    /// What logits are divided by.
    pub logits_divisor: f64,
    /// What attention scores stay below, softly.
    pub score_cap: Option<f64>,
    /// What logits stay below, softly.
    pub logit_cap: Option<f64>,
    /// Begins a text.
    pub bos_token_id: Option<u32>,
}

/// What differs between a model's layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerTraits {
    /// A token attends to itself and to so many less one before it; `None`: to all before it.
    pub window: Option<usize>,
    /// The number of its rope; `None`: its heads do not turn.
    pub rope: Option<usize>,
    /// What attention scores are multiplied with.
    pub scale: f64,
}

/// A linear layer that can be adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearShape {
    /// Its name, as in `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// What it takes.
    pub inputs: usize,
    /// What it gives.
    pub outputs: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl Config {
    /// Reads `config.json` in a model's folder, or what stands for it in a GGUF file.
    ///
    /// # Errors
    /// [`crate::Error::Input`] naming the file and the key.
    pub fn read(folder: &Path) -> Result<Self> {
        let (path, object) = config_object(folder)?;
        Self::from_keys(&Keys::of(&path, &object))
    }

    /// The window of the layers that have one.
    pub fn sliding_window(&self) -> Option<usize> {
        self.layers.iter().find_map(|layer| layer.window)
    }

    /// How long a sequence may be, where a longer one would not be computed as it should: tokens, and why.
    pub fn longest_exact(&self) -> Option<(usize, &'static str)> {
        let by_rope = |rope: &Rope| match rope.scaling {
            RopeScaling::Dynamic { original_max, .. } => Some((original_max, "the rope is scaled dynamically beyond")),
            RopeScaling::Long { original_max, .. } => Some((original_max, "the rope has other frequencies beyond")),
            _ => None,
        };
        let learned = self.family.positions.map(|_| (self.max_position_embeddings, "no positions were learned beyond"));
        learned.or_else(|| self.ropes.iter().find_map(by_rope))
    }

    /// Refuses sequences that have positions which the model has not learned, or that would change the frequencies of
    /// its rope, which here are one set for all.
    ///
    /// # Errors
    /// [`Error::Recipe`] with the length that is possible.
    pub fn check_length(&self, max_length: usize) -> Result<()> {
        match self.longest_exact() {
            Some((longest, why)) if max_length > longest => Err(Error::recipe(format!(
                "data.max_length is {max_length}, but of this model {why} {longest} tokens, which is not supported; set \
                 data.max_length to {longest} or less"
            ))),
            _ => Ok(()),
        }
    }

    /// The linear layers of a decoder layer, in the order of their numbers.
    pub fn linears(&self, layer: usize) -> Vec<LinearShape> {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let linear = |name: &str, inputs, outputs, bias| {
            let module = format!("{}.{layer}.{name}", self.family.layers);
            LinearShape { module, inputs, outputs, bias }
        };
        let mut linears = match self.family.qkv {
            Qkv::Apart([q, k, v]) => [(q, queries), (k, keys), (v, keys)]
                .map(|(name, outputs)| linear(name, hidden, outputs, self.qkv_bias))
                .to_vec(),
            Qkv::Joined(name) | Qkv::ByHead(name) => vec![linear(name, hidden, queries + 2 * keys, self.qkv_bias)],
        };
        linears.push(linear(self.family.output, queries, hidden, self.output_bias));
        match self.family.up {
            Up::Gated([gate, up]) => linears.extend([gate, up].map(|name| linear(name, hidden, mlp, self.mlp_bias))),
            Up::GatedJoined(name) => linears.push(linear(name, hidden, 2 * mlp, self.mlp_bias)),
            Up::Plain(name) => linears.push(linear(name, hidden, mlp, self.mlp_bias)),
        }
        linears.push(linear(self.family.down, mlp, hidden, self.mlp_bias));
        linears
    }

    /// All linear layers and the head, `(module, inputs, outputs)`.
    pub fn modules(&self) -> Vec<(String, usize, usize)> {
        let linears = (0..self.num_hidden_layers).flat_map(|layer| self.linears(layer));
        let head = (self.family.head.to_string(), self.hidden_size, self.vocab_size);
        linears.map(|linear| (linear.module, linear.inputs, linear.outputs)).chain([head]).collect()
    }

    /// Whether a linear layer's weight lies transposed in the folder, `[inputs, outputs]`. What is quantised does not:
    /// every program puts an ordinary linear layer in the place of a `Conv1D` before it quantises.
    pub fn lies_transposed(&self, folder: &ModelFolder, module: &str) -> bool {
        let name = self.family.stored_name(&format!("{module}.weight"), |name| folder.has(name));
        self.family.transposed && folder.plain(&name).is_some()
    }

    fn from_keys(keys: &Keys) -> Result<Self> {
        let model_type = keys.text("model_type")?.ok_or_else(|| keys.missing("model_type"))?;
        let family = Family::find(model_type)
            .ok_or_else(|| keys.bad("model_type", &format!("{model_type:?} is not read; {} are", Family::known())))?;
        if keys.flag("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(keys.bad("use_bidirectional_attention", "models that look ahead are not read"));
        }
        let names = family.keys;
        let hidden_size = keys.size(names.hidden)?;
        let num_hidden_layers = keys.size(names.layers)?;
        if num_hidden_layers > MAX_LAYERS {
            return Err(
                keys.bad(names.layers, &format!("{num_hidden_layers} are more than the {MAX_LAYERS} that are read"))
            );
        }
        let num_attention_heads = keys.size(names.heads)?;
        let num_key_value_heads = match names.kv_heads {
            Some(key) => keys.optional_size(key)?.unwrap_or(num_attention_heads),
            None => num_attention_heads,
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let heads = format!("{num_key_value_heads} does not divide {}, {num_attention_heads}", names.heads);
            return Err(keys.bad("num_key_value_heads", &heads));
        }
        let head_dim = match keys.optional_size("head_dim")?.or(family.head_dim) {
            Some(stated) => stated,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                let reason = format!("it is no multiple of {}, nor is head_dim stated", names.heads);
                return Err(keys.bad(names.hidden, &reason));
            }
        };
        let intermediate_size = match (keys.optional_size(names.intermediate)?, names.widens) {
            (Some(stated), _) => stated,
            (None, Some(times)) => times * hidden_size,
            (None, None) => return Err(keys.missing(names.intermediate)),
        };
        let max_position_embeddings = keys.size(names.positions)?;
        let ropes = match family.rope {
            Some(traits) => ropes(keys, traits, max_position_embeddings, head_dim)?,
            None => vec![],
        };
        let bias = |bias: Bias| -> Result<bool> {
            match bias {
                Bias::Never => Ok(false),
                Bias::Always => Ok(true),
                Bias::Stated(key, default) => Ok(keys.flag(key)?.unwrap_or(default)),
            }
        };
        let multiplier = |key: Option<&str>| -> Result<f64> {
            match key {
                Some(key) => Ok(keys.positive(key)?.unwrap_or(1.0)),
                None => Ok(1.0),
            }
        };
        Ok(Self {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            norm_eps: keys.positive(names.eps)?.ok_or_else(|| keys.missing(names.eps))?,
            activation: activation(keys, &family)?,
            layers: layers(keys, &family, num_hidden_layers, head_dim)?,
            ropes,
            side_by_side: match family.residual {
                Residual::InTurn => false,
                Residual::SideBySide => true,
                Residual::SideBySideUnless(key) => keys.flag(key)?.unwrap_or(true),
            },
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(family.tied),
            qkv_bias: bias(family.qkv_bias)?,
            output_bias: bias(family.output_bias)?,
            mlp_bias: bias(family.mlp_bias)?,
            embedding_scale: match family.embedding_scale {
                EmbeddingScale::One => 1.0,
                EmbeddingScale::Root => (hidden_size as f64).sqrt(),
                EmbeddingScale::Stated(key) => multiplier(Some(key))?,
            },
            residual_scale: multiplier(family.multipliers.map(|keys| keys.residual))?,
            logits_divisor: multiplier(family.multipliers.map(|keys| keys.logits))?,
            score_cap: cap(keys, family.score_cap)?,
            logit_cap: cap(keys, family.logit_cap)?,
            bos_token_id: token_ids(keys, "bos_token_id")?.first().copied(),
            family,
        })
    }
}

fn activation(keys: &Keys, family: &Family) -> Result<Activation> {
    let key = family.keys.activation;
    match keys.text(key)?.unwrap_or(family.activation) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => {
            Err(keys
                .bad(key, &format!("{other:?} is not read; silu, gelu, gelu_new, gelu_fast and gelu_pytorch_tanh are")))
        }
    }
}

fn cap(keys: &Keys, cap: Option<Cap>) -> Result<Option<f64>> {
    let Some(Cap { key, default }) = cap else { return Ok(None) };
    match keys.raw(key) {
        None => Ok(default.map(f64::from)),
        Some(_) => keys.positive(key),
    }
}

fn layers(keys: &Keys, family: &Family, count: usize, head_dim: usize) -> Result<Vec<LayerTraits>> {
    let turns = turning_layers(keys, family, count)?;
    let windows = windows(keys, family, &turns)?;
    let root = |of: f64| 1.0 / of.sqrt();
    let scale = |layer: usize| -> Result<f64> {
        match family.scale {
            Scale::Head => Ok(root(head_dim as f64)),
            Scale::Root(key, default) => Ok(root(keys.positive(key)?.unwrap_or(default as f64))),
            Scale::Stated(key) => Ok(keys.positive(key)?.unwrap_or(1.0)),
            Scale::Gpt2 => {
                let scaled = keys.flag("scale_attn_weights")?.unwrap_or(true);
                let by_layer = keys.flag("scale_attn_by_inverse_layer_idx")?.unwrap_or(false);
                let scale = if scaled { root(head_dim as f64) } else { 1.0 };
                Ok(if by_layer { scale / (layer + 1) as f64 } else { scale })
            }
        }
    };
    let local = family.rope.is_some_and(|rope| rope.local.is_some());
    let traits = |layer: usize| {
        let window = windows[layer];
        // the second set of frequencies is that of the layers with a window
        let rope = turns[layer].then_some(usize::from(local && window.is_some()));
        Ok(LayerTraits { window, rope, scale: scale(layer)? })
    };
    (0..count).map(traits).collect()
}

/// Which layers' heads turn.
fn turning_layers(keys: &Keys, family: &Family, count: usize) -> Result<Vec<bool>> {
    let Some(rope) = family.rope else { return Ok(vec![false; count]) };
    if !rope.skips {
        return Ok(vec![true; count]);
    }
    let flags = |value: &Value| value.as_array()?.iter().map(|flag| flag.as_u64().map(|flag| flag != 0)).collect();
    match keys.typed::<Vec<bool>>("no_rope_layers", "a list of 0 and 1", flags)? {
        Some(flags) if flags.len() < count => {
            Err(keys.bad("no_rope_layers", &format!("it tells of {} of {count} layers", flags.len())))
        }
        Some(flags) => Ok(flags[..count].to_vec()),
        None => {
            let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            Ok((1..=count).map(|number| !number.is_multiple_of(interval)).collect())
        }
    }
}

/// Each layer's window.
fn windows(keys: &Keys, family: &Family, turns: &[bool]) -> Result<Vec<Option<usize>>> {
    // absent and null differ
    let stated = |default: Option<usize>| match keys.raw("sliding_window") {
        None => Ok(default),
        Some(_) => keys.optional_size("sliding_window"),
    };
    let used = keys.flag("use_sliding_window")?.unwrap_or(false);
    let count = turns.len();
    let (window, sliding): (_, Vec<bool>) = match family.windows {
        Windows::None => return Ok(vec![None; count]),
        Windows::All(default) => (stated(default)?, vec![true; count]),
        Windows::From => {
            let first = keys.typed("max_window_layers", "a whole number", Value::as_u64)?.unwrap_or(28) as usize;
            (if used { stated(Some(4096))? } else { None }, (0..count).map(|layer| layer >= first).collect())
        }
        Windows::Between(every, by_key) => {
            let pattern = if by_key { keys.optional_size("sliding_window_pattern")? } else { None };
            let every = pattern.unwrap_or(every);
            (stated(Some(4096))?, (1..=count).map(|number| !number.is_multiple_of(every)).collect())
        }
        Windows::WithoutRope => (if used { stated(None)? } else { None }, turns.iter().map(|turns| !turns).collect()),
    };
    let sliding = layer_types(keys, count)?.unwrap_or(sliding);
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

/// Which layers `layer_types` calls sliding.
fn layer_types(keys: &Keys, count: usize) -> Result<Option<Vec<bool>>> {
    let texts = |value: &Value| value.as_array()?.iter().map(|text| Some(text.as_str()?.to_string())).collect();
    let Some(types) = keys.typed::<Vec<String>>("layer_types", "a list of texts", texts)? else { return Ok(None) };
    if types.len() != count {
        return Err(keys.bad("layer_types", &format!("it tells of {} layers, there are {count}", types.len())));
    }
    let sliding = |text: &String| match text.as_str() {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => {
            Err(keys.bad("layer_types", &format!("{other:?} is not read; full_attention and sliding_attention are")))
        }
    };
    types.iter().map(sliding).collect::<Result<_>>().map(Some)
}

fn token_ids(keys: &Keys, key: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = |value: &Value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    };
    Ok(keys.typed(key, "a token id or a list of them", ids)?.unwrap_or_default())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
