//! A PEFT adapter folder: `adapter_config.json` and the A and B matrices in `adapter_model.safetensors`.
//!
//! A module's matrices stand under `base_model.model.MODULE.lora_A.weight`, `[r, in]`, and `….lora_B.weight`,
//! `[out, r]`; the module's weight becomes `W + scale·B·A`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::adapter_config::{self, AdapterConfig};
use super::card::{Training, model_card};
use super::targets::{ALL_LINEAR, last_part};
use crate::recipe::TargetModules;
use crate::store::write_text;
use crate::weights::safetensors::Stored;
use crate::weights::{DType, SafetensorsFile, SafetensorsWriter};
use crate::{Error, Result};

/// The matrices' file.
pub const WEIGHTS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";
const SUFFIX_A: &str = ".lora_A.weight";
const SUFFIX_B: &str = ".lora_B.weight";

/// An adapter in memory. One that was read is whole and finite.
#[derive(Debug, Clone)]
pub struct AdapterFolder {
    /// What the matrices mean.
    pub config: AdapterConfig,
    /// A pair of matrices a module, by layer.
    pub matrices: Vec<AdapterMatrix>,
}

/// The two thin matrices of one module, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterMatrix {
    /// The module, e.g. `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `[r, input]`
    pub a: Vec<f32>,
    /// `[output, r]`
    pub b: Vec<f32>,
    /// Rank.
    pub r: usize,
    /// Width of the module's input.
    pub input: usize,
    /// Width of the module's output.
    pub output: usize,
}

impl AdapterFolder {
    /// Reads an adapter.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field or tensor.
    pub fn read(folder: &Path) -> Result<Self> {
        let config = AdapterConfig::read(folder)?;
        let path = folder.join(WEIGHTS);
        if !path.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::input(format!(
                "{}: adapter_model.bin is a pickle, which can run code when it is read and is refused; load the \
                 adapter with PEFT and save_pretrained it",
                folder.display()
            )));
        }
        let matrices = read_matrices(&SafetensorsFile::open(&path)?, &config)?;
        Ok(Self { config, matrices })
    }

    /// Writes an adapter into an existing folder: config, matrices in f32, and a model card that tells of its
    /// training where that is known. Equal adapters give equal bytes.
    ///
    /// # Errors
    /// [`Error::Run`] where a value is not finite or a file cannot be written; [`Error::Resource`] on a full disk.
    pub fn write(&self, folder: &Path, training: Option<Training>) -> Result<()> {
        let mut config = self.config.clone();
        if let TargetModules::Pattern(pattern) = &config.target_modules {
            config.target_modules = TargetModules::List(self.spelled_out(pattern));
        }
        write_text(&folder.join(adapter_config::FILE), &config.to_text())?;
        write_text(&folder.join("README.md"), &model_card(&config, training))?;

        let entries: Vec<_> = self.matrices.iter().flat_map(AdapterMatrix::entries).collect();
        let path = folder.join(WEIGHTS);
        let mut writer = SafetensorsWriter::create(&path, &entries, &[("format", "pt")])?;
        let mut names = entries.iter().map(|(name, ..)| name);
        let mut bytes = Vec::new();
        for values in self.matrices.iter().flat_map(|matrix| [&matrix.a, &matrix.b]) {
            // Entries and values run side by side.
            let name = names.next().map_or("", String::as_str);
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::run(format!("{}: tensor {name:?} is not finite and is not saved", path.display())));
            }
            bytes.clear();
            DType::F32.encode(values, &mut bytes);
            writer.write(name, &bytes)?;
        }
        writer.finish()
    }

    /// The names that stand for a text as `target_modules` in the file. `all-linear` becomes the layers' last parts, as
    /// PEFT writes it: other programs know the shorthand less well. A regex becomes the layers that it chose, in full:
    /// PEFT holds it against modules of every kind and raises where it matches one that is no linear layer, as
    /// `.*self_attn.*` does.
    fn spelled_out(&self, pattern: &str) -> Vec<String> {
        let modules = self.matrices.iter().map(|matrix| matrix.module.as_str());
        let names: BTreeSet<&str> = match pattern.eq_ignore_ascii_case(ALL_LINEAR) {
            true => modules.map(last_part).collect(),
            false => modules.collect(),
        };
        names.into_iter().map(str::to_string).collect()
    }

    /// Holds the adapter against a base's linear layers, `(module, input, output)`.
    ///
    /// # Errors
    /// [`Error::Input`] naming the first module that the base does not have, has in another shape, or has without
    /// the adapter having matrices for it.
    pub fn check_fits(&self, modules: &[(String, usize, usize)]) -> Result<()> {
        let another = |reason: String| {
            let of = self.config.base_model_name_or_path.as_deref().unwrap_or("unnamed");
            let file = self.config.source();
            Error::input(format!(
                "{file}: the adapter was made for another base ({of}): {reason}; use it with its own base"
            ))
        };
        let shapes: BTreeMap<&str, (usize, usize)> = modules.iter().map(|(m, i, o)| (m.as_str(), (*i, *o))).collect();
        for matrix in &self.matrices {
            let (module, ours) = (&matrix.module, (matrix.input, matrix.output));
            match shapes.get(module.as_str()) {
                None => return Err(another(format!("this base has no linear layer {module:?}"))),
                Some(shape) if *shape != ours => {
                    let ((i, o), (base_i, base_o)) = (ours, *shape);
                    let reason = format!("{module:?} is {base_i} → {base_o} here, the adapter has {i} → {o}");
                    return Err(another(reason));
                }
                Some(_) => {}
            }
        }
        let held: BTreeSet<&str> = self.matrices.iter().map(|m| m.module.as_str()).collect();
        let targets = self.config.targets(modules.iter().map(|(module, ..)| module.as_str()))?;
        match targets.into_iter().find(|module| !held.contains(module)) {
            Some(module) => Err(another(format!("its target_modules mean {module:?}, for which it has no matrices"))),
            None => Ok(()),
        }
    }
}

impl AdapterMatrix {
    /// The two tensors as they stand in the file.
    fn entries(&self) -> [(String, DType, Vec<usize>); 2] {
        let name = |suffix| format!("{PREFIX}{}{suffix}", self.module);
        [
            (name(SUFFIX_A), DType::F32, vec![self.r, self.input]),
            (name(SUFFIX_B), DType::F32, vec![self.output, self.r]),
        ]
    }
}

fn read_matrices(file: &SafetensorsFile, config: &AdapterConfig) -> Result<Vec<AdapterMatrix>> {
    let bad = |reason: String| Error::input(format!("{}: {reason}", file.path().display()));
    let mut modules: Vec<&str> = Vec::new();
    for name in file.entries().keys() {
        let inner = name.strip_prefix(PREFIX).unwrap_or_default();
        match (inner.strip_suffix(SUFFIX_A), inner.strip_suffix(SUFFIX_B)) {
            (Some(module), _) if !module.is_empty() => modules.push(module),
            (_, Some(module)) if file.entries().contains_key(&format!("{PREFIX}{module}{SUFFIX_A}")) => {}
            (_, Some(_)) => return Err(bad(format!("tensor {name:?} has no {SUFFIX_A} beside it"))),
            _ => {
                return Err(bad(format!(
                    "tensor {name:?} is not a LoRA matrix of a linear layer, and nothing else of an adapter is read; \
                     merge this adapter with PEFT and use the merged model as the base"
                )));
            }
        }
    }
    if modules.is_empty() {
        return Err(bad("it holds no matrices".into()));
    }
    modules.sort_by(|x, y| by_layer(x, y));

    let matrix = |module: &str, suffix: &str| -> Result<([usize; 2], Vec<f32>)> {
        let name = format!("{PREFIX}{module}{suffix}");
        let (Some(entry), Some(bytes)) = (file.entries().get(&name), file.bytes(&name)) else {
            return Err(bad(format!("tensor {name:?} is missing")));
        };
        let (Stored::Float(dtype), [rows, columns]) = (entry.dtype, entry.shape.as_slice()) else {
            let (dtype, shape) = (entry.dtype, &entry.shape);
            return Err(bad(format!(
                "tensor {name:?} should be a matrix of floats, it is {dtype:?} of shape {shape:?}"
            )));
        };
        let mut values = vec![0.0; bytes.len() / dtype.size()];
        dtype.decode(bytes, &mut values);
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return Err(bad(format!("tensor {name:?} is empty or not finite; use an earlier checkpoint of it")));
        }
        Ok(([*rows, *columns], values))
    };
    let mut matrices = Vec::with_capacity(modules.len());
    for module in modules {
        let ([r, input], a) = matrix(module, SUFFIX_A)?;
        let ([output, columns], b) = matrix(module, SUFFIX_B)?;
        let rank = config.rank_of(module)?;
        if (r, columns) != (rank, rank) {
            let shapes = format!("A is [{r}, {input}] and B is [{output}, {columns}]");
            return Err(bad(format!(
                "{module:?}: {shapes}, but the config says rank {rank}; fetch both files of one adapter"
            )));
        }
        matrices.push(AdapterMatrix { module: module.to_string(), a, b, r, input, output });
    }
    Ok(matrices)
}

/// The order of dotted names in which layer 2 stands before layer 10: part by part, numbers (by size, then by spelling)
/// before texts.
fn by_layer(x: &str, y: &str) -> Ordering {
    let parts = |name| str::split(name, '.').map(|part| (part.parse::<u64>().map_err(drop), part));
    parts(x).cmp(parts(y))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":"all-linear",
        "base_model_name_or_path":"owner/base"}"#;

    fn config(text: &str) -> AdapterConfig {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(adapter_config::FILE), text).unwrap();
        AdapterConfig::read(folder.path()).unwrap()
    }

    fn adapter() -> AdapterFolder {
        let modules = ["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj"];
        let matrix = |(i, module): (usize, &&str)| AdapterMatrix {
            module: module.to_string(),
            a: (0..6).map(|k| (i * 10 + k) as f32 / 8.0).collect(),
            b: (0..8).map(|k| -((i * 10 + k) as f32)).collect(),
            r: 2,
            input: 3,
            output: 4,
        };
        AdapterFolder { config: config(CONFIG), matrices: modules.iter().enumerate().map(matrix).collect() }
    }

    fn shapes(names: &[&str]) -> Vec<(String, usize, usize)> {
        names.iter().map(|name| (name.to_string(), 3, 4)).collect()
    }

    /// Writes these tensors and reads them as an adapter.
    fn read(tensors: &[(&str, DType, &[usize])], value: f32) -> Result<AdapterFolder> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(adapter_config::FILE), CONFIG).unwrap();
        let entries: Vec<_> = tensors.iter().map(|(n, d, s)| (format!("{PREFIX}{n}"), *d, s.to_vec())).collect();
        let mut writer = SafetensorsWriter::create(&folder.path().join(WEIGHTS), &entries, &[]).unwrap();
        for (name, dtype, shape) in &entries {
            let mut bytes = Vec::new();
            dtype.encode(&vec![value; shape.iter().product()], &mut bytes);
            writer.write(name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        AdapterFolder::read(folder.path())
    }

    #[test]
    fn what_is_written_reads_the_same_and_layers_are_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let written = adapter();
        written.write(folder.path(), None).unwrap();
        let back = AdapterFolder::read(folder.path()).unwrap();
        assert_eq!(back.matrices, written.matrices);
        assert_eq!(back.config.target_modules, TargetModules::List(vec!["up_proj".into()]));
        let file = || std::fs::read(folder.path().join(WEIGHTS)).unwrap();
        let first = file();
        back.write(folder.path(), None).unwrap();
        assert_eq!(first, file());
        let card = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
        assert!(card.contains("base_model: \"owner/base\""), "{card}");
    }

    #[test]
    fn a_regex_is_written_as_the_layers_that_it_chose() {
        let folder = tempfile::tempdir().unwrap();
        let mut written = adapter();
        written.config.target_modules = TargetModules::Pattern(r".*\.mlp\..*".into());
        written.write(folder.path(), None).unwrap();
        let back = AdapterFolder::read(folder.path()).unwrap();
        let modules = ["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj"];
        assert_eq!(back.config.target_modules, TargetModules::List(modules.map(String::from).to_vec()));
        assert_eq!(back.matrices, written.matrices);
        let another = "model.layers.1.mlp.up_proj";
        back.check_fits(&shapes(&[modules[0], modules[1], another])).unwrap();
    }

    #[test]
    fn the_order_of_names_is_one_whatever_they_are() {
        let sorted = "01 1 1.a 9 010.b 10 10.a 18446744073709551615 18446744073709551616 1a a a.9.x a.10 a.1a b";
        let sorted: Vec<&str> = sorted.split(' ').collect();
        for (i, x) in sorted.iter().enumerate() {
            for (j, y) in sorted.iter().enumerate() {
                assert_eq!(by_layer(x, y), i.cmp(&j), "{x:?} and {y:?}");
            }
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_not_saved() {
        let folder = tempfile::tempdir().unwrap();
        let mut adapter = adapter();
        adapter.matrices[1].b[3] = f32::NAN;
        let said = adapter.write(folder.path(), None).unwrap_err().to_string();
        assert!(said.contains("model.layers.10.mlp.up_proj.lora_B.weight\" is not finite"), "{said}");
    }

    #[test]
    fn bad_matrices_are_refused_by_name() {
        use DType::{BF16, F32};
        let good = read(&[("x.lora_A.weight", F32, &[2, 3]), ("x.lora_B.weight", BF16, &[4, 2])], 0.5).unwrap();
        assert_eq!((good.matrices[0].input, good.matrices[0].output, good.matrices[0].b[7]), (3, 4, 0.5));
        type Tensors<'a> = &'a [(&'a str, DType, &'a [usize])];
        let cases: [(Tensors, f32, &str); 9] = [
            (&[], 0.0, "holds no matrices"),
            (&[("x.lora_A.weight", F32, &[2, 3])], 0.0, "x.lora_B.weight\" is missing"),
            (&[("x.lora_B.weight", F32, &[4, 2])], 0.0, "has no .lora_A.weight beside it"),
            (&[("x.lora_A.weight", F32, &[3, 3]), ("x.lora_B.weight", F32, &[4, 3])], 0.0, "config says rank 2"),
            (&[("x.lora_A.weight", F32, &[2, 3]), ("x.lora_B.weight", F32, &[4, 1])], 0.0, "config says rank 2"),
            (&[("x.lora_A.weight", F32, &[6]), ("x.lora_B.weight", F32, &[4, 2])], 0.0, "should be a matrix"),
            (&[("x.lora_A.weight", F32, &[2, 3]), ("x.lora_B.weight", F32, &[4, 2])], f32::INFINITY, "not finite"),
            (&[("x.lora_A.weight", F32, &[2, 0]), ("x.lora_B.weight", F32, &[4, 2])], 0.0, "is empty"),
            (&[("x.lora_embedding_A", F32, &[2, 3])], 0.0, "is not a LoRA matrix"),
        ];
        for (tensors, value, reason) in cases {
            let said = read(tensors, value).expect_err(reason).to_string();
            assert!(said.contains(reason) && said.contains(WEIGHTS), "said {said:?}, not {reason:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(adapter_config::FILE), CONFIG).unwrap();
        std::fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
        assert!(AdapterFolder::read(folder.path()).unwrap_err().to_string().contains("pickle"));
    }

    #[test]
    fn an_adapter_of_another_base_is_told() {
        let adapter = adapter();
        let both = ["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj"];
        adapter.check_fits(&shapes(&both)).unwrap();
        let said = |shapes: Vec<_>| adapter.check_fits(&shapes).unwrap_err().to_string();
        assert!(said(shapes(&both[..1])).contains("no linear layer \"model.layers.10.mlp.up_proj\""));
        let mut wide = shapes(&both);
        wide[1].2 = 5;
        assert!(said(wide).contains("\"model.layers.10.mlp.up_proj\" is 3 → 5 here, the adapter has 3 → 4"));
        let more = shapes(&[both[0], both[1], "model.layers.11.mlp.up_proj"]);
        assert!(said(more).contains("mean \"model.layers.11.mlp.up_proj\", for which it has no"));
        adapter.check_fits(&shapes(&[both[0], both[1], "lm_head"])).unwrap();
    }
}
