//! The table of families: what a decoder of each is called by and made of.
//!
//! A row states what all checkpoints of a `model_type` share. What differs between them stands in `config.json`; where
//! a trait is stated there, the row names the key and what counts where it is absent, as transformers' config classes
//! do.

mod rows;

use rows::FAMILIES;

use crate::kernels::rope::Pairing;

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// What `config.json` calls the sizes.
    pub keys: SizeKeys,

    // Modules, named as transformers names them; a tensor is a module's `.weight` or `.bias`.
    /// The embedding, `[vocabulary, hidden]`.
    pub embed: &'static str,
    /// Learned positions, `[positions, hidden]`, which are added to the embeddings.
    pub positions: Option<&'static str>,
    /// What a layer's number follows in its modules' names.
    pub layers: &'static str,
    /// The last norm.
    pub norm: &'static str,
    /// The head where it is not tied to the embedding.
    pub head: &'static str,
    /// What files call the head, where that is another name.
    pub stored_head: Option<&'static str>,
    /// Queries, keys and values; under a layer, as the names that follow.
    pub qkv: Qkv,
    /// What mixes the heads.
    pub output: &'static str,
    /// What widens to the MLP's inner size.
    pub up: Up,
    /// What narrows back.
    pub down: &'static str,
    /// Norms before and after the attention and the MLP.
    pub norms: Norms,

    // Traits.
    /// How norms compute.
    pub norm_kind: NormKind,
    /// Norms of queries and keys before they turn, `self_attn.q_norm` and `self_attn.k_norm`.
    pub query_norm: QueryNorm,
    /// Whether the MLP reads what the attention wrote.
    pub residual: Residual,
    /// The MLP's activation where `config.json` states none.
    pub activation: &'static str,
    /// Rotary positions, if it has any.
    pub rope: Option<RopeTraits>,
    /// Which layers see a window alone.
    pub windows: Windows,
    /// What attention scores are multiplied with.
    pub scale: Scale,
    /// Of queries, keys and values.
    pub qkv_bias: Bias,
    /// Of the attention's output.
    pub output_bias: Bias,
    /// Of the MLP's matrices.
    pub mlp_bias: Bias,
    /// Whether the head has a bias.
    pub head_bias: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: EmbeddingScale,
    /// Keys of what both halves' outputs are multiplied with, and of what logits are divided by.
    pub multipliers: Option<Multipliers>,
    /// The soft cap of scores.
    pub score_cap: Option<Cap>,
    /// The soft cap of logits.
    pub logit_cap: Option<Cap>,
    /// Whether the head is the embedding where `tie_word_embeddings` is not stated.
    pub tied: bool,
    /// Coordinates a head where `head_dim` is not stated; none: hidden size over heads.
    pub head_dim: Option<usize>,
    /// Whether linear layers are stored as `[inputs, outputs]` (`Conv1D`).
    pub transposed: bool,
}

/// Keys of `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeKeys {
    /// Width of the residual stream.
    pub hidden: &'static str,
    /// Width within the MLP.
    pub intermediate: &'static str,
    /// How many times the residual stream's width that is where it is not stated.
    pub widens: Option<usize>,
    /// How many layers.
    pub layers: &'static str,
    /// How many query heads.
    pub heads: &'static str,
    /// How many key and value heads; none: as many as query heads.
    pub kv_heads: Option<&'static str>,
    /// The longest sequence.
    pub positions: &'static str,
    /// What norms add.
    pub eps: &'static str,
    /// The MLP's activation.
    pub activation: &'static str,
}

/// The matrices of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// One each.
    Apart([&'static str; 3]),
    /// One for all: all queries, then all keys, then all values.
    Joined(&'static str),
    /// One for all: a head's query, key and value, then the next head's.
    ByHead(&'static str),
}

/// The matrices that read the MLP's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Up {
    /// `f(gate(x)) · up(x)`.
    Gated([&'static str; 2]),
    /// The same with one matrix: the gate's rows, then up's.
    GatedJoined(&'static str),
    /// `f(up(x))`.
    Plain(&'static str),
}

/// Norms of a layer; none where a name is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Norms {
    /// Before the attention.
    pub attention: Option<&'static str>,
    /// After it, before the residual.
    pub after_attention: Option<&'static str>,
    /// Before the MLP. It may be the one before the attention.
    pub mlp: Option<&'static str>,
    /// After it, before the residual.
    pub after_mlp: Option<&'static str>,
}

/// How a norm computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, times the weight.
    Rms,
    /// Root mean square, times one plus the weight.
    RmsPlusOne,
    /// Layer norm with weight and bias.
    Layer,
}

/// Over what queries and keys are normed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryNorm {
    /// They are not.
    None,
    /// Each head for itself, all with the same weights.
    EachHead,
    /// All heads as one vector.
    AllHeads,
}

/// What the MLP of a layer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// What the attention's residual wrote.
    InTurn,
    /// The layer's input, as the attention does.
    SideBySide,
    /// The same unless this key is false.
    SideBySideUnless(&'static str),
}

/// Rotary positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RopeTraits {
    /// Which coordinates turn together.
    pub pairing: Pairing,
    /// How many coordinates of a head turn.
    pub turning: Turning,
    /// The base of the wavelengths where none is stated.
    pub theta: u32,
    /// The key of the base.
    pub theta_key: &'static str,
    /// The key of the base in layers with a window, and what counts where it is absent; none: they share the other.
    pub local: Option<(&'static str, u32)>,
    /// Whether `no_rope_layers` and `no_rope_layer_interval` leave layers without.
    pub skips: bool,
    /// Whether scaling of the kind `longrope` counts.
    pub long: bool,
}

/// How many coordinates of a head turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turning {
    /// All.
    All,
    /// The share under `partial_rotary_factor`; outside of `rope_parameters` under this key. Absent: this many per
    /// cent.
    Share(&'static str, u8),
    /// As many as this key says; absent: so many.
    Count(&'static str, usize),
}

/// Which layers see a window of `sliding_window` tokens alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None, whatever is stated.
    None,
    /// All, or those that `layer_types` names (transformers then takes a Mistral for a Ministral), the window being
    /// this where the key is absent.
    All(Option<usize>),
    /// With `use_sliding_window` those from `max_window_layers` on, or those that `layer_types` names.
    From,
    /// All but every so many-th, or those that `layer_types` names; `sliding_window_pattern` counts where `true`.
    Between(usize, bool),
    /// With `use_sliding_window` those without rotary positions, or those that `layer_types` names.
    WithoutRope,
}

/// What attention scores are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// One over the root of a head's coordinates.
    Head,
    /// One over the root of this key's value; absent: of this.
    Root(&'static str, usize),
    /// This key's value; absent: 1.
    Stated(&'static str),
    /// As [`Scale::Head`], unless `scale_attn_weights` or `scale_attn_by_inverse_layer_idx` say otherwise.
    Gpt2,
}

/// Whether there is a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// There is none.
    Never,
    /// There is.
    Always,
    /// As the key says; absent: as here.
    Stated(&'static str, bool),
}

/// What embeddings are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingScale {
    /// Nothing.
    One,
    /// The root of the hidden size.
    Root,
    /// This key's value; absent: 1.
    Stated(&'static str),
}

/// Keys of multipliers, all 1 where absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multipliers {
    /// Multiplies what attention and MLP add to the residual.
    pub residual: &'static str,
    /// Divides the logits.
    pub logits: &'static str,
}

/// The key of a soft cap; null: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cap {
    /// In `config.json`.
    pub key: &'static str,
    /// Where it is absent.
    pub default: Option<u32>,
}

impl Family {
    /// The row of a `model_type`, if there is one.
    pub fn find(model_type: &str) -> Option<Self> {
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    }

    /// The model types that are read.
    pub fn known() -> String {
        FAMILIES.map(|family| family.model_type).join(", ")
    }

    /// What files call the tensor `name`, `has` telling what they hold. Checkpoints of a bare decoder leave out the
    /// first part of every name, and some files call the head by an older name.
    pub fn stored_name(&self, name: &str, has: impl Fn(&str) -> bool) -> String {
        let older = self.stored_head.and_then(|stored| Some(format!("{stored}{}", name.strip_prefix(self.head)?)));
        let bare = name.split_once('.').map(|(_, rest)| rest.to_string()).filter(|_| !name.starts_with(self.head));
        let other = [older, bare].into_iter().flatten().find(|other| has(other));
        if has(name) { name.to_string() } else { other.unwrap_or_else(|| name.to_string()) }
    }
}

#[cfg(test)]
mod tests {
    use super::rows::{GPT_NEOX, GPT2, LLAMA};
    use super::*;

    #[test]
    fn tensors_are_found_under_older_names() {
        let stored =
            |family: Family, name: &str, there: &[&str]| family.stored_name(name, |name| there.contains(&name));
        let (long, bare) = ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight");
        assert_eq!(stored(GPT2, long, &[long, bare]), long);
        assert_eq!(stored(GPT2, long, &[bare]), bare);
        assert_eq!(stored(GPT2, long, &[]), long);
        assert_eq!(stored(GPT_NEOX, "lm_head.weight", &["embed_out.weight"]), "embed_out.weight");
        assert_eq!(stored(LLAMA, "lm_head.weight", &["weight"]), "lm_head.weight");
    }
}
