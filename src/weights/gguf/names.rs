//! The architectures that are read from GGUF, as rows of a table: from GGUF's tensor names to those of the Hugging Face
//! folder that the file was converted from.
//!
//! llama.cpp's converter renames tensors and changes some of them on the way, which is undone when they are read. What
//! its metadata say stands in [`super::config`].

/// What llama.cpp's converter did to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The rows of each head were put in another order: [`super::matrix::HalvesTogether`].
    HeadRows,
    /// One was added: `less_one::LessOne`.
    OneAdded,
}

/// GGUF's names (without `.weight` and `.bias`) and the folder's.
type Names = &'static [(&'static str, &'static str)];

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// transformers' class of the model.
    pub class: &'static str,
    /// Whether q and k are stored for a rotation of neighbours.
    pub permuted: bool,
    /// Whether norms are stored with one added.
    pub one_added: bool,
    /// Parts of a layer that may have a bias; none beside these.
    pub biases: &'static [&'static str],
    /// Tensors that are no weights: what the rope's frequencies are divided by.
    pub factors: &'static [&'static str],
    /// Keys, after the architecture's name, that change what is computed and are read beside those of all.
    pub keys: &'static [&'static str],
    /// All layers see a window alone but every so many-th, where the file states no other pattern; none: no layer does.
    pub windows_but: Option<u64>,
    /// Every so many-th layer's heads do not turn.
    pub still: Option<u64>,
    /// As many layers has the model whose scores are scaled by hidden size over heads, and not by a head's width.
    pub wide_scores: Option<u64>,
    /// Names of a layer's tensors, after `blk.N.` and `model.layers.N.`.
    inner: &'static [Names],
}

/// The frequencies' divisors that Llama 3.1 files carry in place of its rope scaling.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// LongRoPE's, beyond the pretrained length and up to it.
pub const ROPE_LONG: &str = "rope_factors_long.weight";
/// See [`ROPE_LONG`].
pub const ROPE_SHORT: &str = "rope_factors_short.weight";

const OUTER: Names = &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const MATRICES: Names = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const JOINED: Names = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Norms before the halves, after them, on both sides.
const BEFORE: Names = &[("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
const AFTER: Names =
    &[("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")];
const AROUND: Names = &[
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
const OF_HEADS: Names = &[("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];

const ALL_BIASES: &[&str] = &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// Llama 2 and 3, SmolLM2, TinyLlama, and Mistral.
const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    permuted: true,
    one_added: false,
    biases: ALL_BIASES,
    factors: &[ROPE_FREQS],
    keys: &[],
    windows_but: None,
    still: None,
    wide_scores: None,
    inner: &[MATRICES, BEFORE],
};

const QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    permuted: false,
    biases: &["attn_q", "attn_k", "attn_v"],
    factors: &[],
    ..LLAMA
};

const QWEN3: Architecture = Architecture {
    name: "qwen3",
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    biases: &["attn_q", "attn_k", "attn_v", "attn_output"],
    inner: &[MATRICES, BEFORE, OF_HEADS],
    ..QWEN2
};

const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    one_added: true,
    biases: &[],
    keys: &[
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
    windows_but: Some(2),
    wide_scores: Some(46),
    inner: &[MATRICES, AROUND],
    ..QWEN2
};

/// Gemma 3, the text part.
const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    keys: &[
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "final_logit_softcapping",
    ],
    windows_but: Some(6),
    wide_scores: Some(62),
    inner: &[MATRICES, AROUND, OF_HEADS],
    ..GEMMA2
};

/// Phi-3, 3.5 and 4.
const PHI3: Architecture = Architecture {
    name: "phi3",
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    biases: &[],
    factors: &[ROPE_LONG, ROPE_SHORT],
    keys: &["attention.sliding_window"],
    inner: &[JOINED, BEFORE],
    ..QWEN2
};

const SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    factors: &[],
    still: Some(4),
    ..LLAMA
};

const OLMO2: Architecture = Architecture {
    name: "olmo2",
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    biases: &[],
    inner: &[MATRICES, AFTER, OF_HEADS],
    ..QWEN2
};

/// Granite 3, the dense ones.
const GRANITE: Architecture = Architecture {
    name: "granite",
    model_type: "granite",
    class: "GraniteForCausalLM",
    factors: &[],
    keys: &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"],
    ..LLAMA
};

const ARCHITECTURES: [Architecture; 9] = [LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, SMOLLM3, OLMO2, GRANITE];

impl Architecture {
    /// The row of a name, if there is one.
    pub fn find(name: &str) -> Option<Self> {
        ARCHITECTURES.into_iter().find(|row| row.name == name)
    }

    /// The row of a `model_type`, if there is one. Mistral's is Llama's.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        let model_type = if model_type == "mistral" { "llama" } else { model_type };
        ARCHITECTURES.into_iter().find(|row| row.model_type == model_type)
    }

    /// The names that are read.
    pub fn known() -> String {
        ARCHITECTURES.map(|row| row.name).join(", ")
    }

    /// What scores are divided by the root of.
    pub fn score_width(&self, layers: u64, hidden: u64, heads: u64, head_dim: u64) -> u64 {
        if self.wide_scores == Some(layers) { hidden / heads } else { head_dim }
    }

    /// The folder's name of a tensor, and what was done to it; `None` where the model has no such part.
    pub fn folder_name(&self, gguf: &str) -> Option<(String, Change)> {
        let (stem, ending) = gguf.rsplit_once('.').filter(|(_, ending)| ["weight", "bias"].contains(ending))?;
        let change = match stem.rsplit('.').next() {
            Some("attn_q" | "attn_k") if self.permuted => Change::HeadRows,
            Some(part) if self.one_added && part.ends_with("norm") => Change::OneAdded,
            _ => Change::None,
        };
        let lookup = |table: Names, stem| table.iter().find(|row| row.0 == stem).map(|row| row.1);
        if let Some(name) = lookup(OUTER, stem) {
            return (ending == "weight").then(|| (format!("{name}.{ending}"), change));
        }
        let (layer, part) = layer_of(stem)?;
        if ending == "bias" && !self.biases.contains(&part) {
            return None;
        }
        let name = self.inner.iter().find_map(|table| lookup(table, part))?;
        Some((format!("model.layers.{layer}.{name}.{ending}"), change))
    }

    /// GGUF's name of a tensor, and what is to be done to it: the inverse of [`Architecture::folder_name`].
    pub fn gguf_name(&self, folder: &str) -> Option<(String, Change)> {
        let (stem, ending) = folder.rsplit_once('.')?;
        let lookup = |table: Names, stem| table.iter().find(|row| row.1 == stem).map(|row| row.0);
        let gguf = match lookup(OUTER, stem) {
            Some(name) => format!("{name}.{ending}"),
            None => {
                let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
                let name = self.inner.iter().find_map(|table| lookup(table, part))?;
                format!("blk.{layer}.{name}.{ending}")
            }
        };
        self.folder_name(&gguf).filter(|(name, _)| name == folder).map(|(_, change)| (gguf, change))
    }
}

/// The number of a layer and what follows, of a tensor within one.
pub fn layer_of(gguf: &str) -> Option<(u32, &str)> {
    let (layer, part) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let number: u32 = layer.parse().ok()?;
    (number.to_string() == layer).then_some((number, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (row, gguf, folder, change) in [
            (LLAMA, "token_embd.weight", "model.embed_tokens.weight", Change::None),
            (LLAMA, "output.weight", "lm_head.weight", Change::None),
            (LLAMA, "output_norm.weight", "model.norm.weight", Change::None),
            (LLAMA, "blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight", Change::HeadRows),
            (LLAMA, "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias", Change::HeadRows),
            (LLAMA, "blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight", Change::None),
            (QWEN2, "blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias", Change::None),
            (QWEN3, "blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight", Change::None),
            (GEMMA3, "blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight", Change::OneAdded),
            (GEMMA2, "output_norm.weight", "model.norm.weight", Change::OneAdded),
            (GEMMA2, "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight", Change::OneAdded),
            (PHI3, "blk.1.ffn_up.weight", "model.layers.1.mlp.gate_up_proj.weight", Change::None),
            (OLMO2, "blk.1.post_ffw_norm.weight", "model.layers.1.post_feedforward_layernorm.weight", Change::None),
            (GRANITE, "blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", Change::HeadRows),
        ] {
            assert_eq!(row.folder_name(gguf), Some((folder.to_string(), change)), "{}", row.name);
            assert_eq!(row.gguf_name(folder), Some((gguf.to_string(), change)), "{}", row.name);
        }
        for other in ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.weight", "rope_freqs.weight", "output"] {
            assert_eq!(LLAMA.folder_name(other), None, "{other}");
        }
        for (row, other) in [
            (QWEN2, "blk.0.attn_output.bias"),
            (QWEN2, "blk.0.attn_q_norm.weight"),
            (OLMO2, "blk.0.attn_norm.weight"),
            (PHI3, "blk.0.attn_q.weight"),
            (LLAMA, "output.bias"),
        ] {
            assert_eq!(row.folder_name(other), None, "{} {other}", row.name);
        }
        assert_eq!(LLAMA.gguf_name("model.layers.01.mlp.up_proj.weight"), None);
    }
}
