//! The rows themselves. Each says how it differs from the one that it builds on.

use super::{
    Bias, Cap, EmbeddingScale, Family, Multipliers, NormKind, Norms, Qkv, QueryNorm, Residual, RopeTraits, Scale,
    SizeKeys, Turning, Up, Windows,
};
use crate::kernels::rope::Pairing;

/// All of them.
pub const FAMILIES: [Family; 13] =
    [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, SMOLLM3, OLMO2, GRANITE, GPT2, GPT_NEOX, GPTJ];

const KEYS: SizeKeys = SizeKeys {
    hidden: "hidden_size",
    intermediate: "intermediate_size",
    widens: None,
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    kv_heads: Some("num_key_value_heads"),
    positions: "max_position_embeddings",
    eps: "rms_norm_eps",
    activation: "hidden_act",
};

const GPT_KEYS: SizeKeys = SizeKeys {
    hidden: "n_embd",
    intermediate: "n_inner",
    widens: Some(4),
    layers: "n_layer",
    heads: "n_head",
    kv_heads: None,
    positions: "n_positions",
    eps: "layer_norm_epsilon",
    activation: "activation_function",
};

const ROPE: RopeTraits = RopeTraits {
    pairing: Pairing::Halves,
    turning: Turning::All,
    theta: 10_000,
    theta_key: "rope_theta",
    local: None,
    skips: false,
    long: false,
};

const ATTENTION_BIAS: Bias = Bias::Stated("attention_bias", false);
const MLP_BIAS: Bias = Bias::Stated("mlp_bias", false);

/// Llama 2 and 3, SmolLM2, TinyLlama.
pub const LLAMA: Family = Family {
    model_type: "llama",
    keys: KEYS,
    embed: "model.embed_tokens",
    positions: None,
    layers: "model.layers",
    norm: "model.norm",
    head: "lm_head",
    stored_head: None,
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    output: "self_attn.o_proj",
    up: Up::Gated(["mlp.gate_proj", "mlp.up_proj"]),
    down: "mlp.down_proj",
    norms: Norms {
        attention: Some("input_layernorm"),
        after_attention: None,
        mlp: Some("post_attention_layernorm"),
        after_mlp: None,
    },
    norm_kind: NormKind::Rms,
    query_norm: QueryNorm::None,
    residual: Residual::InTurn,
    activation: "silu",
    rope: Some(ROPE),
    windows: Windows::None,
    scale: Scale::Head,
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    mlp_bias: MLP_BIAS,
    head_bias: false,
    embedding_scale: EmbeddingScale::One,
    multipliers: None,
    score_cap: None,
    logit_cap: None,
    tied: false,
    head_dim: None,
    transposed: false,
};

pub const MISTRAL: Family = Family {
    model_type: "mistral",
    windows: Windows::All(Some(4096)),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    ..LLAMA
};

/// Qwen 2 and 2.5.
pub const QWEN2: Family = Family {
    model_type: "qwen2",
    windows: Windows::From,
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    ..LLAMA
};

pub const QWEN3: Family = Family {
    model_type: "qwen3",
    qkv_bias: ATTENTION_BIAS,
    output_bias: ATTENTION_BIAS,
    query_norm: QueryNorm::EachHead,
    head_dim: Some(128),
    ..QWEN2
};

pub const GEMMA2: Family = Family {
    model_type: "gemma2",
    keys: SizeKeys { activation: "hidden_activation", ..KEYS },
    norms: Norms {
        attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
    },
    norm_kind: NormKind::RmsPlusOne,
    activation: "gelu_pytorch_tanh",
    windows: Windows::Between(2, false),
    scale: Scale::Root("query_pre_attn_scalar", 256),
    mlp_bias: Bias::Never,
    embedding_scale: EmbeddingScale::Root,
    score_cap: Some(Cap { key: "attn_logit_softcapping", default: Some(50) }),
    logit_cap: Some(Cap { key: "final_logit_softcapping", default: Some(30) }),
    tied: true,
    head_dim: Some(256),
    ..LLAMA
};

/// Gemma 3's text models. transformers caps their logits where the config says so, their scores never.
pub const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    query_norm: QueryNorm::EachHead,
    rope: Some(RopeTraits { theta: 1_000_000, local: Some(("rope_local_base_freq", 10_000)), ..ROPE }),
    windows: Windows::Between(6, true),
    score_cap: None,
    logit_cap: Some(Cap { key: "final_logit_softcapping", default: None }),
    ..GEMMA2
};

/// Phi-3, 3.5 and 4, mini and medium.
pub const PHI3: Family = Family {
    model_type: "phi3",
    qkv: Qkv::Joined("self_attn.qkv_proj"),
    up: Up::GatedJoined("mlp.gate_up_proj"),
    rope: Some(RopeTraits { turning: Turning::Share("partial_rotary_factor", 100), long: true, ..ROPE }),
    windows: Windows::All(None),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Never,
    ..LLAMA
};

pub const SMOLLM3: Family = Family {
    model_type: "smollm3",
    rope: Some(RopeTraits { theta: 2_000_000, skips: true, ..ROPE }),
    windows: Windows::WithoutRope,
    tied: true,
    ..LLAMA
};

pub const OLMO2: Family = Family {
    model_type: "olmo2",
    norms: Norms {
        attention: None,
        after_attention: Some("post_attention_layernorm"),
        mlp: None,
        after_mlp: Some("post_feedforward_layernorm"),
    },
    query_norm: QueryNorm::AllHeads,
    mlp_bias: Bias::Never,
    ..LLAMA
};

pub const GRANITE: Family = Family {
    model_type: "granite",
    scale: Scale::Stated("attention_multiplier"),
    embedding_scale: EmbeddingScale::Stated("embedding_multiplier"),
    multipliers: Some(Multipliers { residual: "residual_multiplier", logits: "logits_scaling" }),
    ..LLAMA
};

pub const GPT2: Family = Family {
    model_type: "gpt2",
    keys: GPT_KEYS,
    embed: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    norm: "transformer.ln_f",
    qkv: Qkv::Joined("attn.c_attn"),
    output: "attn.c_proj",
    up: Up::Plain("mlp.c_fc"),
    down: "mlp.c_proj",
    norms: Norms { attention: Some("ln_1"), after_attention: None, mlp: Some("ln_2"), after_mlp: None },
    norm_kind: NormKind::Layer,
    activation: "gelu_new",
    rope: None,
    scale: Scale::Gpt2,
    qkv_bias: Bias::Always,
    output_bias: Bias::Always,
    mlp_bias: Bias::Always,
    tied: true,
    transposed: true,
    ..LLAMA
};

/// GPT-NeoX and Pythia.
pub const GPT_NEOX: Family = Family {
    model_type: "gpt_neox",
    keys: SizeKeys { eps: "layer_norm_eps", kv_heads: None, ..KEYS },
    embed: "gpt_neox.embed_in",
    layers: "gpt_neox.layers",
    norm: "gpt_neox.final_layer_norm",
    stored_head: Some("embed_out"),
    qkv: Qkv::ByHead("attention.query_key_value"),
    output: "attention.dense",
    up: Up::Plain("mlp.dense_h_to_4h"),
    down: "mlp.dense_4h_to_h",
    norm_kind: NormKind::Layer,
    residual: Residual::SideBySideUnless("use_parallel_residual"),
    activation: "gelu",
    rope: Some(RopeTraits { turning: Turning::Share("rotary_pct", 25), theta_key: "rotary_emb_base", ..ROPE }),
    qkv_bias: Bias::Stated("attention_bias", true),
    output_bias: Bias::Stated("attention_bias", true),
    mlp_bias: Bias::Always,
    ..LLAMA
};

pub const GPTJ: Family = Family {
    model_type: "gptj",
    keys: GPT_KEYS,
    embed: "transformer.wte",
    layers: "transformer.h",
    norm: "transformer.ln_f",
    qkv: Qkv::Apart(["attn.q_proj", "attn.k_proj", "attn.v_proj"]),
    output: "attn.out_proj",
    up: Up::Plain("mlp.fc_in"),
    down: "mlp.fc_out",
    norms: Norms { attention: Some("ln_1"), after_attention: None, mlp: Some("ln_1"), after_mlp: None },
    norm_kind: NormKind::Layer,
    residual: Residual::SideBySide,
    activation: "gelu_new",
    rope: Some(RopeTraits { pairing: Pairing::Neighbours, turning: Turning::Count("rotary_dim", 64), ..ROPE }),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    mlp_bias: Bias::Always,
    head_bias: true,
    ..LLAMA
};
