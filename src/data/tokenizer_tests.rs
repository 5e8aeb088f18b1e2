//! Tokenizers against the ids that transformers gives (tools/fixtures/tiny_tokenizer.py), and broken folders.

use serde_json::Value;

use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");

fn expected() -> Value {
    serde_json::from_str(include_str!("../../tests/fixtures/tokenizer/expected.json")).unwrap()
}

fn fixture(name: &str) -> Tokenizer {
    Tokenizer::open(&Path::new(FIXTURES).join(name)).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_and_texts_are_transformers() {
    for name in ["plain", "bos"] {
        let (tokenizer, expected) = (fixture(name), &expected()["tokenizers"][name]);
        assert_eq!(Value::from(tokenizer.eos_id()), expected["eos_id"]);
        assert_eq!(Value::from(tokenizer.vocab_size()), expected["vocab_size"]);
        for case in expected["encodings"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["with_special"]), "{name} {text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&case["bare"]), "{name} {text:?}");
        }
        for case in expected["decoded"].as_array().unwrap() {
            let ids = ids(&case["ids"]);
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["text"].as_str().unwrap());
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), case["without_special"].as_str().unwrap());
        }
    }
}

#[test]
fn ends_and_beginnings() {
    let (plain, bos) = (fixture("plain"), fixture("bos"));
    assert_eq!((plain.eos_token(), plain.stop_ids(), plain.leading_bos()), ("<|im_end|>", &[3][..], None));
    assert_eq!((bos.eos_token(), bos.stop_ids(), bos.leading_bos()), ("</s>", &[1, 3][..], Some(0)));
    assert!(plain.is_special(3) && !plain.is_special(100) && !plain.is_special(100_000));
    assert_ne!(plain.fingerprint(), bos.fingerprint());
    assert_eq!(plain.fingerprint(), fixture("plain").fingerprint());
}

#[test]
fn pieces_join_to_the_text() {
    let tokenizer = fixture("plain");
    let text = "<|im_start|>the sky é😀\nblue<|im_end|>";
    let ids = tokenizer.encode(text, true).unwrap();
    let pieces = tokenizer.pieces(&ids).unwrap();
    assert_eq!(pieces.len(), ids.len());
    assert_eq!(pieces.concat(), text);
    assert_eq!(pieces[0], "<|im_start|>");
    // The four bytes of the emoji are four tokens here: the last one shows it.
    assert!(pieces.iter().any(|piece| piece == "😀") && pieces.iter().filter(|piece| piece.is_empty()).count() == 4);
}

/// Llama 2, Mistral and Phi-3 take a space off a text's start.
#[test]
fn an_answer_keeps_the_space_before_it() {
    let tokenizer = Tokenizer::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/mistral")));
    let tokenizer = tokenizer.unwrap();
    let ids = |text: &str| tokenizer.encode(text, true).unwrap();
    let (prompt, whole) = (ids("you say"), ids("you say that é to them"));
    assert!(whole.starts_with(&prompt));
    let answer = &whole[prompt.len()..];
    assert_eq!(tokenizer.decode(answer, true).unwrap(), "that é to them", "by itself");
    assert_eq!(tokenizer.decode_after(&prompt, answer).unwrap(), " that é to them");
    assert_eq!(tokenizer.decode_after(&[], &whole).unwrap(), "you say that é to them");
    // within a character, which is no text yet
    let (cut, rest) = ([ids("you"), vec![4 + 0xc3]].concat(), [4 + 0xa9]);
    assert_eq!(tokenizer.decode(&[cut.as_slice(), &rest].concat(), true).unwrap(), "youé");
    assert_eq!(tokenizer.decode_after(&cut, &rest).unwrap(), tokenizer.decode(&rest, true).unwrap());
}

/// Copies the `plain` fixture, changes it, and opens it.
fn changed(change: impl FnOnce(&Path)) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(FIXTURES).join("plain").join(file), folder.path().join(file)).unwrap();
    }
    change(folder.path());
    Tokenizer::open(folder.path())
}

fn edited(edit: impl FnOnce(&mut Value)) -> Result<Tokenizer> {
    changed(|folder| {
        let file = folder.join("tokenizer.json");
        let mut json = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        edit(&mut json);
        std::fs::write(file, json.to_string()).unwrap();
    })
}

#[test]
fn the_end_token_may_come_from_the_ids() {
    let tokenizer = changed(|folder| {
        std::fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
        std::fs::write(folder.join("config.json"), r#"{"eos_token_id": [1, 2]}"#).unwrap();
    });
    let tokenizer = tokenizer.unwrap();
    assert_eq!((tokenizer.eos_token(), tokenizer.stop_ids()), ("</s>", &[1, 2][..]));
}

#[test]
fn a_named_token_is_found_in_texts_though_it_is_not_listed() {
    let tokenizer = edited(|json| json["added_tokens"] = Value::Array(vec![])).unwrap();
    assert_eq!(tokenizer.encode("ab<|im_end|>", false).unwrap().last(), Some(&3));
}

#[test]
fn broken_folders_are_named() {
    let write = |name: &'static str, text: &'static str| {
        changed(move |folder| std::fs::write(folder.join(name), text).unwrap()).err().unwrap()
    };
    let lying = serde_json::json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    for (error, says) in [
        (changed(|folder| std::fs::remove_file(folder.join("tokenizer.json")).unwrap()).err().unwrap(), "no such file"),
        (write("tokenizer.json", "{\"version\": \"1.0\", "), "not a usable tokenizer"),
        (write("tokenizer.json", "[]"), "not a usable tokenizer"),
        (write("tokenizer_config.json", "{}"), "no end token is known"),
        (write("tokenizer_config.json", r#"{"eos_token": "<eot>"}"#), "\"<eot>\""),
        (edited(|json| json["post_processor"] = lying).err().unwrap(), "contradict"),
    ] {
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("tokenizer") && error.to_string().contains(says), "{error}");
    }
}

/// The library puts them around a text without a further look.
#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let end = serde_json::json!({"</s>": {"id": "</s>", "ids": [999_999], "tokens": ["</s>"]}});
    let lying = serde_json::json!({"type": "TemplateProcessing", "pair": [], "special_tokens": end,
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]});
    let tokenizer = edited(|json| json["post_processor"] = lying).unwrap();
    let error = tokenizer.encode("ab", true).unwrap_err();
    assert!(error.exit_code() == 3 && error.to_string().contains("tokenizer.json: "), "{error}");
    assert!(tokenizer.encode("ab", false).is_ok());
}
