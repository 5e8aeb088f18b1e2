//! JSON text as Python's `json.dumps` writes it, for the `tojson` filter of chat templates.

use serde_json::Value;

/// The options of `json.dumps` that transformers' `tojson` passes on.
#[derive(Debug, Clone)]
pub(super) struct Style {
    /// Write characters outside ASCII as `\uXXXX`.
    pub ensure_ascii: bool,
    /// Start a new line for every item, indented by this text for every level.
    pub indent: Option<String>,
    /// Between items, and between a key and its value.
    pub separators: (String, String),
    /// Write the keys of an object in order.
    pub sort_keys: bool,
}

impl Style {
    /// `json.dumps`'s separators: the one between items loses its space where every item has its line.
    pub fn default_separators(indented: bool) -> (String, String) {
        (if indented { "," } else { ", " }.to_owned(), ": ".to_owned())
    }
}

/// `value` as Python writes it.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write(&mut out, value, style, 1);
    out
}

fn write(out: &mut String, value: &Value, style: &Style, level: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(truth) => out.push_str(if *truth { "true" } else { "false" }),
        Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            Some(float) => out.push_str(&python_float(float)),
            None => out.push_str(&number.to_string()),
        },
        Value::String(text) => write_text(out, text, style.ensure_ascii),
        Value::Array(items) => write_items(out, ('[', ']'), items.iter().map(|item| (None, item)), style, level),
        Value::Object(object) => {
            let mut items: Vec<_> = object.iter().map(|(key, item)| (Some(key.as_str()), item)).collect();
            if style.sort_keys {
                items.sort_by_key(|(key, _)| *key);
            }
            write_items(out, ('{', '}'), items.into_iter(), style, level);
        }
    }
}

fn write_items<'a>(
    out: &mut String,
    (open, close): (char, char),
    items: impl ExactSizeIterator<Item = (Option<&'a str>, &'a Value)>,
    style: &Style,
    level: usize,
) {
    let line = |out: &mut String, level: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..level).for_each(|_| out.push_str(indent));
        }
    };
    let empty = items.len() == 0;
    out.push(open);
    for (index, (key, item)) in items.enumerate() {
        if index > 0 {
            out.push_str(&style.separators.0);
        }
        line(out, level);
        if let Some(key) = key {
            write_text(out, key, style.ensure_ascii);
            out.push_str(&style.separators.1);
        }
        write(out, item, style, level + 1);
    }
    if !empty {
        line(out, level - 1);
    }
    out.push(close);
}

fn write_text(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// The shortest digits that give `float` back, as both languages choose them; Python turns to an exponent, signed and
/// of two digits or more, below 1e-4 and from 1e16 on, and writes a whole number with `.0`.
fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if float != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ if float.fract() == 0.0 => format!("{float}.0"),
        _ => float.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected texts: Python 3's json.dumps.
    #[test]
    fn as_python_writes_it() {
        let value = serde_json::json!({"b": [1, 2.0, 1e16, 1e-5, -3e300, 123456789012345.6, 0.0001, -0.0, 1.25e-7, true, null], "a": "é<\"\\\n\u{1}\u{7f}😀", "e": [], "o": {}});
        let style = |indent: Option<&str>, ensure_ascii, sort_keys| Style {
            ensure_ascii,
            indent: indent.map(str::to_owned),
            separators: Style::default_separators(indent.is_some()),
            sort_keys,
        };
        assert_eq!(
            dumps(&value, &style(None, false, false)),
            "{\"b\": [1, 2.0, 1e+16, 1e-05, -3e+300, 123456789012345.6, 0.0001, -0.0, 1.25e-07, true, null], \"a\": \"é<\\\"\\\\\\n\\u0001\u{7f}😀\", \"e\": [], \"o\": {}}"
        );
        assert_eq!(
            dumps(&serde_json::json!({"b": "é😀\u{7f}", "a": 1}), &style(None, true, true)),
            r#"{"a": 1, "b": "\u00e9\ud83d\ude00\u007f"}"#
        );
        assert_eq!(
            dumps(&serde_json::json!({"a": [1, {"b": 2}], "e": []}), &style(Some("  "), false, false)),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"e\": []\n}"
        );
    }
}
