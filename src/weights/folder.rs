//! The weights of one model, seen as named tensors: a folder of safetensors (one file, or several with an index), or
//! one GGUF file, whose tensors go by the names that they had in the folder it was converted from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::dtype::DType;
use super::gguf::{self, GgufFile, names::Change};
use super::mapped::{MappedBytes, MappedTensor, StoredMatrix};
use super::quantised;
use super::safetensors::{SafetensorsFile, Stored};
use super::stored::StoredTensor;
use super::unique::UniqueMap;
use crate::keys::object_file;
use crate::{Error, Result, outside, sha256};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
/// Where transformers looks for the template of chats with tools.
pub const TOOL_USE_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// The weights of one model, mapped; nothing is read before it is used.
#[derive(Debug)]
pub struct ModelFolder {
    path: PathBuf,
    /// The files that all depends on: first those that say how the weights are to be read.
    files: Vec<PathBuf>,
    /// How many of them come before the weights.
    described: usize,
    tensors: BTreeMap<String, Held>,
}

/// A tensor of a model.
#[derive(Debug)]
pub(super) enum Held {
    /// Plain numbers.
    Plain(MappedTensor),
    /// Numbers that have to be decoded.
    Quantised(StoredTensor),
    /// What is in the file and is no weight by itself.
    Unread(Unread),
}

/// A tensor in a format that weights are not read from.
#[derive(Debug)]
pub(super) struct Unread {
    /// The format's name in the file.
    pub format: &'static str,
    pub shape: Vec<usize>,
    pub bytes: MappedBytes,
    /// Where it lies.
    pub file: PathBuf,
}

/// What a tensor is, without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What its format is called.
    pub format: String,
    /// Bytes that it takes in its files.
    pub bytes: usize,
}

/// A tensor as a safetensors file has it.
#[derive(Debug, Clone, Copy)]
pub struct Raw<'a> {
    /// Its number format.
    pub stored: Stored,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its numbers, row-major, little-endian.
    pub bytes: &'a [u8],
}

/// Whether a path is that of a GGUF file, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) && !path.is_dir()
}

/// `config.json` of a model's folder, or what stands for it in a GGUF file; and the file that it comes from.
///
/// # Errors
/// [`Error::Input`] where there is none, or it is none.
pub fn config_object(path: &Path) -> Result<(PathBuf, Map<String, Value>)> {
    if is_gguf(path) {
        return Ok((path.to_path_buf(), gguf::config::config(&GgufFile::open(path)?)?));
    }
    let file = path.join(CONFIG);
    let object = object_file(&file)?;
    Ok((file, object))
}

impl ModelFolder {
    /// Opens a model's folder or GGUF file and checks its files against each other.
    ///
    /// # Errors
    /// [`Error::Input`] where files are missing, broken or contradict each other, or where the weights are of a kind
    /// that is not read: pickle, or quantised in another way.
    pub fn open(path: &Path) -> Result<Self> {
        if is_gguf(path) && path.exists() {
            let files = vec![path.to_path_buf()];
            return Ok(Self { path: path.to_path_buf(), files, described: 0, tensors: open_gguf(path)? });
        }
        if !path.is_dir() {
            return Err(not_a_folder(path));
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        // Where a folder holds both, transformers reads the single file.
        let files = if single.exists() {
            vec![SafetensorsFile::open(&single)?]
        } else if index.exists() {
            open_shards(path, &index)?
        } else {
            return Err(no_safetensors(path));
        };
        let mut tensors = files.iter().flat_map(held).collect();
        let config = Some(path.join(CONFIG)).filter(|config| config.exists());
        let beside = match &config {
            Some(config) => quantised::gather(path, &object_file(config)?, &mut tensors)?,
            None => None,
        };
        let weights = files.iter().map(|file| file.path().to_path_buf());
        let mut files: Vec<PathBuf> = config.into_iter().chain(beside).collect();
        let described = files.len();
        files.extend(weights);
        Ok(Self { path: path.to_path_buf(), files, described, tensors })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that make the model: its config, where that is a file of its own, what else says how its weights are
    /// to be read, and these.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    /// Those of the files that are mapped: what becomes of the others once they were read is nothing to the model.
    pub fn weights(&self) -> impl Iterator<Item = &Path> {
        self.files[self.described..].iter().map(PathBuf::as_path)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What a tensor is, without reading it; `None` where there is no such tensor.
    pub fn info(&self, name: &str) -> Option<Info> {
        Some(match self.tensors.get(name)? {
            Held::Plain(tensor) => {
                Info { shape: tensor.shape.clone(), format: tensor.dtype.to_string(), bytes: tensor.bytes().len() }
            }
            Held::Quantised(tensor) => {
                Info { shape: tensor.shape.clone(), format: tensor.format.clone(), bytes: tensor.stored_bytes() }
            }
            Held::Unread(Unread { format, shape, bytes, .. }) => {
                Info { shape: shape.clone(), format: format.to_lowercase(), bytes: bytes.len() }
            }
        })
    }

    /// A tensor, in whatever format.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor or where its format is not read.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor> {
        match self.tensors.get(name) {
            Some(Held::Plain(tensor)) => Ok(tensor.clone().into()),
            Some(Held::Quantised(tensor)) => Ok(tensor.clone()),
            Some(Held::Unread(Unread { format, file, .. })) => Err(Error::input(format!(
                "{}: tensor {name:?} is stored as {format}, which is not read; F32, F16, BF16 and, in GGUF, Q4_0, Q4_1, \
                 Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are. Use another file of this model",
                file.display()
            ))),
            None => Err(Error::input(format!(
                "{}: there is no tensor {name:?}, which the config calls for; fetch the model's files again, all of one \
                 model",
                self.path.display()
            ))),
        }
    }

    /// A tensor of plain numbers; `None` where there is none of this name, or it is quantised.
    pub fn plain(&self, name: &str) -> Option<&MappedTensor> {
        match self.tensors.get(name) {
            Some(Held::Plain(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// A tensor as it lies, be it a weight or not; `None` where there is none of this name, or it is quantised.
    pub fn raw(&self, name: &str) -> Option<Raw<'_>> {
        Some(match self.tensors.get(name)? {
            Held::Plain(tensor) => Raw { stored: tensor.dtype.into(), shape: &tensor.shape, bytes: &tensor.bytes },
            // ggml's blocks are no format of safetensors
            Held::Unread(Unread { format, shape, bytes, .. }) => Raw { stored: Stored::parse(format)?.0, shape, bytes },
            Held::Quantised(_) => return None,
        })
    }

    /// The quantised formats in it, sorted; none where all numbers are plain.
    pub fn quantised(&self) -> Vec<&str> {
        let formats = self.tensors.values().filter_map(|held| match held {
            Held::Quantised(tensor) => Some(tensor.format.as_str()).filter(|name| DType::named(name).is_none()),
            Held::Plain(_) | Held::Unread(..) => None,
        });
        formats.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.names().filter_map(|name| self.info(name)).map(|info| info.bytes as u64).sum()
    }

    /// SHA-256 over `config.json` and the weight files: what a cached result depends on.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        for path in &self.files {
            let length = sha256::add(&mut hash, path).map_err(|e| Error::reading(path, e))?;
            // The length keeps bytes from moving over the border of two files unseen.
            hash.update(length.to_le_bytes());
        }
        Ok(hash.finalize().into())
    }
}

/// The tensors of a safetensors file.
fn held(file: &SafetensorsFile) -> impl Iterator<Item = (String, Held)> {
    file.entries().iter().map(|(name, entry)| {
        let held = match entry.dtype {
            Stored::Float(dtype) => Held::Plain(MappedTensor {
                bytes: MappedBytes::new(Arc::clone(file.map()), entry.range.clone()),
                dtype,
                shape: entry.shape.clone(),
            }),
            Stored::Other(format) => {
                let bytes = MappedBytes::new(Arc::clone(file.map()), entry.range.clone());
                Held::Unread(Unread { format, shape: entry.shape.clone(), bytes, file: file.path().to_path_buf() })
            }
        };
        (name.clone(), held)
    })
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// Opens the shards that the index names and holds each against the index, both ways.
fn open_shards(folder: &Path, index_path: &Path) -> Result<Vec<SafetensorsFile>> {
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
    if let Some((name, number)) = place.iter().find(|(name, _)| !index.contains_key(*name)) {
        return Err(bad(format!("tensor {name:?} of {:?} is not in the index", shards[*number])));
    }
    Ok(files)
}

/// The tensors of a GGUF file under the folder's names.
fn open_gguf(path: &Path) -> Result<BTreeMap<String, Held>> {
    let file = GgufFile::open(path)?;
    let architecture = gguf::config::architecture(&file)?;
    let head_dim = gguf::config::head_dim(&file)?;
    let bad = |name: &str, reason: &str| Error::input(format!("{}: tensor {name:?} {reason}", path.display()));
    let mut tensors = BTreeMap::new();
    for (name, tensor) in file.tensors() {
        let known = gguf::config::folder_name(file.metadata(), &architecture, name)?;
        let Some((folder_name, change)) = known else { continue };
        let rows = tensor.shape[..tensor.shape.len() - 1].iter().product::<usize>();
        let held = match change {
            Change::None => gguf::matrix::held(&file, tensor, None),
            Change::OneAdded => gguf::less_one::held(&file, tensor).ok_or_else(|| {
                bad(name, &format!("is a norm in {}, which is not read; use another file", tensor.kind))
            })?,
            Change::HeadRows
                if head_dim < 2
                    || !head_dim.is_multiple_of(2)
                    || !rows.is_multiple_of(head_dim)
                    || tensor.shape.len() != 2 =>
            {
                return Err(bad(name, &format!("of shape {:?} is not made of heads of {head_dim}", tensor.shape)));
            }
            Change::HeadRows => gguf::matrix::held(&file, tensor, Some(head_dim)),
        };
        tensors.insert(folder_name, held);
    }
    Ok(tensors)
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

fn not_a_folder(path: &Path) -> Error {
    let shown = path.display();
    if !path.exists() {
        return Error::input(format!("{shown}: there is no such folder"));
    }
    Error::input(format!(
        "{shown}: a model is a folder with config.json and model.safetensors, or a .gguf file; this is another file"
    ))
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
        format!("{shown}: a GGUF file is named itself: {}", folder.join(name).display())
    } else if let Some(name) = ending(&[".safetensors"]) {
        format!("{shown}: there is {name}, but neither {SINGLE} nor {INDEX}; download the missing file")
    } else {
        format!("{shown}: there are no weights here, neither {SINGLE} nor {INDEX}")
    })
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
