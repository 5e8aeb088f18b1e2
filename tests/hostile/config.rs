//! `config.json`.

use crate::openers::Kind;
use crate::{Case, case, with};

/// The bench's own with one key set to this JSON, or without it.
fn set(key: &str, json: &str) -> Vec<u8> {
    with(&Kind::Config.seeds()[0], key, json)
}

fn rope(json: &str) -> Vec<u8> {
    let plain = with(&Kind::Config.seeds()[0], "rope_parameters", "");
    with(&plain, "rope_scaling", json)
}

pub fn texts() -> Vec<Case> {
    let deep = |open: &str| format!("{{\"model_type\": {}", open.repeat(200_000));
    let mut cases = vec![
        case("nothing", "", &["config.json: not a JSON object: EOF", "fetch the file again"]),
        case("blanks", "   \n", &["not a JSON object"]),
        case("cut short", "{\"model_type\": ", &["not a JSON object", "line 1 column 15"]),
        case("a list", "[]", &["not a JSON object"]),
        case("a text", "\"llama\"", &["not a JSON object"]),
        case("null", "null", &["not a JSON object"]),
        case("a number", "3", &["not a JSON object"]),
        case("a web page", "<html>", &["not a JSON object"]),
        case("two objects", "{}{}", &["not a JSON object: trailing characters"]),
        case("JSON with a comment", "{} // ours", &["trailing characters"]),
        case("a comma too many", "{\"a\": 1,}", &["trailing comma"]),
        case("NaN", "{\"rms_norm_eps\": NaN}", &["not a JSON object"]),
        case("Infinity", "{\"rms_norm_eps\": Infinity}", &["not a JSON object"]),
        case("a number past f64", "{\"rms_norm_eps\": 1e999}", &["number out of range"]),
        case("a zero in front", "{\"hidden_size\": 064}", &["not a JSON object: invalid number"]),
        case("a byte order mark", "\u{feff}{}", &["not a JSON object"]),
        case("UTF-16", b"\xff\xfe{\0}\0".to_vec(), &["not a JSON object"]),
        case("no UTF-8", b"{\"model_type\": \"\xff\"}".to_vec(), &["not a JSON object: invalid unicode"]),
        case("zeros", vec![0; 4096], &["not a JSON object"]),
        case("half a surrogate pair", "{\"model_type\": \"\\ud800\"}", &["not a JSON object"]),
        case("a control character", "{\"model_type\": \"\u{1b}[2J\"}", &["control character"]),
        case("depth of lists", deep("["), &["recursion limit"]),
        case("depth of objects", deep("{\"a\":"), &["recursion limit"]),
        case("300,001 values", format!("{{\"x\": [{}0]}}", "0,".repeat(300_000)), &["values, and 300000 at most"]),
        case(
            "30 million values",
            format!("{{\"x\": [{}0]}}", "0,".repeat(30_000_000)),
            &["values, and 300000 at most"],
        ),
        case("a text of 65 MiB", vec![b' '; 65 << 20], &["68157440 bytes, and no such file has more than"]),
        case(
            "a terminal's command as a type",
            set("model_type", "\"\\u001b[2J\""),
            &["model_type: \"\\u{1b}[2J\" is not read"],
        ),
        case("text that runs backwards", set("model_type", "\"\\u202ellama\""), &["model_type: \"\\u{202e}llama\""]),
        case(
            "a type of a megabyte",
            set("model_type", &format!("\"{}\"", "m".repeat(1 << 20))),
            &["characters left out"],
        ),
        case("a pickle", b"\x80\x04\x95\0\0\0\0.".to_vec(), &["not a JSON object"]),
    ];
    for (what, json) in [("a bool", "true"), ("an object", "{}"), ("a list", "[\"llama\"]"), ("a number", "1")] {
        cases.push(case(what, set("model_type", json), &["config.json: model_type: ", "is not a text"]));
    }
    cases
}

pub fn values() -> Vec<Case> {
    const SIZES: [&str; 6] = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ];
    let mut cases: Vec<Case> = Vec::new();
    for key in SIZES {
        for (what, json) in [
            ("a size of 0", "0"),
            ("a size below 0", "-1"),
            ("a size past any", "16777217"),
            ("a size past 2^64", "18446744073709551616"),
            ("a size in fractions", "2.5"),
            ("a size as a text", "\"64\""),
            ("a list for a size", "[64]"),
        ] {
            cases.push(case(what, set(key, json), &["is not a whole number from 1 to 16777216"]));
        }
        cases.push(case("no size", set(key, ""), &["it is missing"]));
    }
    cases.extend([
        case("no type", set("model_type", ""), &["model_type: it is missing"]),
        case("an unknown type", set("model_type", "\"no-such-model\""), &["model_type: \"no-such-model\" is not read"]),
        case("an unknown activation", set("hidden_act", "\"exec\""), &["hidden_act: \"exec\" is not read"]),
        case("heads that do not divide", set("num_key_value_heads", "3"), &["num_key_value_heads: 3 does not divide"]),
        case(
            "more key heads than heads",
            set("num_key_value_heads", "64"),
            &["num_key_value_heads: 64 does not divide"],
        ),
        case("an odd head", set("head_dim", "7"), &["head_dim: 7 is odd"]),
        case("a norm of 0", set("rms_norm_eps", "0"), &["rms_norm_eps: 0 is not a positive number"]),
        case("a norm below 0", set("rms_norm_eps", "-1e-5"), &["rms_norm_eps: "]),
        case("a norm past f32", set("rms_norm_eps", "1e300"), &["rms_norm_eps: 1e+300 is not a positive number"]),
        case("a flag as a text", set("tie_word_embeddings", "\"yes\""), &["tie_word_embeddings: \"yes\" is not true"]),
        case("a token below 0", set("bos_token_id", "-1"), &["bos_token_id: -1 is not a token id"]),
        case("a token past 32 bits", set("bos_token_id", "4294967296"), &["bos_token_id"]),
        case("tokens in lists", set("bos_token_id", "[[1]]"), &["bos_token_id"]),
        case(
            "quantised by an unknown method",
            set("quantization_config", "{\"quant_method\": \"evil\"}"),
            &["config.json: ", "evil"],
        ),
        case("a rope that is a list", rope("[1]"), &["rope_scaling: [1] is not an object"]),
        case("a rope that is a text", rope("\"linear\""), &["rope_scaling: \"linear\" is not an object"]),
        case(
            "an unknown rope",
            rope("{\"rope_type\": \"spiral\"}"),
            &["rope_scaling.rope_type: \"spiral\" is not read"],
        ),
        case("a rope type that is a number", rope("{\"rope_type\": 3}"), &["rope_scaling.rope_type: 3 is not a text"]),
        case("a rope without its factor", rope("{\"rope_type\": \"linear\"}"), &["rope_scaling.factor: it is missing"]),
        case("a factor of 0", rope("{\"rope_type\": \"linear\", \"factor\": 0}"), &["rope_scaling.factor: 0 is not"]),
        case("a factor below 1", rope("{\"rope_type\": \"dynamic\", \"factor\": 0.5}"), &["factor: 0.5 is below 1"]),
        case("a factor as a text", rope("{\"rope_type\": \"yarn\", \"factor\": \"4\"}"), &["factor: \"4\" is not"]),
        case(
            "a theta of 1",
            rope("{\"rope_type\": \"linear\", \"factor\": 2, \"rope_theta\": 1}"),
            &["rope_theta: 1 is not above 1"],
        ),
        case(
            "a theta below 0",
            rope("{\"rope_type\": \"linear\", \"factor\": 2, \"rope_theta\": -9}"),
            &["rope_theta: -9"],
        ),
        case(
            "a length of 0",
            rope("{\"rope_type\": \"yarn\", \"factor\": 2, \"original_max_position_embeddings\": 0}"),
            &["original_max_position_embeddings: 0 is not"],
        ),
        case(
            "frequencies that cross",
            rope("{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4}"),
            &["high_freq_factor: it is not above low_freq_factor, 4"],
        ),
    ]);
    cases
}
