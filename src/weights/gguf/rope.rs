//! A GGUF file's rotary positions as `rope_parameters` of `config.json`.

use serde_json::{Map, Value, json};

use super::blocks::GgmlType;
use super::config::{Reader, Sizes};
use super::names::{ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use crate::weights::dtype::DType;
use crate::{Error, Result};

/// The base of a Gemma 3's windows where the file does not state it.
const GEMMA3_LOCAL_BASE: f64 = 10_000.0;
/// The base where none is stated.
const BASE: f64 = 10_000.0;

/// `rope_parameters`, and what stands beside them.
pub(super) fn config(reader: &Reader, sizes: Sizes) -> Result<Map<String, Value>> {
    check_turning(reader, sizes)?;
    let base = reader.positive("rope.freq_base")?;
    if base.is_none() && reader.row.name == "gemma3" {
        return Err(reader.metadata.missing(&reader.key("rope.freq_base")));
    }
    let base = base.unwrap_or(BASE);
    if base <= 1.0 {
        return Err(reader.bad("rope.freq_base", &format!("{base} is not above 1; fetch another file")));
    }
    let mut rope = Map::from_iter([("rope_theta".to_string(), json!(base))]);
    rope.extend(if reader.row.name == "phi3" { long(reader, sizes)? } else { scaling(reader)? });
    if reader.has(ROPE_FREQS) {
        if rope["rope_type"] != "default" {
            return Err(reader.bad(
                "rope.scaling.type",
                "it stands beside rope_freqs.weight, which scales too; use the model's folder",
            ));
        }
        rope.extend(llama3(reader, base, sizes)?);
    }
    let local = reader.positive("rope.freq_base_swa")?;
    Ok(match reader.row.name {
        "gemma2" if local.is_some_and(|local| local != base) => {
            let reason = "windows with a base of their own are not read of Gemma 2; use the model's folder";
            return Err(reader.bad("rope.freq_base_swa", reason));
        }
        "gemma3" => {
            let local = json!({"rope_type": "default", "rope_theta": local.unwrap_or(GEMMA3_LOCAL_BASE)});
            Map::from_iter([(
                "rope_parameters".to_string(),
                json!({"full_attention": rope, "sliding_attention": local}),
            )])
        }
        _ => {
            let original = rope.get("original_max_position_embeddings").cloned();
            let beside = original.filter(|_| reader.row.name == "phi3");
            let beside = beside.map(|original| ("original_max_position_embeddings".to_string(), original));
            Map::from_iter([("rope_parameters".to_string(), Value::Object(rope))].into_iter().chain(beside))
        }
    })
}

/// Whole heads turn, but for Phi-3's.
fn check_turning(reader: &Reader, sizes: Sizes) -> Result<()> {
    for part in ["rope.dimension_count", "rope.dimension_count_swa"] {
        let Some(count) = reader.size(part)?.filter(|count| *count != sizes.head_dim) else { continue };
        if reader.row.name != "phi3" || part != "rope.dimension_count" || count == 0 || count > sizes.head_dim {
            let reason = format!("{count} of a head's {}: heads that rotate in part are not read here", sizes.head_dim);
            return Err(reader.bad(part, &format!("{reason}; use the model's folder")));
        }
    }
    if reader.metadata.flag(&reader.key("rope.scaling.finetuned"))? == Some(false) && reader.row.name == "granite" {
        return Err(reader.bad("rope.scaling.finetuned", "heads that do not turn are not read; use the model's folder"));
    }
    Ok(())
}

/// The first of these factors that is stated and scales.
fn stated<'a>(reader: &Reader, parts: &[&'a str]) -> Result<Option<&'a str>> {
    for part in parts {
        if reader.positive(part)?.is_some_and(|factor| factor != 1.0) {
            return Ok(Some(part));
        }
    }
    Ok(None)
}

/// The scaling's name in the file; `None` where it says that there is none.
fn kind<'a>(reader: &'a Reader, read: &[&str]) -> Result<Option<&'a str>> {
    let key = reader.key("rope.scaling.type");
    match reader.metadata.text(&key)? {
        // older files state the factor alone
        None if stated(reader, &["rope.scale_linear", "rope.scaling.factor"])?.is_some() => Ok(Some("linear")),
        None | Some("none") => Ok(None),
        Some(kind) if read.contains(&kind) => Ok(Some(kind)),
        Some(other) => Err(reader.metadata.bad(
            &key,
            &format!("{other:?} is not read of {}; {} are. Use the model's folder", reader.row.name, read.join(", ")),
        )),
    }
}

/// Linear scaling and YaRN.
fn scaling(reader: &Reader) -> Result<Map<String, Value>> {
    const LINEAR: [&str; 2] = ["none", "linear"];
    const ALL: [&str; 3] = ["none", "linear", "yarn"];
    let gemma = reader.row.one_added;
    let kind = kind(reader, if gemma { &LINEAR } else { &ALL })?;
    let mut rope = Map::from_iter([("rope_type".to_string(), json!(kind.unwrap_or("default")))]);
    // llama.cpp multiplies the scaling's own factor of cosines with these, transformers takes one in its place
    let mixes = f64::from(u8::from(kind == Some("yarn")));
    for (part, none) in
        [("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", mixes), ("yarn_log_multiplier", 0.0)]
    {
        let part = format!("rope.scaling.{part}");
        if let Some(number) = reader.metadata.number(&reader.key(&part))?.filter(|number| *number != none) {
            return Err(reader.bad(&part, &format!("{number} is not read, only {none} is; use the model's folder")));
        }
    }
    let Some(kind) = kind else { return Ok(rope) };
    let factor = match reader.positive("rope.scaling.factor")? {
        Some(factor) => factor,
        None => {
            let older = reader.positive("rope.scale_linear")?;
            older.ok_or_else(|| reader.metadata.missing(&reader.key("rope.scaling.factor")))?
        }
    };
    if factor < 1.0 {
        return Err(reader.bad("rope.scaling.factor", &format!("{factor} is below 1; use the model's folder")));
    }
    rope.insert("factor".into(), json!(factor));
    if kind == "yarn" {
        if let Some(original) = reader.size("rope.scaling.original_context_length")? {
            rope.insert("original_max_position_embeddings".into(), json!(original));
        }
        for (name, stated) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
            if let Some(number) = reader.positive(&format!("rope.scaling.{stated}"))? {
                rope.insert(name.into(), json!(number));
            }
        }
    }
    Ok(rope)
}

/// Phi-3's: the share of a head that turns, and LongRoPE where its factors are there.
fn long(reader: &Reader, sizes: Sizes) -> Result<Map<String, Value>> {
    const KINDS: [&str; 3] = ["none", "linear", "longrope"];
    let turns = reader.size("rope.dimension_count")?.unwrap_or(sizes.head_dim);
    let mut share = turns as f64 / sizes.head_dim as f64;
    // the count is the product rounded down
    if ((sizes.head_dim as f64 * share) as u64) < turns {
        share = share.next_up();
    }
    let with_share = |mut rope: Map<String, Value>| {
        rope.insert("partial_rotary_factor".into(), json!(share));
        rope
    };
    let kind = kind(reader, &KINDS)?;
    if !reader.has(ROPE_SHORT) && !reader.has(ROPE_LONG) {
        return match kind {
            Some("longrope") => {
                Err(reader.bad("rope.scaling.type", &format!("longrope without {ROPE_SHORT}; use the model's folder")))
            }
            _ => Ok(with_share(scaling(reader)?)),
        };
    }
    let scales_too = match kind {
        Some("linear") => Some("rope.scaling.type"),
        _ => stated(reader, &["rope.scale_linear", "rope.scaling.factor", "rope.scaling.yarn_attn_factor"])?,
    };
    if let Some(part) = scales_too {
        return Err(
            reader.bad(part, &format!("it stands beside {ROPE_SHORT}, which scales too; use the model's folder"))
        );
    }
    let original = reader.needed("rope.scaling.original_context_length")?;
    if original == 1 {
        return Err(reader.bad("rope.scaling.original_context_length", "it is 1; fetch another file"));
    }
    let longer = sizes.context as f64 / original as f64;
    let own = if longer > 1.0 { (1.0 + longer.ln() / (original as f64).ln()).sqrt() } else { 1.0 };
    let mut rope = with_share(Map::from_iter([
        ("rope_type".to_string(), json!("longrope")),
        ("original_max_position_embeddings".to_string(), json!(original)),
        ("short_factor".to_string(), json!(factors(reader, ROPE_SHORT, turns)?)),
        ("long_factor".to_string(), json!(factors(reader, ROPE_LONG, turns)?)),
    ]));
    // the file states in f32 what the config leaves to be computed
    if let Some(stated) = reader.positive("rope.scaling.attn_factor")?.filter(|stated| *stated as f32 != own as f32) {
        rope.insert("attention_factor".into(), json!(stated));
    }
    Ok(rope)
}

/// A tensor with one positive f32 for each pair of coordinates that turn.
fn factors(reader: &Reader, name: &str, turns: u64) -> Result<Vec<f64>> {
    let bad = |reason: &str| {
        let shown = reader.metadata.path().display();
        Error::input(format!("{shown}: tensor {name:?} {reason}; use the model's folder"))
    };
    let tensor = reader.file.tensors().get(name).ok_or_else(|| bad("is missing"))?;
    if tensor.kind != GgmlType::F32 || tensor.shape != [turns as usize / 2] {
        return Err(bad("is not one f32 for each frequency"));
    }
    let mut numbers = vec![0f32; turns as usize / 2];
    DType::F32.decode(&reader.file.map()[tensor.range.clone()], &mut numbers);
    match numbers.iter().all(|number| *number > 0.0 && number.is_finite()) {
        // as the shortest decimals that mean them, as the config had them
        true => Ok(numbers.iter().map(|number| number.to_string().parse().unwrap_or(f64::from(*number))).collect()),
        false => Err(bad("holds what is not above 0")),
    }
}

/// Llama 3.1's scaling, known again by its divisors: the file has these and not what they were computed from.
fn llama3(reader: &Reader, theta: f64, sizes: Sizes) -> Result<Map<String, Value>> {
    // what every Llama 3.1, 3.2 and 3.3 has; the factor is the largest divisor
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    let divisors = factors(reader, ROPE_FREQS, sizes.head_dim)?;
    let refuse = |reason: &str| {
        let shown = reader.metadata.path().display();
        Err(Error::input(format!("{shown}: tensor {ROPE_FREQS:?} {reason}; use the model's folder")))
    };
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    for (i, divisor) in divisors.iter().enumerate() {
        let frequency = theta.powf(-(2.0 * i as f64) / sizes.head_dim as f64);
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        let expected = if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        if (divisor / expected - 1.0).abs() > 1e-4 {
            return refuse("holds another scaling than Llama 3's, which is not known from it");
        }
    }
    if factor == 1.0 || sizes.context as f64 <= ORIGINAL {
        return refuse("scales nothing, or beyond a context that is not longer than 8192");
    }
    let fields = json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u64,
    });
    Ok(fields.as_object().cloned().unwrap_or_default())
}
