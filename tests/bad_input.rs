//! Bad rows, chat templates, paths and run folders through the binary.

#[path = "support/refused.rs"]
mod refused;
#[path = "support/tiny.rs"]
mod tiny;

use std::fs;
use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use refused::{TRAIN, refused};
use tiny::{RECIPE, Tiny, rows, stderr};

const WEIGHTS: &str = "base/model.safetensors";

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// 24 good rows, and this one as line 25.
fn with_row(tiny: &Tiny, row: &str) {
    tiny.write("rows.jsonl", format!("{}{row}\n", rows(24)));
}

fn set_recipe(tiny: &Tiny, section: &str, line: &str) {
    tiny.write("recipe.toml", RECIPE.replace(section, &format!("{section}\n{line}")));
}

#[test]
fn bad_rows() {
    refused(
        &TRAIN,
        &[
            (
                "a row cut short",
                |t| with_row(t, r#"{"prompt": "a", "chosen": "b", "#),
                &["rows.jsonl:25: not a JSON object", "mend or remove"],
            ),
            ("a row that is no object", |t| with_row(t, "3"), &["rows.jsonl:25: not a JSON object"]),
            (
                "half a surrogate pair",
                |t| with_row(t, r#"{"prompt": "\ud800", "chosen": "b", "rejected": "c"}"#),
                &["rows.jsonl:25: "],
            ),
            (
                "nesting without end",
                |t| with_row(t, &format!(r#"{{"prompt": {}"#, "[".repeat(100_000))),
                &["rows.jsonl:25: not a JSON object", "recursion limit"],
            ),
            (
                "one JSON list",
                |t| t.write("rows.jsonl", "[\n]\n"),
                &["rows.jsonl:1: a JSON list", "each on its own line"],
            ),
            (
                "a number for a text",
                |t| with_row(t, r#"{"prompt": "a", "chosen": 7, "rejected": "c"}"#),
                &["rows.jsonl:25: `chosen` must be text, not a number"],
            ),
            (
                "a field missing",
                |t| with_row(t, r#"{"prompt": "a", "chosen": "b"}"#),
                &["rows.jsonl:25: `rejected` is missing"],
            ),
            (
                "other fields",
                |t| t.write("rows.jsonl", r#"{"question": "a", "answer": "b"}"#),
                &["rows.jsonl:1: expected `chosen` and `rejected`"],
            ),
            (
                "no usable row",
                |t| t.write("rows.jsonl", r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#),
                &["rows.jsonl: no usable row", "1 refused (both answers are the same: ", "data check"],
            ),
            ("an empty file", |t| t.write("rows.jsonl", ""), &["rows.jsonl: no usable row (0 rows read", "data check"]),
            (
                "a picture",
                |t| t.write("rows.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe"),
                &["rows.jsonl:1: not UTF-8"],
            ),
            ("numbers", |t| t.write("rows.jsonl", [0; 64]), &["rows.jsonl:1: not a JSON object"]),
            (
                "gzip cut short",
                |t| t.write("rows.jsonl", &gzip(&rows(200))[..300]),
                &["rows.jsonl:", "cannot be read on", "fetch or pack the file again"],
            ),
            (
                "gzip with a changed byte",
                |t| {
                    let mut bytes = gzip(&rows(200));
                    let at = bytes.len() - 6;
                    bytes[at] ^= 1;
                    t.write("rows.jsonl", bytes);
                },
                &["rows.jsonl:", "cannot be read on"],
            ),
            (
                "HH without an answer",
                |t| {
                    set_recipe(t, "[data]", "format = \"hh\"");
                    t.write("rows.jsonl", r#"{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}"#);
                },
                &["rows.jsonl: no usable row"],
            ),
            (
                "HH that is no text",
                |t| {
                    set_recipe(t, "[data]", "format = \"hh\"");
                    t.write("rows.jsonl", r#"{"chosen": ["a"], "rejected": ["b"]}"#);
                },
                &["rows.jsonl:1: `chosen` must be text, not a list"],
            ),
            (
                "messages without a template",
                |t| {
                    fs::remove_file(t.path("base/chat_template.jinja")).unwrap();
                    t.write("rows.jsonl", MESSAGES);
                },
                &["rows.jsonl:1: messages need a chat template", "data.chat_template"],
            ),
            (
                "a message without a role",
                |t| t.write("rows.jsonl", MESSAGES.replace("\"role\": \"user\", ", "")),
                &["rows.jsonl:1: `prompt[0]` must be an object with a text `role`"],
            ),
            (
                "a message that is a number",
                |t| t.write("rows.jsonl", MESSAGES.replace("\"blue\"", "3")),
                &["rows.jsonl:1: `chosen[0].content` must be text, not a number"],
            ),
            (
                "held-out rows that are bad",
                |t| {
                    set_recipe(t, "[data]", "eval = [\"held-out.jsonl\"]");
                    t.write("held-out.jsonl", "{");
                },
                &["held-out.jsonl:1: not a JSON object"],
            ),
        ],
    );
}

const MESSAGES: &str = r#"{"prompt": [{"role": "user", "content": "sky?"}], "chosen": [{"role": "assistant", "content": "blue"}], "rejected": [{"role": "assistant", "content": "green"}]}"#;

#[test]
fn bad_templates() {
    fn with(t: &Tiny, template: &str) {
        t.write("rows.jsonl", MESSAGES);
        t.write("base/chat_template.jinja", template);
    }
    refused(
        &TRAIN,
        &[
            (
                "one that refuses",
                |t| with(t, "{{ raise_exception('no system, please') }}"),
                &[
                    "rows.jsonl:1: ",
                    "chat_template.jinja:1: chat template: the template refuses these messages: no system, please",
                ],
            ),
            (
                "one that loops",
                |t| with(t, "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}"),
                &["chat_template.jinja:1: chat template: it takes too many steps", "name another"],
            ),
            (
                "one cut short",
                |t| with(t, "{% for m in messages %}"),
                &["chat_template.jinja:1: chat template: ", "mend"],
            ),
            (
                "an unknown function",
                |t| with(t, "\n{{ fetch('http://x') }}"),
                &["chat_template.jinja:2: chat template: "],
            ),
            (
                "calls without end",
                |t| with(t, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
                &["chat_template.jinja:1: "],
            ),
            (
                "one that is no text",
                |t| {
                    with(t, "");
                    t.write("base/chat_template.jinja", [0xff, 0xfe])
                },
                &["chat_template.jinja: not UTF-8"],
            ),
            (
                "a bad one of the recipe's",
                |t| {
                    with(t, "");
                    set_recipe(t, "[data]", "chat_template = \"mine.jinja\"");
                    t.write("mine.jinja", "{{ messages[0].name.first }}");
                },
                &["mine.jinja:1: chat template: "],
            ),
        ],
    );
}

#[test]
fn bad_paths() {
    refused(&["generate", "./nowhere", "--prompt", "a"], &[("a model", |_| (), &["nowhere"])]);
    refused(&["generate", "rows.jsonl", "--prompt", "a"], &[("a file for a model", |_| (), &["rows.jsonl"])]);
    refused(
        &["generate", "base", "--prompts", "prompts.txt"],
        &[
            ("prompts", |_| (), &["prompts.txt: cannot be read"]),
            ("no prompts", |t| t.write("prompts.txt", "\n\n"), &["prompts.txt: holds no prompt; write one a line"]),
            ("prompts that are no text", |t| t.write("prompts.txt", [0xff]), &["prompts.txt: "]),
        ],
    );
    refused(
        &["eval", "recipe.toml", "--data", "nowhere.jsonl"],
        &[("held-out rows", |_| (), &["nowhere.jsonl: cannot be read"])],
    );
    refused(&["inspect", "nowhere"], &[("a folder", |_| (), &["nowhere"])]);
    refused(&["inspect", "base"], &[("a broken model", |t| t.write(WEIGHTS, "{}"), &["base/model.safetensors: "])]);
    refused(&["export", "nowhere", "--to", "merged", "out"], &[("a run", |_| (), &["nowhere"])]);
    refused(
        &["train", "recipe.toml", "--set", "samples.labels=labels.json", "--set", "samples.prompts=[\"a\"]"],
        &[(
            "labels",
            |t| t.write("labels.json", "{\"positive\": 3}"),
            &["labels.json: ", "expected {\"positive\": [words], \"negative\": [words]}"],
        )],
    );
}

/// What a run's own folder may have become.
#[test]
fn a_spoilt_run() {
    let spoilt = |arguments: &[&str], code: i32, spoil: fn(&Tiny), parts: &[&str]| {
        let tiny = Tiny::new();
        tiny.ok(&[
            "train",
            "recipe.toml",
            "--max-steps",
            "2",
            "--set",
            "data.eval_fraction=0.2",
            "--set",
            "train.save_every=1",
        ]);
        spoil(&tiny);
        let output = tiny.run(arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        let message = said.lines().last().unwrap();
        assert!(
            message.starts_with("error: ") && parts.iter().all(|part| message.contains(part)),
            "{said}\nlacks one of {parts:?}"
        );
        assert!(!said.contains("panicked"), "{said}");
    };
    let resume = [
        "train",
        "recipe.toml",
        "--max-steps",
        "2",
        "--set",
        "data.eval_fraction=0.2",
        "--set",
        "train.save_every=1",
        "--resume",
        "runs/recipe/checkpoint-1",
    ];
    let metrics = "runs/recipe/metrics.jsonl";
    spoilt(&resume, 3, |t| fs::remove_file(t.path("runs/recipe/metrics.jsonl")).unwrap(), &[metrics, "cannot be read"]);
    spoilt(
        &resume,
        3,
        |t| t.write("runs/recipe/metrics.jsonl", "{}\n"),
        &[metrics, "rows are missing", "start the run anew"],
    );
    spoilt(
        &resume,
        3,
        |t| t.write("runs/recipe/checkpoint-1/state.json", "{}\n"),
        &["checkpoint-1/state.json: it is not what manifest.json says"],
    );
    spoilt(
        &resume,
        3,
        |t| fs::remove_file(t.path("runs/recipe/checkpoint-1/optimizer.safetensors")).unwrap(),
        &["checkpoint-1/optimizer.safetensors: "],
    );
    spoilt(&resume, 3, |t| fs::remove_dir_all(t.path("runs/recipe/checkpoint-1")).unwrap(), &["checkpoint-1"]);
    spoilt(
        &["eval", "runs/recipe"],
        2,
        |t| fs::remove_file(t.path("runs/recipe/recipe.toml")).unwrap(),
        &["runs/recipe/recipe.toml"],
    );
    spoilt(
        &["eval", "runs/recipe"],
        3,
        |t| fs::remove_dir_all(t.path("runs/recipe/adapter")).unwrap(),
        &["runs/recipe: this run has not ended; resume it, or name one of its checkpoint-STEP folders"],
    );
    spoilt(
        &["eval", "runs/recipe"],
        3,
        |t| fs::remove_file(t.path("rows.jsonl")).unwrap(),
        &["rows.jsonl: cannot be read"],
    );
    spoilt(&["eval", "runs/recipe"], 3, |t| fs::remove_dir_all(t.path("base")).unwrap(), &["base"]);
}
