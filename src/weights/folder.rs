//! A model's folder: one safetensors file or several with an index, seen as one set of named tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::mapped::{MappedBytes, MappedTensor};
use super::safetensors::{Entry, SafetensorsFile, Stored};
use super::unique::UniqueMap;
use crate::{Error, Result, outside};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The weights of one model, mapped; nothing is read before it is used.
#[derive(Debug)]
pub struct ModelFolder {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// In which of `files` a tensor stands.
    place: BTreeMap<String, usize>,
}

impl ModelFolder {
    /// Opens a model's folder and checks its files against each other.
    ///
    /// # Errors
    /// [`Error::Input`] where files are missing, broken or contradict each other, or where the weights are of a kind
    /// that is not read: pickle, GGUF, quantised.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(not_a_folder(path));
        }
        refuse_quantised(path)?;
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        // Where a folder holds both, transformers reads the single file.
        let (files, place) = if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            let place = file.entries().keys().map(|name| (name.clone(), 0)).collect();
            (vec![file], place)
        } else if index.exists() {
            open_shards(path, &index)?
        } else {
            return Err(no_safetensors(path));
        };
        Ok(Self { path: path.to_path_buf(), files, place })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// A tensor's format, shape and place without reading it; `None` where there is no such tensor.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.place.get(name).map(|file| &self.files[*file].entries()[name])
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor or where it is not stored as f32, f16 or bf16.
    pub fn tensor(&self, name: &str) -> Result<MappedTensor> {
        let Some(file) = self.place.get(name).map(|file| &self.files[*file]) else {
            return Err(Error::input(format!(
                "{}: there is no tensor {name:?}, which config.json calls for; fetch the model's files again, all of one \
                 model",
                self.path.display()
            )));
        };
        let entry = &file.entries()[name];
        match entry.dtype {
            Stored::Float(dtype) => Ok(MappedTensor {
                bytes: MappedBytes::new(Arc::clone(file.map()), entry.range.clone()),
                dtype,
                shape: entry.shape.clone(),
            }),
            Stored::Other(dtype) => Err(Error::input(format!(
                "{}: tensor {name:?} is stored as {dtype}; F32, F16 and BF16 are read",
                file.path().display()
            ))),
        }
    }

    /// The bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().flat_map(|file| file.entries().values()).map(|entry| entry.range.len() as u64).sum()
    }

    /// SHA-256 over `config.json` and the weight files: what a cached result depends on. The files are read in the
    /// ordinary way, not through the map, so that none of their pages count as this process's memory.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let config = self.path.join("config.json");
        let paths = config.exists().then_some(config.as_path()).into_iter().chain(self.files.iter().map(|f| f.path()));
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        for path in paths {
            let reading = |e| Error::reading(path, e);
            let mut file = File::open(path).map_err(reading)?;
            let mut length = 0u64;
            loop {
                let read = file.read(&mut buffer).map_err(reading)?;
                if read == 0 {
                    break;
                }
                length += read as u64;
                hash.update(&buffer[..read]);
            }
            // The length keeps bytes from moving over the border of two files unseen.
            hash.update(length.to_le_bytes());
        }
        Ok(hash.finalize().into())
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// Opens the shards that the index names and holds each against the index, both ways.
fn open_shards(folder: &Path, index_path: &Path) -> Result<(Vec<SafetensorsFile>, BTreeMap<String, usize>)> {
    let bad =
        |reason: String| Error::input(format!("{}: {reason}; fetch the model's files again", index_path.display()));
    let index: Index = outside::json(&outside::read(index_path, outside::MAX_JSON)?).map_err(bad)?;
    let index = index.weight_map.0;
    let shards: BTreeSet<&str> = index.values().map(String::as_str).collect();
    if shards.is_empty() {
        return Err(bad("it names no tensor".into()));
    }

    let mut files = Vec::with_capacity(shards.len());
    let mut place = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        if !is_plain_file_name(shard) {
            return Err(bad(format!("{shard:?} is not the name of a file in this folder")));
        }
        let path = folder.join(shard);
        if !path.exists() {
            return Err(bad(format!("the file {shard:?} that it names is missing")));
        }
        let file = SafetensorsFile::open(&path)?;
        for name in file.entries().keys() {
            if let Some(first) = place.insert(name.clone(), number) {
                let first: &SafetensorsFile = &files[first];
                let first = first.path().file_name().unwrap_or_default();
                return Err(bad(format!("tensor {name:?} stands in both {first:?} and {shard:?}")));
            }
        }
        files.push(file);
    }

    let shards: Vec<&str> = shards.into_iter().collect();
    for (name, shard) in &index {
        if place.get(name).is_none_or(|number| shards[*number] != shard) {
            return Err(bad(format!("tensor {name:?} is not in {shard:?}, where the index has it")));
        }
    }
    if place.len() != index.len() {
        if let Some((name, number)) = place.iter().find(|(name, _)| !index.contains_key(*name)) {
            return Err(bad(format!("tensor {name:?} of {:?} is not in the index", shards[*number])));
        }
    }
    Ok((files, place))
}

/// Whether a name is that of a file in the folder it is joined to, by the rules of every system: no path, no drive and
/// no stream, no device of Windows, nothing that Windows takes off the end.
fn is_plain_file_name(name: &str) -> bool {
    const DEVICES: [&str; 6] = ["con", "prn", "aux", "nul", "com", "lpt"];
    let stem = name.split('.').next().unwrap_or_default().trim_end().to_ascii_lowercase();
    let device = DEVICES.contains(&stem.trim_end_matches(|c: char| c.is_ascii_digit()));
    let odd = |c: char| c.is_control() || "/\\:*?\"<>|".contains(c);
    !(name.is_empty() || device || name.contains(odd) || name.ends_with(['.', ' ']))
}

/// Quantised checkpoints hold tensors whose names and dtypes can look ordinary: they are told by their config.
fn refuse_quantised(folder: &Path) -> Result<()> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Ok(());
    }
    let config: serde_json::Value = outside::json(&outside::read(&path, outside::MAX_JSON)?)
        .map_err(|e| Error::input(format!("{}: not a JSON object: {e}; fetch the file again", path.display())))?;
    let stated = |key: &str| config.get(key).filter(|value| !value.is_null());
    let Some(quantised) = stated("quantization_config").or(stated("quantization")) else {
        return Ok(());
    };
    let method = quantised.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unnamed");
    Err(Error::input(format!(
        "{}: the weights are quantised (method {method:?}), which is not read yet; use the unquantised checkpoint of \
         this model",
        path.display()
    )))
}

fn not_a_folder(path: &Path) -> Error {
    let shown = path.display();
    if !path.exists() {
        return Error::input(format!("{shown}: there is no such folder"));
    }
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        return Error::input(format!("{shown}: GGUF is not read yet; use the model's safetensors folder"));
    }
    Error::input(format!("{shown}: a model is a folder with config.json and model.safetensors; this is a file"))
}

/// Says what stands in the weights' place, and what to do about it.
fn no_safetensors(folder: &Path) -> Error {
    let shown = folder.display();
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    let ending = |endings: &[&str]| names.iter().find(|name| endings.iter().any(|e| name.to_lowercase().ends_with(e)));
    Error::input(if names.iter().any(|name| name == "adapter_config.json") {
        format!("{shown}: this folder holds an adapter, not a model; name its base here")
    } else if let Some(name) = ending(&[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"]) {
        format!(
            "{shown}: {name} is a pickle, which can run code when it is read and is refused; convert it in Python: \
             AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT, safe_serialization=True)"
        )
    } else if let Some(name) = ending(&[".gguf"]) {
        format!("{shown}: {name} is GGUF, which is not read yet; use the model's safetensors folder")
    } else if let Some(name) = ending(&[".safetensors"]) {
        format!("{shown}: there is {name}, but neither {SINGLE} nor {INDEX}; download the missing file")
    } else {
        format!("{shown}: there are no weights here, neither {SINGLE} nor {INDEX}")
    })
}

#[cfg(test)]
mod tests {
    use super::super::DType;
    use super::*;
    use safetensors::tensor::{Dtype, TensorView};

    fn write(path: &Path, tensors: &[&str]) {
        let data = [0u8, 0, 128, 63];
        let views = tensors.iter().map(|name| (*name, TensorView::new(Dtype::F32, vec![1], &data).unwrap()));
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    /// Two shards, `a` and `b` in the first, `c` in the second, with this `weight_map`.
    fn sharded(weight_map: &str) -> (tempfile::TempDir, Result<ModelFolder>) {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("one.safetensors"), &["a", "b"]);
        write(&folder.path().join("two.safetensors"), &["c"]);
        std::fs::write(folder.path().join(INDEX), format!(r#"{{"metadata":{{}},"weight_map":{weight_map}}}"#)).unwrap();
        let opened = ModelFolder::open(folder.path());
        (folder, opened)
    }

    #[test]
    fn shards_are_one_model() {
        let (_folder, model) = sharded(r#"{"c":"two.safetensors","a":"one.safetensors","b":"one.safetensors"}"#);
        let model = model.unwrap();
        assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(model.total_bytes(), 12);
        let tensor = model.tensor("c").unwrap();
        assert_eq!((tensor.dtype, tensor.shape.as_slice(), tensor.to_f32()), (DType::F32, &[1][..], vec![1.0]));
        assert!(!model.has("d") && model.tensor("d").unwrap_err().to_string().contains("no tensor \"d\""));
    }

    #[test]
    fn an_index_that_does_not_fit_its_shards_is_refused() {
        let all = r#""a":"one.safetensors","b":"one.safetensors""#;
        let cases = [
            (format!(r#"{{{all},"c":"three.safetensors"}}"#), "\"three.safetensors\" that it names is missing"),
            (format!(r#"{{{all},"c":"one.safetensors"}}"#), "\"c\" is not in \"one.safetensors\""),
            (format!(r#"{{{all},"c":"two.safetensors","d":"two.safetensors"}}"#), "\"d\" is not in"),
            (r#"{"a":"one.safetensors","c":"two.safetensors"}"#.into(), "\"b\" of \"one.safetensors\" is not in the"),
            (format!(r#"{{{all},"c":"../two.safetensors"}}"#), "not the name of a file in this folder"),
            (format!(r#"{{{all},"c":"/etc/passwd"}}"#), "not the name of a file in this folder"),
            (format!(r#"{{{all},"c":".."}}"#), "not the name of a file in this folder"),
            (format!(r#"{{{all},"c":""}}"#), "not the name of a file in this folder"),
            (format!(r#"{{{all},"c":"two.safetensors","c":"one.safetensors"}}"#), "\"c\" stands twice"),
            ("{}".into(), "names no tensor"),
            (r#"{"a":1}"#.into(), "invalid type"),
            ("[]".into(), "invalid type"),
        ];
        for (weight_map, reason) in cases {
            let (_folder, opened) = sharded(&weight_map);
            let said = opened.unwrap_err().to_string();
            assert!(said.contains(reason) && said.contains(INDEX), "{weight_map}: said {said:?}, not {reason:?}");
        }
    }

    #[test]
    fn one_tensor_in_two_shards_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("one.safetensors"), &["a", "b"]);
        write(&folder.path().join("two.safetensors"), &["b"]);
        let index = r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
        std::fs::write(folder.path().join(INDEX), index).unwrap();
        let said = ModelFolder::open(folder.path()).unwrap_err().to_string();
        assert!(said.contains("\"b\" stands in both \"one.safetensors\" and \"two.safetensors\""), "{said}");
    }

    #[test]
    fn folders_of_other_kinds_are_refused_with_a_remedy() {
        let cases = [
            ("pytorch_model.bin", "", "save_pretrained"),
            ("model.pth", "", "pickle"),
            ("x.Q4_K_M.gguf", "", "GGUF, which is not read yet"),
            ("adapter_config.json", "{}", "holds an adapter"),
            ("model-00001-of-00002.safetensors", "", "download the missing file"),
            ("notes.txt", "", "no weights here"),
            ("config.json", r#"{"quantization_config":{"quant_method":"gptq"}}"#, "quantised (method \"gptq\")"),
            ("config.json", r#"{"quantization":{"bits":4}}"#, "quantised"),
            ("config.json", "{", "config.json: not a JSON object: EOF"),
        ];
        for (name, text, reason) in cases {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(name), text).unwrap();
            let said = ModelFolder::open(folder.path()).unwrap_err().to_string();
            assert!(said.contains(reason), "{name}: said {said:?}, not {reason:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.gguf");
        assert!(ModelFolder::open(&file).unwrap_err().to_string().contains("no such folder"));
        std::fs::write(&file, "GGUF").unwrap();
        assert!(ModelFolder::open(&file).unwrap_err().to_string().contains("GGUF is not read yet"));
    }

    #[test]
    fn other_number_formats_are_refused_by_tensor_name() {
        let folder = tempfile::tempdir().unwrap();
        let view = TensorView::new(Dtype::F64, vec![1], &[0; 8]).unwrap();
        safetensors::serialize_to_file([("norm.weight", view)], None, &folder.path().join(SINGLE)).unwrap();
        let model = ModelFolder::open(folder.path()).unwrap();
        let said = model.tensor("norm.weight").unwrap_err().to_string();
        assert!(said.contains("\"norm.weight\" is stored as F64"), "{said}");
    }

    #[test]
    fn the_fingerprint_sees_every_byte_of_weights_and_config() {
        let (folder, model) = sharded(r#"{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}"#);
        let first = model.unwrap().fingerprint().unwrap();
        let again = || ModelFolder::open(folder.path()).unwrap().fingerprint().unwrap();
        assert_eq!(first, again());
        let path = folder.path().join("two.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let second = again();
        assert_ne!(first, second);
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_ne!(second, again());
    }
}
