//! From GGUF's tensor names to those of the Hugging Face folder that the file was converted from.
//!
//! One row an architecture: llama.cpp's converter renames tensors and changes some of them on the way, which is
//! undone when they are read.

/// What llama.cpp's converter did to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The rows of each head were put in another order: [`super::matrix::HalvesTogether`].
    HeadRows,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Whether q and k are stored for a rotation of neighbours.
    pub permuted: bool,
    /// GGUF's names of whole tensors (without `.weight` and `.bias`) and the folder's.
    outer: &'static [(&'static str, &'static str)],
    /// The same of tensors of a layer, after `blk.N.` and `model.layers.N.`.
    inner: &'static [(&'static str, &'static str)],
}

const OUTER: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    permuted: true,
    outer: &OUTER,
    inner: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
};

const ARCHITECTURES: [Architecture; 1] = [LLAMA];

impl Architecture {
    /// The row of a name, if there is one.
    pub fn find(name: &str) -> Option<Self> {
        ARCHITECTURES.into_iter().find(|row| row.name == name)
    }

    /// The row of a `model_type`, if there is one.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        ARCHITECTURES.into_iter().find(|row| row.model_type == model_type)
    }

    /// The names that are read.
    pub fn known() -> String {
        ARCHITECTURES.map(|row| row.name).join(", ")
    }

    /// The folder's name of a tensor, and what was done to it; `None` where the model has no such part.
    pub fn folder_name(&self, gguf: &str) -> Option<(String, Change)> {
        let (stem, ending) = gguf.rsplit_once('.').filter(|(_, ending)| ["weight", "bias"].contains(ending))?;
        let lookup = |table: &[(&str, &'static str)], stem| table.iter().find(|row| row.0 == stem).map(|row| row.1);
        if let Some(name) = lookup(self.outer, stem) {
            return Some((format!("{name}.{ending}"), Change::None));
        }
        let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
        layer.parse::<u32>().ok().filter(|number| number.to_string() == layer)?;
        let change = match part {
            "attn_q" | "attn_k" if self.permuted => Change::HeadRows,
            _ => Change::None,
        };
        Some((format!("model.layers.{layer}.{}.{ending}", lookup(self.inner, part)?), change))
    }

    /// GGUF's name of a tensor, and what is to be done to it: the inverse of [`Architecture::folder_name`].
    pub fn gguf_name(&self, folder: &str) -> Option<(String, Change)> {
        let (stem, ending) = folder.rsplit_once('.')?;
        let lookup = |table: &[(&'static str, &str)], stem| table.iter().find(|row| row.1 == stem).map(|row| row.0);
        let gguf = match lookup(self.outer, stem) {
            Some(name) => format!("{name}.{ending}"),
            None => {
                let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
                format!("blk.{layer}.{}.{ending}", lookup(self.inner, part)?)
            }
        };
        self.folder_name(&gguf).filter(|(name, _)| name == folder).map(|(_, change)| (gguf, change))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (gguf, folder, change) in [
            ("token_embd.weight", "model.embed_tokens.weight", Change::None),
            ("output.weight", "lm_head.weight", Change::None),
            ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight", Change::HeadRows),
            ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias", Change::HeadRows),
            ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight", Change::None),
        ] {
            assert_eq!(LLAMA.folder_name(gguf), Some((folder.to_string(), change)));
            assert_eq!(LLAMA.gguf_name(folder), Some((gguf.to_string(), change)));
        }
        for other in ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.weight", "rope_freqs.weight", "output"] {
            assert_eq!(LLAMA.folder_name(other), None, "{other}");
        }
        assert_eq!(LLAMA.gguf_name("model.layers.01.mlp.up_proj.weight"), None);
    }
}
