//! Whether one value is what its key may hold: type, range, name.

use toml::Value;

use super::budget::Budget;
use super::nearest::nearest;
use super::schema::{Key, Kind};

/// The value as its key wants it (`beta = 1` becomes `1.0`), or what is wrong with it.
pub(super) fn checked(key: &Key, value: Value) -> Result<Value, String> {
    let fits = match (&key.kind, &value) {
        (Kind::Whole { least, most }, Value::Integer(number)) => (*least..=*most).contains(number),
        (Kind::Number(range), Value::Integer(_) | Value::Float(_)) => as_float(&value).is_some_and(range.holds),
        (Kind::Pair(range), Value::Array(items)) => {
            items.len() == 2 && items.iter().all(|item| as_float(item).is_some_and(range.holds))
        }
        (Kind::Flag, Value::Boolean(_)) => true,
        (Kind::Choice(names), Value::String(name)) => names.contains(&name.as_str()),
        (Kind::Device, Value::String(name)) => is_device(name),
        (Kind::Budget, Value::String(size)) => size.parse::<Budget>().is_ok(),
        (Kind::Text | Kind::Base | Kind::Template | Kind::Output, Value::String(text)) => !text.is_empty(),
        (Kind::File | Kind::Folder, Value::String(_)) => true,
        (Kind::Texts | Kind::Rows { at_least_one: false }, Value::Array(items)) => items.iter().all(is_filled),
        (Kind::Rows { at_least_one: true }, Value::Array(items)) => !items.is_empty() && items.iter().all(is_filled),
        (Kind::Modules, Value::Array(items)) => !items.is_empty() && items.iter().all(is_filled),
        (Kind::Modules, Value::String(pattern)) => !pattern.is_empty(),
        _ => false,
    };
    if !fits {
        let expected = key.kind.expected();
        return Err(format!("`{}` is {}; expected {expected}{}", key.path(), found(&value), remedy(key, &value)));
    }
    match (&key.kind, &value) {
        (Kind::Modules, Value::String(pattern)) => match fancy_regex::Regex::new(pattern) {
            Ok(_) => Ok(value),
            Err(error) => Err(format!("`{}`: the regex \"{pattern}\" cannot be used: {error}", key.path())),
        },
        (Kind::Number(_), Value::Integer(number)) => Ok(Value::Float(*number as f64)),
        (Kind::Pair(_), Value::Array(items)) => {
            Ok(Value::Array(items.iter().filter_map(as_float).map(Value::Float).collect()))
        }
        _ => Ok(value),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|number| number as f64))
}

fn is_filled(value: &Value) -> bool {
    value.as_str().is_some_and(|text| !text.is_empty())
}

fn is_device(name: &str) -> bool {
    let is_index = |index: &str| index.bytes().all(|byte| byte.is_ascii_digit()) && index.parse::<u16>().is_ok();
    matches!(name, "auto" | "cpu" | "metal") || name.strip_prefix("cuda:").is_some_and(is_index)
}

/// A value in an error's words, cut where it is long.
fn found(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "an empty string".into(),
        Value::String(text) => format!("the string \"{}\"", short(text)),
        Value::Integer(_) | Value::Float(_) => format!("the number {value}"),
        Value::Boolean(flag) => flag.to_string(),
        Value::Datetime(date) => format!("the date {date}"),
        Value::Array(items) if items.is_empty() => "an empty list".into(),
        Value::Array(_) => format!("the list {}", short(&value.to_string())),
        Value::Table(_) => "a table".into(),
    }
}

fn short(text: &str) -> String {
    const LONGEST: usize = 60;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// What to write instead, where that can be told.
fn remedy(key: &Key, value: &Value) -> String {
    let Value::String(text) = value else { return String::new() };
    match &key.kind {
        Kind::Choice(names) => {
            nearest(text, names.iter().copied()).map_or(String::new(), |name| format!("; did you mean `{name}`?"))
        }
        Kind::Device => nearest(text, ["auto", "cpu", "cuda:0", "metal"])
            .map_or(String::new(), |name| format!("; did you mean `{name}`?")),
        Kind::Whole { .. } | Kind::Number(_) | Kind::Flag if text.parse::<f64>().is_ok() || is_flag(text) => {
            "; write it without quotes".into()
        }
        // A shell takes the quotes out of an unprotected `["a", "b"]`.
        Kind::Texts | Kind::Rows { .. } if text.starts_with('[') => {
            format!("; protect the list from the shell: --set '{}=[\"…\"]'", key.path())
        }
        Kind::Texts | Kind::Rows { .. } if !text.is_empty() => format!("; write [\"{}\"]", short(text)),
        _ => String::new(),
    }
}

fn is_flag(text: &str) -> bool {
    matches!(text, "true" | "false")
}

#[cfg(test)]
mod tests {
    use super::super::schema::find;
    use super::*;

    fn check(path: &str, value: &str) -> Result<Value, String> {
        let (section, name) = path.split_once('.').unwrap();
        checked(find(section, name).unwrap(), value.parse().unwrap())
    }

    #[test]
    fn a_whole_number_serves_where_a_number_is_expected_and_not_the_other_way() {
        assert_eq!(check("objective.beta", "1"), Ok(Value::Float(1.0)));
        assert_eq!(check("train.adam_betas", "[0, 0.5]"), Ok("[0.0, 0.5]".parse().unwrap()));
        assert_eq!(
            check("train.batch_size", "16.0").unwrap_err(),
            "`train.batch_size` is the number 16.0; expected a whole number, at least 1"
        );
    }

    #[test]
    fn ranges_hold_at_their_ends() {
        for (path, good, bad) in [
            ("adapter.r", "1", "0"),
            ("adapter.lora_dropout", "0.0", "1.0"),
            ("data.eval_fraction", "0.999", "1"),
            ("data.max_length", "2", "1"),
            ("objective.beta", "1e-9", "0.0"),
            ("objective.label_smoothing", "0.499", "0.5"),
            ("train.learning_rate", "0.0", "-1e-9"),
            ("train.learning_rate", "1.0", "inf"),
            ("train.max_grad_norm", "0.0", "nan"),
            ("train.adam_betas", "[0.0, 0.999]", "[0.9, 1.0]"),
            ("train.adam_betas", "[0.9, 0.95]", "[0.9]"),
            ("samples.count", "1", "0"),
            ("run.threads", "0", "-1"),
            ("run.device", r#""cuda:7""#, r#""cuda:""#),
            ("memory.budget", r#""6GiB""#, r#""6""#),
            ("memory.budget", r#""auto""#, "6"),
            ("run.device", r#""metal""#, r#""cuda:+1""#),
        ] {
            assert!(check(path, good).is_ok(), "{path} = {good}");
            assert!(check(path, bad).is_err(), "{path} = {bad}");
        }
    }

    #[test]
    fn an_error_says_what_to_write() {
        for (path, value, end) in [
            ("train.batch_size", r#""16""#, "at least 1; write it without quotes"),
            ("data.train", r#""a.jsonl""#, r#"; write ["a.jsonl"]"#),
            ("data.train", r#""[a.jsonl]""#, r#"; protect the list from the shell: --set 'data.train=["…"]'"#),
            ("objective.loss", r#""sigmod""#, "`ipo_sum`; did you mean `sigmoid`?"),
            ("run.device", r#""cuda""#, "; did you mean `cuda:0`?"),
            ("data.train", "[]", "is an empty list; expected a list of files, at least one"),
        ] {
            let message = check(path, value).unwrap_err();
            assert!(message.ends_with(end), "{message}");
        }
    }

    #[test]
    fn target_modules_may_be_a_name_a_regex_or_a_list() {
        for good in [r#""all-linear""#, r#"'.*\.(q|v)_proj'"#, r#"["q_proj", "v_proj"]"#] {
            assert!(check("adapter.target_modules", good).is_ok());
        }
        assert!(check("adapter.target_modules", "'.*(q_proj'").unwrap_err().contains("cannot be used"));
        assert!(check("adapter.target_modules", "[]").is_err());
        assert!(check("adapter.target_modules", "3").is_err());
    }
}
