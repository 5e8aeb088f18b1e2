//! An adapter as one GGUF file, for llama.cpp's `--lora` and Ollama's `ADAPTER`.
//!
//! llama.cpp adds `alpha / rank · B·A`, one alpha a file and the rank that B has. What a module's scale is in PEFT
//! (rsLoRA, an alpha of its own) is worked into its B.

use std::path::Path;

use super::merge::refuse_taken;
use super::peft::{AdapterFolder, AdapterMatrix};
use crate::model::Config;
use crate::store::write_atomic;
use crate::weights::gguf::GgmlType;
use crate::weights::gguf::matrix::row_of_halves;
use crate::weights::gguf::names::{Architecture, Change};
use crate::weights::gguf::writer::{GgufWriter, Keys};
use crate::{Error, Result};

/// Writes the adapter of a base into the file `out`. Matrices stay f32.
///
/// # Errors
/// [`Error::Recipe`] where `out` exists; [`Error::Input`] where the adapter does not fit the base, or has what a GGUF
/// adapter cannot hold; [`Error::Run`] and [`Error::Resource`] where the file cannot be written.
pub fn write(adapter: &AdapterFolder, base: &Path, out: &Path) -> Result<()> {
    refuse_taken(out)?;
    let config = Config::read(base)?;
    adapter.check_fits(&config.modules())?;
    let refuse = |reason: &str| Error::input(format!("{}: {reason}; use --to merged", base.display()));
    let architecture = Architecture::of_model_type(config.family.model_type)
        .ok_or_else(|| refuse("adapters of this family are not written as GGUF"))?;
    let mut keys = Keys::default();
    keys.text("general.type", "adapter");
    keys.text("general.architecture", architecture.name);
    keys.text("adapter.type", "lora");
    keys.number("adapter.lora.alpha", adapter.config.lora_alpha as f32);

    let mut entries = Vec::with_capacity(2 * adapter.matrices.len());
    let mut numbers = Vec::with_capacity(2 * adapter.matrices.len());
    for matrix in &adapter.matrices {
        let AdapterMatrix { module, a, r, input, output, .. } = matrix;
        if *module == config.family.head && config.tie_word_embeddings {
            return Err(refuse("the head is the embedding, which llama.cpp does not adapt"));
        }
        let (name, change) = architecture
            .gguf_name(&format!("{module}.weight"))
            .ok_or_else(|| refuse(&format!("{module} has no name in GGUF")))?;
        let head_dim = (change == Change::HeadRows).then_some(config.head_dim);
        let applied = adapter.config.lora_alpha / *r as f64;
        let factor = adapter.config.scale_of(module)? / applied;
        if !factor.is_finite() {
            return Err(refuse(&format!("lora_alpha is {}, which llama.cpp cannot scale", adapter.config.lora_alpha)));
        }
        entries.push((format!("{name}.lora_a"), GgmlType::F32, vec![*r, *input]));
        entries.push((format!("{name}.lora_b"), GgmlType::F32, vec![*output, *r]));
        numbers.push(a.clone());
        numbers.push(scaled_b(matrix, factor as f32, head_dim));
    }
    write_atomic(out, |file| {
        let mut writer = GgufWriter::begin(file, &keys, &entries)?;
        for numbers in &numbers {
            writer.write(&numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())?;
            writer.end_tensor()?;
        }
        Ok(())
    })
}

/// B times `factor`; with `head_dim` its rows stand as those of the weight that they are added to.
fn scaled_b(matrix: &AdapterMatrix, factor: f32, head_dim: Option<usize>) -> Vec<f32> {
    let row = |place: usize| head_dim.map_or(place, |dim| row_of_halves(place, dim));
    let rows = (0..matrix.output).map(|place| &matrix.b[row(place) * matrix.r..][..matrix.r]);
    rows.flatten().map(|x| x * factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{AdapterConfig, adapter_config};
    use crate::weights::gguf::GgufFile;
    use std::path::PathBuf;

    fn base(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
    }

    fn adapter(module: &str, input: usize, output: usize, more: &str) -> AdapterFolder {
        let folder = tempfile::tempdir().unwrap();
        let last = module.rsplit('.').next().unwrap();
        let config = format!(r#"{{"peft_type":"LORA","r":2,"lora_alpha":6,"target_modules":"{module}"{more}}}"#);
        std::fs::write(folder.path().join(adapter_config::FILE), config.replace("{last}", last)).unwrap();
        let config = AdapterConfig::read(folder.path()).unwrap();
        let numbers = |n: usize| (0..n).map(|i| i as f32).collect();
        let (a, b) = (numbers(2 * input), numbers(2 * output));
        AdapterFolder { config, matrices: vec![AdapterMatrix { module: module.into(), a, b, r: 2, input, output }] }
    }

    #[test]
    fn scales_are_in_b_and_rows_of_a_head_in_ggufs_order() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("adapter.gguf");
        let ours =
            adapter("model.layers.1.self_attn.k_proj", 40, 32, r#","use_rslora":true,"alpha_pattern":{"{last}":12}"#);
        write(&ours, &base("llama"), &out).unwrap();
        let file = GgufFile::open(&out).unwrap();
        let keys = file.metadata();
        assert_eq!(keys.text("general.type").unwrap(), Some("adapter"));
        assert_eq!(keys.number("adapter.lora.alpha").unwrap(), Some(6.0));
        let floats = |name: &str| -> (Vec<usize>, Vec<f32>) {
            let tensor = &file.tensors()[name];
            let bytes = &file.map()[tensor.range.clone()];
            let numbers = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
            (tensor.shape.clone(), numbers.collect())
        };
        let (shape, a) = floats("blk.1.attn_k.weight.lora_a");
        assert_eq!((shape, &a), (vec![2, 40], &ours.matrices[0].a));
        let (shape, b) = floats("blk.1.attn_k.weight.lora_b");
        assert_eq!((shape, b.len()), (vec![32, 2], 64));
        // alpha / sqrt(r) = 12 / 1.414, of which llama.cpp applies 6 / 2; heads of 16: rows 0, 8, 1, 9, …
        let factor = (12.0 / 2f64.sqrt() / 3.0) as f32;
        for (place, row) in [(0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24), (31, 31)] {
            assert_eq!(b[2 * place..][..2], [2 * row, 2 * row + 1].map(|i| i as f32 * factor), "{place}");
        }
        assert!(write(&ours, &base("llama"), &out).is_err(), "what is there stays");
    }

    #[test]
    fn what_a_gguf_adapter_cannot_hold_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("adapter.gguf");
        let said = |adapter: AdapterFolder, model| write(&adapter, &base(model), &out).unwrap_err().to_string();
        let query = || adapter("model.layers.0.self_attn.q_proj", 40, 64, "");
        assert!(said(query(), "llama-tied-bf16").contains("made for another base"));
        assert!(said(adapter("lm_head", 32, 64, ""), "llama-tied-bf16").contains("the head is the embedding"));
        let mut zero = query();
        zero.config.lora_alpha = 0.0;
        assert!(said(zero, "llama").contains("lora_alpha is 0"));
        assert!(!out.exists());
    }
}
