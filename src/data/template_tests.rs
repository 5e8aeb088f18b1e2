//! Chat templates against the texts that transformers rendered (tools/fixtures/templates.py), and hostile ones.

use super::*;

fn template(source: &str) -> ChatTemplate {
    compiled(source).unwrap()
}

fn compiled(source: &str) -> Result<ChatTemplate> {
    let special = minijinja::context! { bos_token => "<s>", eos_token => "</s>" };
    ChatTemplate::with_special_tokens("model/chat.jinja", source, special)
}

fn chat(json: Json) -> Vec<Message> {
    serde_json::from_value(json).unwrap()
}

fn refused(source: &str) -> String {
    let messages = chat(serde_json::json!([{"role": "user", "content": "hi"}]));
    let error =
        compiled(source).and_then(|template| template.render(&messages, &Extras::default(), false)).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    error.to_string()
}

#[test]
fn as_transformers_renders_it() {
    let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/templates.json")).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 110);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let messages = chat(fixture["chats"][case["chat"].as_str().unwrap()].clone());
        let template = template(fixture["templates"][name].as_str().unwrap());
        let extras = Extras {
            tools: case.get("tools").map(|tools| tools.as_array().unwrap().clone()),
            names: case.get("names").map_or_else(Map::new, |names| names.as_object().unwrap().clone()),
        };
        let got = template.render(&messages, &extras, case["add_generation_prompt"].as_bool().unwrap());
        match case["text"].as_str() {
            // Python's own text of a list of parts, which ours does not imitate.
            Some(expected) if expected.contains("[{'type': 'image'}") => {
                assert!(got.unwrap_err().to_string().contains("is used as text"), "{name}");
            }
            Some(expected) => assert_eq!(got.unwrap(), expected, "{name}, {}", case["chat"]),
            None => assert!(got.is_err(), "{name}, {}: {}", case["chat"], got.unwrap()),
        }
    }
}

#[test]
fn errors_name_file_and_line() {
    for (source, says) in [
        (
            "{{ 1 }}\n{{ raise_exception('roles must alternate') }}",
            "model/chat.jinja:2: chat template: the template refuses these messages: roles must alternate",
        ),
        ("\n\n{% if %}", "model/chat.jinja:3: "),
        ("a\n{{ messages[0].content.nothing.more }}", "model/chat.jinja:2: "),
        ("{{ nothing() }}", "model/chat.jinja:1: "),
        ("{{ messages }}", "through `tojson`"),
        ("{{ strftime_now('%Q') }}", "\"%Q\""),
    ] {
        let error = refused(source);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn hostile_templates_end_in_an_error() {
    for (source, says) in [
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = 1 %}{% endfor %}{% endfor %}",
            "too many steps",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        ("{% set x = 'x' * 60000000 %}{{ x }}{{ x }}", "more than"),
        ("{{ 'x' * 999999999999 }}", "too large"),
        ("{% include '/etc/passwd' %}", ""),
        ("{% import '/etc/passwd' as p %}", ""),
        ("{{ range(99999999) | list }}", ""),
        (&"(".repeat(MAX_SOURCE as usize + 1), "bytes"),
        (&format!("{{{{ {} }}}}", "(".repeat(100_000)), ""),
    ] {
        let error = refused(source);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_grows_is_bounded() {
    for source in [
        // minijinja doubles a text in four steps
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}\
         {% set ns.x = x %}{% endfor %}",
        "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('x', 60) }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(30000) %}{% set ns.x = ns.x + ['x' * 99999 ~ i] %}{% endfor %}",
        "{{ ('x' * 90000000) ~ ('x' * 90000000) }}",
        "{{ ([0] * 99999999999) | list }}",
        "{{ ('x' * 9000000) | list | length }}",
        "{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ 'x' | indent(99999999999) }}{{ 'x\n' * 9 | indent(99999999) }}",
    ] {
        let error = refused(source);
        let bounded = ["holds more than 64 MiB", "too large", "too many", "recursion limit"]
            .iter()
            .any(|says| error.contains(says));
        assert!(bounded, "{source}: {error}");
    }
}

#[test]
fn sources_nested_as_deep_as_their_size_allows_are_walked() {
    // Whether it compiles is minijinja's to say; that it says so, and does not exhaust the stack, is tested.
    for (start, open, middle, close, end) in [
        ("", "{% if x %}", "", "{% endif %}", ""),
        ("", "{% for x in y %}", "", "{% endfor %}", ""),
        ("", "{% set x %}", "", "{% endset %}", ""),
        ("{{ ", "[", "", "]", " }}"),
        ("{{ ", "not ", "1", "", " }}"),
        ("{{ 1", "+1", "", "", " }}"),
        ("{{ 1", "~1", "", "", " }}"),
        ("{{ a", ".a", "", "", " }}"),
        ("{{ a", "|a", "", "", " }}"),
        ("{{ 1", " if 1 else 1", "", "", " }}"),
    ] {
        let n = (MAX_SOURCE as usize - 10) / (open.len() + close.len());
        let source = [start, &open.repeat(n), middle, &close.repeat(n), end].concat();
        if let Ok(template) = compiled(&source) {
            let _ = template.render(&[], &Extras::default(), false);
        }
    }
}

#[test]
fn values_nested_as_deep_as_the_steps_allow_are_walked() {
    let messages = vec![Message::new(); 200];
    let render = |end: &str| {
        let nest = "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
        template(&format!("{nest}{end}")).render(&messages, &Extras::default(), false)
    };
    assert_eq!(render("").unwrap(), "");
    assert_eq!(render("{{ ns.x | tojson | length }}").unwrap(), "199999");
    assert_eq!(render("{{ (ns.x ~ '') | length }}").unwrap(), "199999");
    assert_eq!(render("{{ ns.x == ns.x }}").unwrap(), "True");
}

#[test]
fn real_templates_are_far_from_the_bounds() {
    let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/templates.json")).unwrap();
    let turn = |i: usize| {
        let role = if i.is_multiple_of(2) { "user" } else { "assistant" };
        serde_json::from_value(serde_json::json!({"role": role, "content": "<think>a</think>b"})).unwrap()
    };
    let chat: Vec<Message> = (0..100).map(turn).collect();
    for (name, source) in fixture["templates"].as_object().unwrap() {
        let template = template(source.as_str().unwrap());
        let mut environment = template.compiled.environment.clone();
        environment.set_fuel(Some(MAX_STEPS));
        let context =
            minijinja::context! { messages => Value::from_serialize(&chat), ..template.compiled.special.clone() };
        let captured = environment.get_template("chat").unwrap().render_captured(context).unwrap();
        let (steps, _) = captured.state().fuel_levels().unwrap();
        assert!(steps < 100 * 100, "{name}: {steps}");
    }
}

#[test]
fn the_day_stands_still() {
    let text = template("{{ strftime_now('%d %b %Y, %A %B %-y'.replace('%-y', '%y')) }}")
        .render(&[], &Extras::default(), false)
        .unwrap();
    assert_eq!(text, "26 Jul 2024, Friday July 24");
}

#[test]
fn generation_marks_leave_lines_and_strings_alone() {
    assert_eq!(
        without_generation_marks("a\n{%- generation -%}\nb {% endgeneration %}{% if x %}"),
        "a\n{%- with -%}\nb {% endwith %}{% if x %}"
    );
    assert_eq!(without_generation_marks("generation {{ generation }} {% "), "generation {{ generation }} {% ");
}

#[test]
fn tools_are_not_written_by_a_template_that_is_not_for_them() {
    let template = ChatTemplate { another_for_tools: true, ..template("{{ messages[0].content }}") };
    let messages = chat(serde_json::json!([{"role": "user", "content": "hi"}]));
    assert_eq!(template.render(&messages, &Extras::default(), false).unwrap(), "hi");
    let with_tools = Extras { tools: Some(vec![]), ..Extras::default() };
    let error = template.render(&messages, &with_tools, false).unwrap_err();
    assert!(error.exit_code() == 3 && error.to_string().contains("named tool_use"), "{error}");
}
