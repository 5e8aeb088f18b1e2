//! The table of families: what a decoder of each is called by and made of.

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The embedding's tensor, `[vocabulary, hidden]`.
    pub embed: &'static str,
    /// What a layer's number follows in its tensors' names.
    pub layers: &'static str,
    /// The last norm's tensor.
    pub norm: &'static str,
    /// The head's tensor where it is not tied to the embedding.
    pub head: &'static str,
    /// Whether `attention_bias` and `mlp_bias` count; else there are none, whatever they say.
    pub biases: bool,
    /// Whether `sliding_window` counts.
    pub sliding_window: bool,
}

/// Llama 2 and 3, SmolLM2, TinyLlama.
const LLAMA: Family = Family {
    model_type: "llama",
    embed: "model.embed_tokens.weight",
    layers: "model.layers",
    norm: "model.norm.weight",
    head: "lm_head.weight",
    biases: true,
    sliding_window: false,
};

const MISTRAL: Family = Family { model_type: "mistral", biases: false, sliding_window: true, ..LLAMA };

const FAMILIES: [Family; 2] = [LLAMA, MISTRAL];

impl Family {
    /// The row of a `model_type`, if there is one.
    pub fn find(model_type: &str) -> Option<Self> {
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    }

    /// The model types that are read.
    pub fn known() -> String {
        FAMILIES.map(|family| family.model_type).join(", ")
    }
}
