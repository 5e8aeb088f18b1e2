//! Quantised safetensors: what several tensors of a file together say of one matrix.
//!
//! `config.json` names the method; which modules are quantised, the tensors themselves show, so what a checkpoint
//! leaves plain stays plain. `parts` takes tensors apart with their shapes checked, `tiles` is how all of these
//! decode, `lookup` what those of four bits have in common; one file a method follows. Every format gives the numbers
//! that its own program gives.

mod affine;
mod awq;
mod bitsandbytes;
mod compressed;
mod fp8;
mod gptq;
mod lookup;
mod parts;
mod tiles;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::folder::Held;
use crate::keys::{Keys, object_file};
use crate::{Error, Result};
use parts::Parts;

pub use bitsandbytes::{NF4, NF4_BLOCK};

/// What AutoGPTQ wrote, before `config.json` had a section for it; a GPTQ model's where it names no method.
const BESIDE: &str = "quantize_config.json";

/// Puts the quantised matrices of a folder in place of their parts; the file beside `config.json` that says how, where
/// one does.
///
/// # Errors
/// [`Error::Input`] where the method is not read, or a part is missing or does not fit the others.
pub(super) fn gather(
    path: &Path,
    config: &Map<String, Value>,
    tensors: &mut BTreeMap<String, Held>,
) -> Result<Option<PathBuf>> {
    let keys = Keys::of(&path.join("config.json"), config);
    let mut parts = Parts::new(path, tensors);
    if let Some(section) = keys.object("quantization_config")?.or(keys.object("quantization")?) {
        gather_as(path, section.text("quant_method")?, &section, &mut parts)?;
        return Ok(None);
    }
    if parts.modules(".qweight").is_empty() {
        return Ok(None);
    }
    let file = path.join(BESIDE);
    if !file.exists() {
        return Err(unstated(path));
    }
    let object = object_file(&file)?;
    let section = Keys::of(&file, &object);
    gather_as(path, section.text("quant_method")?.or(Some("gptq")), &section, &mut parts)?;
    Ok(Some(file))
}

/// The same by a method and the section that describes it.
fn gather_as(path: &Path, method: Option<&str>, section: &Keys, parts: &mut Parts) -> Result<()> {
    let found = match method {
        Some("bitsandbytes") => bitsandbytes::gather(parts)?,
        Some("gptq") => gptq::gather(section, parts)?,
        Some("awq") => awq::gather(section, parts)?,
        Some("fp8") => {
            let block = block_size(section, "weight_block_size")?;
            // AutoFP8 calls it weight_scale
            let scale = if parts.modules(".weight_scale_inv").is_empty() { "weight_scale" } else { "weight_scale_inv" };
            fp8::gather(parts, scale, block)?
        }
        Some("compressed-tensors") => {
            // rotations of what the layers read, which the weights alone do not tell of
            if section.object("transform_config")?.is_some() {
                return Err(section.bad("transform_config", "it is not read; use the unquantised checkpoint"));
            }
            let block = block_structure(section)?;
            compressed::gather(parts)? + fp8::gather(parts, "weight_scale", block)?
        }
        // MLX's own section names no method
        None if section.raw("bits").is_some() => affine::gather(section, parts)?,
        other => return Err(unread(path, other)),
    };
    match found {
        0 => Err(Error::input(format!(
            "{}: config.json says that the weights are quantised ({}), but no tensor is stored in a form of it that is \
             read; use the unquantised checkpoint of this model",
            path.display(),
            method.unwrap_or("MLX")
        ))),
        _ => Ok(()),
    }
}

/// The size of blocks that compressed-tensors' groups of layers state, where it is one.
fn block_structure(section: &Keys) -> Result<Option<[usize; 2]>> {
    let Some(groups) = section.object("config_groups")? else { return Ok(None) };
    let mut stated = Vec::new();
    for name in groups.names() {
        if let Some(group) = groups.object(name)?
            && let Some(weights) = group.object("weights")?
        {
            stated.extend(block_size(&weights, "block_structure")?);
        }
    }
    stated.dedup();
    Ok(if let [one] = stated[..] { Some(one) } else { None })
}

/// Rows and columns under one scale, as a key states them.
fn block_size(section: &Keys, key: &str) -> Result<Option<[usize; 2]>> {
    let size = |size: u64| (1..=1 << 24).contains(&size).then_some(size as usize);
    section.typed(key, "two sizes", |value| {
        let sizes: Vec<u64> = match value {
            Value::Array(sizes) => sizes.iter().map(Value::as_u64).collect::<Option<_>>()?,
            // as older versions of compressed-tensors wrote it: "128x128"
            Value::String(text) => text.split('x').map(|size| size.parse().ok()).collect::<Option<_>>()?,
            _ => return None,
        };
        let [rows, columns] = sizes[..] else { return None };
        Some([size(rows)?, size(columns)?])
    })
}

/// Weights of GPTQ or AWQ without a word on how they are to be read.
fn unstated(path: &Path) -> Error {
    Error::input(format!(
        "{}: the weights are quantised (GPTQ or AWQ: there are tensors that end in .qweight), but it states no \
         quantization_config; of a GPTQ model fetch {BESIDE} too, of an AWQ model use a folder whose config.json states it",
        path.join("config.json").display()
    ))
}

fn unread(path: &Path, method: Option<&str>) -> Error {
    Error::input(format!(
        "{}: the weights are quantised by the method {:?}, which is not read; bitsandbytes (4 and 8 bit), gptq, awq, fp8, \
         compressed-tensors (pack-quantized, float-quantized) and MLX's affine are. Use the unquantised checkpoint of \
         this model, or a GGUF file of it",
        path.join("config.json").display(),
        method.unwrap_or("unnamed")
    ))
}
