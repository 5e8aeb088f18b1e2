//! `tokenizer.json` and `tokenizer_config.json`.

use serde_json::{Value, json};

use crate::openers::Kind;
use crate::{Case, case, with};

fn set(key: &str, value: Value) -> Vec<u8> {
    with(&Kind::Tokenizer.seeds()[0], key, &value.to_string())
}

/// The bench's own with one key of its model set.
fn model(key: &str, value: Value) -> Vec<u8> {
    let whole: Value = serde_json::from_slice(&Kind::Tokenizer.seeds()[0]).unwrap();
    let mut model = whole["model"].clone();
    match value {
        Value::Null => drop(model.as_object_mut().unwrap().shift_remove(key)),
        value => model[key] = value,
    }
    set("model", model)
}

fn normalizers(one: Value, times: usize) -> Vec<u8> {
    set("normalizer", json!({"type": "Sequence", "normalizers": vec![one; times]}))
}

fn template(single: Value) -> Vec<u8> {
    set("post_processor", json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}))
}

fn added(id: Value, content: Value) -> Vec<u8> {
    let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    set("added_tokens", json!([token]))
}

pub fn files() -> Vec<Case> {
    const BAD: &[&str] = &["tokenizer.json: not a usable tokenizer: ", "fetch the file again"];
    const LONG: &[&str] = &["can make a text more than 1024 times as long"];
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let whole = &Kind::Tokenizer.seeds()[0];
    let depth = |open: &str| format!("{{\"version\": \"1.0\", \"normalizer\": {}", open.repeat(200_000));
    let nested = |n: usize| {
        let start = "{\"type\":\"Sequence\",\"normalizers\":[".repeat(n);
        let text = format!("{start}{{\"type\":\"NFC\"}}{}", "]}".repeat(n));
        String::from_utf8(whole.clone()).unwrap().replacen("\"normalizer\":null", &format!("\"normalizer\":{text}"), 1)
    };
    vec![
        case("nothing", "", BAD),
        case("cut short", &whole[..900], BAD),
        case("another JSON", "{}", BAD),
        case("a list", "[]", BAD),
        case("null", "null", BAD),
        case("no JSON", vec![0x80; 50], BAD),
        case("a model of SentencePiece", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02".to_vec(), BAD),
        case("a pickle", b"\x80\x04\x95\0\0\0\0.".to_vec(), BAD),
        case("another version", set("version", json!("2.0")), BAD),
        case("no model", with(whole, "model", ""), BAD),
        case("a model that is null", set("model", json!(null)), BAD),
        case("a model of an unknown kind", model("type", json!("Evil")), BAD),
        case("a vocabulary that is a list", model("vocab", json!([])), BAD),
        case("an empty vocabulary", model("vocab", json!({})), BAD),
        case("an id below 0", model("vocab", json!({"a": -1})), BAD),
        case("an id past 32 bits", model("vocab", json!({"a": 4294967296u64})), BAD),
        case("an id in fractions", model("vocab", json!({"a": 0.5})), BAD),
        case("merges of unknown tokens", model("merges", json!([["no", "such"]])), BAD),
        case("merges that are no pairs", model("merges", json!(["a"])), BAD),
        case("merges of three", model("merges", json!([["a", "b", "c"]])), BAD),
        case("dropout past 1", model("dropout", json!(2.0)), BAD),
        case("an unknown normalizer", set("normalizer", json!({"type": "Exec"})), BAD),
        case("an unknown pre-tokenizer", set("pre_tokenizer", json!({"type": "Exec"})), BAD),
        case("an unknown decoder", set("decoder", json!({"type": "Exec"})), BAD),
        case("an unknown post-processor", set("post_processor", json!({"type": "Exec"})), BAD),
        case(
            "a post-processor without its token",
            template(json!([{"SpecialToken": {"id": "<no>", "type_id": 0}}])),
            BAD,
        ),
        case("a post-processor of rubbish", template(json!(["$Z:9999999999"])), BAD),
        case("a regex cut short", set("normalizer", replace(json!({"Regex": "("}), "")), BAD),
        case("a regex of any size", set("normalizer", replace(json!({"Regex": "((a{999}){999}){999}"}), "")), BAD),
        case("a regex of any depth", set("normalizer", replace(json!({"Regex": "(".repeat(100_000)}), "")), BAD),
        case("sixty that double a letter", normalizers(replace(json!({"String": "a"}), "aa"), 60), LONG),
        case("sixty that double all", normalizers(replace(json!({"Regex": "."}), "$0$0xx"), 60), LONG),
        case("one that writes much", set("normalizer", replace(json!({"String": "a"}), &"a".repeat(1 << 20))), LONG),
        case("one between all letters", set("normalizer", replace(json!({"String": ""}), &"a".repeat(2000))), LONG),
        case(
            "a prefix of a megabyte",
            set("normalizer", json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)})),
            LONG,
        ),
        case("sixty of letters for bytes", normalizers(json!({"type": "ByteLevel"}), 60), LONG),
        case(
            "pre-tokenizers that grow",
            set(
                "pre_tokenizer",
                json!({"type": "Sequence", "pretokenizers":
            vec![json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false}); 40]}),
            ),
            LONG,
        ),
        case(
            "decoders that grow",
            set(
                "decoder",
                json!({"type": "Sequence", "decoders":
            vec![replace(json!({"String": "a"}), "aa"); 40]}),
            ),
            LONG,
        ),
        case(
            "a character map of rubbish",
            set("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
            BAD,
        ),
        case(
            "a character map that is no base64",
            set("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "\u{202e}"})),
            BAD,
        ),
        case(
            "a character map past its end",
            set("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "////////"})),
            BAD,
        ),
        case("depth of lists", depth("["), BAD),
        case("depth of objects", depth("{\"a\":"), BAD),
        case("normalizers in each other", nested(120), BAD),
        case("an added token that is a number", added(json!(0), json!(3)), BAD),
        case("an added token past 32 bits", added(json!(1u64 << 40), json!("<x>")), BAD),
        case("an added token below 0", added(json!(-1), json!("<x>")), BAD),
        case("a padding of any length", set("padding", json!({"strategy": {"Fixed": 1u64 << 60}})), BAD),
        case("a truncation below 0", set("truncation", json!({"max_length": -1})), BAD),
        case("the end token missing", model("vocab", json!({"a": 0})), &["tokenizer.json: "]),
    ]
}

pub fn configs() -> Vec<Case> {
    let set = |key: &str, json: &str| with(&Kind::TokenizerConfig.seeds()[0], key, json);
    const OBJECT: &[&str] = &["tokenizer_config.json: expected a JSON object: ", "fetch the model's files again"];
    const TEXT: &[&str] = &["`eos_token` must be text or an object with a text `content`"];
    const TEMPLATE: &[&str] = &["`chat_template` must be text or a list of {name, template}"];
    let long = |n: usize| format!("\"{}\"", "x".repeat(n));
    // The bench's folder has a chat_template.jinja, which goes first; a template here is looked at all the same.
    vec![
        case("nothing", "", OBJECT),
        case("a list", "[]", OBJECT),
        case("null", "null", OBJECT),
        case("a text", "\"eos\"", OBJECT),
        case("cut short", "{\"eos_token\": ", OBJECT),
        case("a comma too many", "{\"a\": 1,}", OBJECT),
        case("no UTF-8", b"{\"eos_token\": \"\xff\"}".to_vec(), OBJECT),
        case("UTF-16", b"\xff\xfe{\0}\0".to_vec(), OBJECT),
        case("zeros", vec![0; 4096], OBJECT),
        case("a web page", "<html>", OBJECT),
        case("a pickle", b"\x80\x04\x95\0\0\0\0.".to_vec(), OBJECT),
        case("depth of lists", format!("{{\"x\": {}", "[".repeat(200_000)), OBJECT),
        case("depth of objects", "{\"x\":".repeat(200_000), OBJECT),
        case(
            "30 million values",
            set("x", "0").replace(b"\"x\":0", &format!("\"x\":[{}0]", "0,".repeat(30_000_000))),
            &["values, and 300000 at most"],
        ),
        case(
            "400,000 empty objects",
            set("x", "0").replace(b"\"x\":0", &format!("\"x\":[{}{{}}]", "{},".repeat(400_000))),
            &["values, and 300000"],
        ),
        case("65 MiB", vec![b' '; 65 << 20], &["68157440 bytes, and no such file"]),
        case("half a surrogate pair", "{\"eos_token\": \"\\ud800\"}", OBJECT),
        case("an end token that is a number", set("eos_token", "3"), TEXT),
        case("an end token that is a list", set("eos_token", "[\"</s>\"]"), TEXT),
        case("an end token that is a flag", set("eos_token", "true"), TEXT),
        case("an end token without content", set("eos_token", "{\"lstrip\": false}"), TEXT),
        case(
            "an end token in an object in an object",
            set("eos_token", "{\"content\": {\"content\": \"</s>\"}}"),
            TEXT,
        ),
        case(
            "an end token that is unknown",
            set("eos_token", "\"<no>\""),
            &["the end token \"<no>\"", "not in the vocabulary"],
        ),
        case("an end token that is empty", set("eos_token", "\"\""), &["the end token \"\""]),
        case(
            "an end token that is a command",
            set("eos_token", "\"\\u001b[2J\\u202e\""),
            &["the end token \"\\u{1b}[2J\\u{202e}\""],
        ),
        case("an end token of a megabyte", set("eos_token", &long(1 << 20)), &["characters left out"]),
        case("an unknown token that is a number", set("unk_token", "0"), &["`unk_token` must be text"]),
        case("a padding token that is a list", set("pad_token", "[]"), &["`pad_token` must be text"]),
        case("a first token without content", set("bos_token", "{}"), &["`bos_token` must be text"]),
        case("a mask that is a number", set("mask_token", "1e300"), &["`mask_token` must be text"]),
        case("a template that is a number", set("chat_template", "3"), TEMPLATE),
        case("a template that is an object", set("chat_template", "{}"), TEMPLATE),
        case("templates of numbers", set("chat_template", "[3]"), TEMPLATE),
        case("templates without a text", set("chat_template", "[{\"name\": \"default\"}]"), TEMPLATE),
        case("templates of lists", set("chat_template", "[[[]]]"), TEMPLATE),
        case("two end tokens", set("eos_token", "{\"content\": [\"a\", \"b\"]}"), TEXT),
    ]
}

trait Replace {
    fn replace(self, from: &[u8], to: &str) -> Vec<u8>;
}

impl Replace for Vec<u8> {
    fn replace(self, from: &[u8], to: &str) -> Vec<u8> {
        let at = self.windows(from.len()).position(|window| window == from).unwrap();
        [&self[..at], to.as_bytes(), &self[at + from.len()..]].concat()
    }
}
