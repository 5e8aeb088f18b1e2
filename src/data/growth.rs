//! How much longer a tokenizer's normalizers and decoders can make a text.
//!
//! `tokenizer.json` may hold any number of them, one after the other: sixty that write two letters for one make 2^60
//! of each. Such a file is refused before a text is given to it.

use serde::Deserialize;
use serde_json::Value;

/// A text may become so many times as long, as a power of two. Published tokenizers reach 6 (XLM-RoBERTa).
const MAX_DOUBLINGS: f64 = 10.0;

/// The parts of `tokenizer.json` that rewrite texts.
#[derive(Deserialize)]
struct Rewriting {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
}

/// Holds the parts of a `tokenizer.json` against [`MAX_DOUBLINGS`]; `Err` says which one exceeds it.
pub(super) fn check(tokenizer_json: &[u8]) -> Result<(), String> {
    // What is no JSON is for the library to say.
    let Ok(parts) = serde_json::from_slice::<Rewriting>(tokenizer_json) else { return Ok(()) };
    for (name, part) in
        [("normalizer", parts.normalizer), ("pre_tokenizer", parts.pre_tokenizer), ("decoder", parts.decoder)]
    {
        let doublings = part.as_ref().map_or(0.0, doublings);
        if doublings > MAX_DOUBLINGS {
            let most = 2f64.powf(MAX_DOUBLINGS);
            return Err(format!("its {name} can make a text more than {most} times as long"));
        }
    }
    Ok(())
}

/// How often one part and those within it can double a text.
fn doublings(part: &Value) -> f64 {
    let length = |key: &str| part.get(key).and_then(Value::as_str).map_or(0, str::len) as f64;
    let own = match part.get("type").and_then(Value::as_str) {
        // A regular expression may match at every character and between them.
        Some("Replace") => match part.pointer("/pattern/String").and_then(Value::as_str) {
            Some(pattern) if !pattern.is_empty() => (length("content") / pattern.len() as f64).max(1.0).log2(),
            _ => (1.0 + length("content")).log2(),
        },
        Some("Prepend") => (1.0 + length("prepend")).log2(),
        // A space becomes three bytes.
        Some("Metaspace") => 3f64.log2(),
        // Every byte becomes a letter of one or two.
        Some("ByteLevel") => 1.0,
        Some("Precompiled") => (longest_run(&base64(part)) as f64).max(1.0).log2(),
        // The Unicode forms, done once, are done; the rest takes away.
        _ => 0.0,
    };
    let within: f64 = match part {
        Value::Array(parts) => parts.iter().map(doublings).sum(),
        Value::Object(object) => object.values().filter(|value| !value.is_string()).map(doublings).sum(),
        _ => 0.0,
    };
    own + within
}

/// The bytes of a `precompiled_charsmap`; what is no base64 is left out.
fn base64(part: &Value) -> Vec<u8> {
    let text = part.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for digit in text.bytes().filter_map(digit) {
        bits = bits << 6 | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

/// The longest text of a character map: the map of one character is what stands up to the next zero byte, after a
/// trie whose length in bytes comes first.
fn longest_run(charsmap: &[u8]) -> usize {
    let Some((trie, rest)) = charsmap.split_first_chunk::<4>() else { return 0 };
    let texts = rest.get(u32::from_le_bytes(*trie) as usize..).unwrap_or(rest);
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(normalizer: Value) -> Result<(), String> {
        check(json!({"model": {}, "normalizer": normalizer}).to_string().as_bytes())
    }

    #[test]
    fn the_published_kinds_pass() {
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        said(Value::Null).unwrap();
        said(json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]}))
            .unwrap();
        said(json!({"type": "Sequence", "normalizers": [
            replace("``", "\""), replace("''", "\""), {"type": "NFKD"}, {"type": "StripAccents"},
            {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        ]}))
        .unwrap();
    }

    #[test]
    fn what_grows_without_end_does_not() {
        let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        said(json!({"type": "Sequence", "normalizers": vec![doubling.clone(); 10]})).unwrap();
        for normalizer in [
            json!({"type": "Sequence", "normalizers": vec![doubling; 11]}),
            json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "x".repeat(2000)}),
            json!({"type": "Replace", "pattern": {"String": ""}, "content": "x".repeat(2000)}),
            json!({"type": "Prepend", "prepend": "x".repeat(2000)}),
            json!({"type": "Sequence", "normalizers": vec![json!({"type": "ByteLevel"}); 11]}),
            // A trie of 0 bytes, and one text of 3000.
            json!({"type": "Precompiled", "precompiled_charsmap": format!("AAAAAA{}", "YWFh".repeat(1000))}),
        ] {
            assert!(said(normalizer).unwrap_err().contains("more than 1024 times as long"));
        }
    }
}
