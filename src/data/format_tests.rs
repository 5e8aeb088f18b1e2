//! Every shape of row, and every reason to refuse one. What TRL itself extracts is compared in `tokenize`.

use serde_json::json;

use super::*;

fn object(json: Value) -> Object {
    serde_json::from_value(json).unwrap()
}

fn parse(format: Format, json: Value) -> Result<Parsed, String> {
    let row = object(json);
    Shape::of(format, &row)?.parse(&row)
}

fn text_pair(prompt: &str, chosen: &str, rejected: &str) -> Parsed {
    Parsed::Pair(owned((prompt, chosen, rejected)))
}

fn turns(json: Value) -> Vec<Message> {
    serde_json::from_value(json).unwrap()
}

fn chat_pair(prompt: Value, chosen: Value, rejected: Value) -> Parsed {
    let (prompt, chosen, rejected) = (turns(prompt), turns(chosen), turns(rejected));
    Parsed::Pair(Row::Messages { prompt, chosen, rejected, extras: Extras::default() })
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

#[test]
fn the_shape_is_told_from_the_row() {
    let shape = |json| Shape::of(Format::Auto, &object(json)).unwrap();
    let hh = "\n\nHuman: a\n\nAssistant: b";
    assert_eq!(shape(json!({"prompt": "p", "chosen": "c", "rejected": "r"})), Shape::Text);
    assert_eq!(shape(json!({"prompt": null, "chosen": "c", "rejected": "r"})), Shape::ImplicitText);
    assert_eq!(shape(json!({"chosen": hh, "rejected": hh})), Shape::Hh);
    assert_eq!(shape(json!({"prompt": "p", "chosen": hh, "rejected": hh})), Shape::Text);
    assert_eq!(shape(json!({"chosen": [], "rejected": []})), Shape::ImplicitMessages);
    assert_eq!(shape(json!({"prompt": [], "chosen": [], "rejected": []})), Shape::Messages);
    assert!(Shape::of(Format::Auto, &object(json!({"chosen": "c"}))).is_err());
    // the first row's shape is the file's: a prompt that comes later would not be looked at
    for (shape, row) in [
        (Shape::ImplicitText, json!({"prompt": "p", "chosen": "Sure", "rejected": "Sorry"})),
        (Shape::ImplicitMessages, json!({"prompt": [user("p")], "chosen": [user("p")], "rejected": [user("p")]})),
    ] {
        let error = shape.parse(&object(row)).unwrap_err();
        assert_eq!(error, "this row has a `prompt` and the first of its file has none");
    }
    assert!(Shape::of(Format::Auto, &object(json!({"chosen": "c", "rejected": []}))).is_err());
}

#[test]
fn text_rows() {
    let row = json!({"prompt": "p", "chosen": " c", "rejected": " r", "other": 1});
    assert_eq!(parse(Format::Text, row), Ok(text_pair("p", " c", " r")));
    // The space before the answers goes to them; a part of a longer answer keeps one character.
    let implicit = |chosen: &str, rejected: &str| parse(Format::Text, json!({"chosen": chosen, "rejected": rejected}));
    assert_eq!(implicit("Sky is blue", "Sky is green"), Ok(text_pair("Sky is", " blue", " green")));
    assert_eq!(implicit("é blue", "é black"), Ok(text_pair("é bl", "ue", "ack")));
    assert_eq!(implicit("abc", "abcd"), Ok(text_pair("ab", "c", "cd")));
    assert_eq!(implicit("a", "b"), Ok(Parsed::Refused(Refusal::PromptsDiffer)));
}

#[test]
fn hh_rows() {
    let parse = |chosen: &str, rejected: &str| parse(Format::Hh, json!({"chosen": chosen, "rejected": rejected}));
    let prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:";
    assert_eq!(parse(&format!("{prompt} d"), &format!("{prompt} e")), Ok(text_pair(prompt, " d", " e")));
    let differ = Ok(Parsed::Refused(Refusal::PromptsDiffer));
    assert_eq!(parse(&format!("{prompt} d"), "\n\nHuman: a\n\nAssistant: d"), differ);
    assert_eq!(parse("no dialogue", "at all"), differ);
}

#[test]
fn message_rows() {
    let prompt = json!([{"role": "system", "content": "s"}, user("q")]);
    let whole = |answer: &str| json!([{"role": "system", "content": "s"}, user("q"), assistant(answer)]);
    let expected = Ok(chat_pair(prompt.clone(), json!([assistant("c")]), json!([assistant("r")])));
    let parse = |row| parse(Format::Messages, row);
    assert_eq!(parse(json!({"chosen": whole("c"), "rejected": whole("r")})), expected);
    assert_eq!(parse(json!({"prompt": prompt, "chosen": whole("c"), "rejected": whole("r")})), expected);
    assert_eq!(parse(json!({"prompt": prompt, "chosen": [assistant("c")], "rejected": [assistant("r")]})), expected);
    assert_eq!(parse(json!({"prompt": "q", "chosen": whole("c"), "rejected": whole("r")})), expected);
    let differ = Ok(Parsed::Refused(Refusal::PromptsDiffer));
    assert_eq!(parse(json!({"prompt": "other", "chosen": whole("c"), "rejected": whole("r")})), differ);
    assert_eq!(parse(json!({"prompt": prompt, "chosen": whole("c"), "rejected": [assistant("r")]})), differ);
    assert_eq!(parse(json!({"chosen": [assistant("c")], "rejected": [assistant("r")]})), differ);
    assert_eq!(parse(json!({"chosen": [], "rejected": []})), differ);
}

#[test]
fn empty_and_identical_answers() {
    let parse = |row| parse(Format::Auto, row);
    let refused = |refusal| Ok(Parsed::Refused(refusal));
    let text = |chosen: &str, rejected: &str| parse(json!({"prompt": "p", "chosen": chosen, "rejected": rejected}));
    assert_eq!(text("c", " \n"), refused(Refusal::EmptyAnswer));
    assert_eq!(text("c", "c"), refused(Refusal::IdenticalAnswers));
    let chat = |chosen, rejected| parse(json!({"prompt": [user("q")], "chosen": chosen, "rejected": rejected}));
    assert_eq!(chat(json!([assistant("c")]), json!([])), refused(Refusal::EmptyAnswer));
    assert_eq!(chat(json!([assistant(" ")]), json!([assistant("r")])), refused(Refusal::EmptyAnswer));
    assert_eq!(chat(json!([assistant("c")]), json!([assistant("c")])), refused(Refusal::IdenticalAnswers));
    let call = json!([{"role": "assistant", "content": null, "tool_calls": [{}]}]);
    assert!(matches!(chat(call, json!([assistant("r")])), Ok(Parsed::Pair(_))));
}

#[test]
fn wrong_fields_are_named() {
    for (format, row, says) in [
        (Format::Text, json!({"prompt": "p", "chosen": "c"}), "`rejected` is missing"),
        (Format::Text, json!({"prompt": 3, "chosen": "c", "rejected": "r"}), "`prompt` must be text, not a number"),
        (Format::Hh, json!({"chosen": ["c"], "rejected": "r"}), "`chosen` must be text, not a list"),
        (Format::Messages, json!({"chosen": "c", "rejected": "r"}), "`chosen` must be a list"),
        (Format::Messages, json!({"chosen": [{"role": 1}], "rejected": []}), "`chosen[0]` must be an object"),
        (Format::Messages, json!({"chosen": [{"role": "user", "content": 1}], "rejected": []}), "`chosen[0].content`"),
        (Format::Messages, json!({"prompt": {}, "chosen": [], "rejected": []}), "`prompt` must be a list"),
    ] {
        let error = parse(format, row).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_a_template_is_told_besides() {
    let extras = |more: Value| {
        let mut row = object(json!({"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant("r")]}));
        row.extend(object(more));
        Shape::Messages.parse(&row).map(|parsed| match parsed {
            Parsed::Pair(Row::Messages { extras, .. }) => extras,
            other => panic!("{other:?}"),
        })
    };
    let tools = vec![json!({"name": "w"})];
    let given = Extras { tools: Some(tools.clone()), names: object(json!({"enable_thinking": false})) };
    let names = json!({"enable_thinking": false});
    assert_eq!(extras(json!({"tools": tools, "chat_template_kwargs": names})), Ok(given.clone()));
    let as_text = Value::Array(tools).to_string();
    assert_eq!(extras(json!({"tools": as_text, "chat_template_kwargs": names})), Ok(given));
    assert_eq!(extras(json!({"tools": null, "chat_template_kwargs": null})), Ok(Extras::default()));
    for (wrong, says) in [
        (json!({"tools": "no JSON"}), "`tools` must be a list of objects, or that list as JSON text: expected"),
        (json!({"tools": ["w"]}), "`tools` must be a list of objects"),
        (json!({"tools": {"name": "w"}}), "`tools` must be a list of objects"),
        (json!({"chat_template_kwargs": "x"}), "`chat_template_kwargs` must be an object, not text"),
        (
            json!({"tools": format!("[{}0]", "0,".repeat(300_000))}),
            "`tools` must be a list of objects, or that list as JSON text",
        ),
        (json!({"chat_template_kwargs": {"tools": []}}), "`chat_template_kwargs.tools` is not for a template"),
        (
            json!({"chat_template_kwargs": {"sanitize_control_tokens": true}}),
            "`chat_template_kwargs.sanitize_control_tokens` is not for a template",
        ),
    ] {
        let error = extras(wrong).unwrap_err();
        assert!(error.starts_with(says), "{error}");
    }
}
