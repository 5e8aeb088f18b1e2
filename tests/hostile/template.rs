//! Chat templates: no file, no code, bounded steps, time and memory.

use crate::{Case, case};

const PLACE: &[&str] = &["chat_template.jinja", ": chat template: ", "name another as chat_template"];
const STEPS: &[&str] = &["it takes too many steps"];
const MEMORY: &[&str] = &["it holds more than 64 MiB"];

/// `x` made longer and longer.
fn grown(by: &str) -> String {
    format!("{{% set n = namespace(x='x') %}}{{% for i in range(90) %}}{{% set n.x = {by} %}}{{% endfor %}}")
}

pub fn what_is_not_there() -> Vec<Case> {
    let line = "{{ 1 }}\n".repeat(6) + "{{ nothing() }}";
    let mut cases = vec![
        case("cut short", "{% for m in messages %}", PLACE),
        case("an end too many", "{% endfor %}", PLACE),
        case("a tag that is none", "{% exec %}", PLACE),
        case("a bracket left open", "{{ messages[", PLACE),
        case("a text left open", "{{ 'x }}", PLACE),
        case(
            "a refusal",
            "{{ raise_exception('no\u{202e}\x1b[2J') }}",
            &["refuses these messages: no\\u{202e}\\u{1b}[2J"],
        ),
        case("no UTF-8", b"\xff\xfe".to_vec(), &["chat_template.jinja: not UTF-8 text"]),
        case("a line far down", line, &["chat_template.jinja:7: "]),
        case("a list as text", "{{ messages }}", &["through `tojson`"]),
        case("an unknown day", "{{ strftime_now('%Q') }}", &["\"%Q\""]),
    ];
    for source in [
        "{% include '/etc/passwd' %}",
        "{% include 'chat' %}",
        "{% import '/etc/passwd' as p %}",
        "{% from '/etc/passwd' import x %}",
        "{% extends '/etc/passwd' %}",
        "{% extends 'chat' %}",
        "{{ open('/etc/passwd').read() }}",
        "{{ __import__('os').system('id') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ self.__init__.__globals__['os'].popen('id') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ url_for.__globals__ }}",
        "{{ config.items() }}",
        "{{ request.application.__globals__ }}",
        "{{ env('HF_TOKEN') }}",
        "{{ os.environ['HF_TOKEN'] }}",
        "{{ get_env(name='HF_TOKEN') }}",
        "{{ read_file('/etc/passwd') }}",
        "{{ load_data('http://localhost') }}",
        "{{ fetch('http://localhost') }}",
        "{{ 'id' | shell }}",
        "{{ '/etc/passwd' | open }}",
        "{{ messages[0].role.format.__globals__.x }}",
        "{{ '{0.__class__.__init__}'.format(messages).x() }}",
        "{{ (messages | map(attribute='__class__') | list)[0].x }}",
        "{{ namespace().__class__.x }}",
        "{{ debug.x() }}",
        "{% macro m() %}{{ caller.__globals__.x }}{% endmacro %}{{ m() }}",
    ] {
        cases.push(case("a way to files or code", source, PLACE));
    }
    cases
}

pub fn what_has_no_end() -> Vec<Case> {
    let deep = |open: &str| format!("{{{{ {} }}}}", open.repeat(100_000));
    let mut cases = vec![
        case(
            "256 KiB and a byte",
            vec![b' '; (256 << 10) + 1],
            &["262145 bytes, and no such file has more than 262144"],
        ),
        case("65 MiB", vec![b' '; 65 << 20], &["68157440 bytes, and no such file"]),
        case("brackets", deep("("), PLACE),
        case("lists", deep("["), PLACE),
        case("signs", deep("-"), PLACE),
        case("blocks", "{% if 1 %}".repeat(20_000), PLACE),
        case("loops", "{% for a in range(9999) %}".repeat(3) + "{{ a }}" + &"{% endfor %}".repeat(3), STEPS),
        case("a loop over one", "{% for a in range(99999) %}{% for b in [1] %}{{ b }}{% endfor %}{% endfor %}", STEPS),
        case("a long range", "{% for a in range(99999999) %}{% endfor %}", PLACE),
        case("a macro of itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", PLACE),
        case(
            "two macros of each other",
            "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
            PLACE,
        ),
        case("a loop of itself", "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", PLACE),
        case("a block of itself", "{% block a %}{{ self.a() }}{% endblock %}", PLACE),
        case(
            "texts written",
            "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
            &["the template writes more than"],
        ),
        case("one long text", "{{ 'x' * 999999999999 }}", &["too large"]),
        case("a list of millions", "{{ ([0] * 99999999999) | list | length }}", MEMORY),
        case("characters", "{{ ('x' * 9000000) | list | length }}", MEMORY),
        case("two long constants", "{{ ('x' * 90000000) ~ ('x' * 90000000) }}", MEMORY),
        case(
            "a long text kept",
            "{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
            MEMORY,
        ),
        case(
            "raw text kept",
            format!("{{% set x %}}{{% for i in range(20000) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(99_999)),
            MEMORY,
        ),
        case(
            "a macro's text",
            format!(
                "{{% macro m() %}}{{% for i in range(20000) %}}{}{{% endfor %}}{{% endmacro %}}{{{{ m() | length }}}}",
                "x".repeat(99_999)
            ),
            MEMORY,
        ),
        case(
            "many texts",
            "{% set n = namespace(x=[]) %}{% for i in range(30000) %}{% set n.x = n.x + ['x' * 99999 ~ i] %}{% endfor %}",
            MEMORY,
        ),
        case(
            "a macro's argument",
            "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('x', 60) }}",
            PLACE,
        ),
        case("a width", "{{ 'x\n' * 99 | indent(99999999) }}{{ ('x\n' * 99) | indent(99999999) }}", PLACE),
        case("a format", "{{ '%99999999999d' | format(1) }}", PLACE),
        case("an exponent", "{{ 9 ** 9 ** 9 ** 9 }}", PLACE),
        case("a division by 0", "{{ 1 // 0 }}", PLACE),
    ];
    for by in [
        "n.x ~ n.x",
        "n.x + n.x",
        "n.x ~ n.x ~ n.x ~ n.x",
        "[n.x, n.x] | join",
        "[n.x, n.x] | join(n.x)",
        "n.x.replace('', n.x)",
        "n.x | replace('x', 'xx')",
        "''.join([n.x, n.x])",
        "n.x * 2",
        "(n.x ~ 'é') | upper * 2",
        "n.x | tojson | tojson",
        "n.x | escape ~ n.x | title",
        "'{}{}'.format(n.x, n.x)",
        "[n.x, n.x] | tojson",
        "(n.x | list + n.x | list) | join",
    ] {
        cases.push(case("a text that grows", grown(by), &["chat template: it "]));
    }
    cases
}
