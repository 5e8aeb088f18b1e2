//! Whole files to tokens: equal to TRL's (tools/fixtures/tiny_tokenizer.py), every refusal counted, every error placed.

use std::fs;

use serde_json::json;

use super::*;

fn tokenizer(name: &str) -> Tokenizer {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");
    Tokenizer::open(&Path::new(fixtures).join(name)).unwrap()
}

fn options() -> Options {
    Options { format: Format::Auto, max_length: 1000, truncation: Truncation::Refuse, limit: 0 }
}

/// Files of these texts, gone with the folder.
fn files(texts: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let write = |(index, text): (usize, &&str)| {
        let path = folder.path().join(format!("{index}.jsonl"));
        fs::write(&path, text).unwrap();
        path
    };
    let paths = texts.iter().enumerate().map(write).collect();
    (folder, paths)
}

fn load(texts: &[&str], options: &Options) -> Result<Dataset> {
    let tokenizer = tokenizer("plain");
    let template = ChatTemplate::choose("auto", &tokenizer)?;
    Dataset::load(&files(texts).1, &tokenizer, template.as_ref(), options)?.usable()
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[test]
fn tokens_are_trls() {
    let expected: Value = serde_json::from_str(include_str!("../../tests/fixtures/tokenizer/expected.json")).unwrap();
    let mut refused = 0;
    for name in ["plain", "bos"] {
        let tokenizer = tokenizer(name);
        let template = ChatTemplate::choose("auto", &tokenizer).unwrap();
        for (shape, rows) in expected["rows"].as_object().unwrap() {
            let rows = rows.as_array().unwrap();
            for (row, expected) in rows.iter().zip(expected["tokenizers"][name]["pairs"][shape].as_array().unwrap()) {
                let ids = |side: &str| -> Vec<u32> { serde_json::from_value(expected[side].clone()).unwrap() };
                let files = files(&[&row.to_string()]);
                let got = Dataset::load(&files.1, &tokenizer, template.as_ref(), &options());
                match got.and_then(Dataset::usable) {
                    Ok(got) => {
                        let pair = &got.pairs[0];
                        assert_eq!(serde_json::to_value(got.report.files[0].shape).unwrap(), json!(shape));
                        assert_eq!(pair.prompt, ids("prompt"), "{name} {row}");
                        assert_eq!(pair.chosen, ids("chosen"), "{name} {row}");
                        assert_eq!(pair.rejected, ids("rejected"), "{name} {row}");
                    }
                    // What TRL trains on and we do not: a prompt without a token, and an answer that says nothing.
                    Err(error) => {
                        let says_nothing = row["chosen"][0]["content"] == json!("") || row["chosen"] == json!("\n");
                        assert!(ids("prompt").is_empty() || says_nothing, "{name} {row}: {error}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert_eq!(refused, 6);
}

#[test]
fn every_row_is_counted() {
    let text = lines(&[
        json!({"prompt": "the sky is", "chosen": " blue", "rejected": " green"}),
        json!({"prompt": "the sky is", "chosen": " blue", "rejected": " blue"}),
        json!({"prompt": "the sky is", "chosen": "", "rejected": " blue"}),
        json!({"prompt": "", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "the sky is the sky is the sky is the sky is the sky is", "chosen": " blue", "rejected": " green, green"}),
        json!({"prompt": "ab ab", "chosen": "c", "rejected": "cd"}),
    ]);
    let chats = lines(&[
        json!({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}),
        json!({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
               "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}),
    ]);
    let small = Options { max_length: 16, ..options() };
    let dataset = load(&[&text, "\n", &chats], &small).unwrap();
    let report = &dataset.report;
    assert_eq!((report.rows, report.used, report.truncated, report.seam_merges), (8, 3, 0, 1));
    assert_eq!(report.answers_without_end, 0);
    let refused: Vec<_> = report.refused.iter().map(|(refusal, refused)| (*refusal, refused.count)).collect();
    use Refusal::*;
    let expected = [(EmptyAnswer, 1), (IdenticalAnswers, 1), (PromptsDiffer, 1), (EmptyPrompt, 1), (TooLong, 1)];
    assert_eq!(refused, expected);
    assert!(report.refused[&TooLong].places[0].ends_with("0.jsonl:5"));
    assert!(report.refused[&PromptsDiffer].places[0].ends_with("2.jsonl:1"));
    let origins: Vec<_> = dataset.pairs.iter().map(|pair| pair.origin).collect();
    assert_eq!(origins, [(0, 1), (0, 6), (2, 2)]);
    assert_eq!(
        report.files.iter().map(|file| (file.shape, file.rows)).collect::<Vec<_>>(),
        [(Some(Shape::Text), 6), (None, 0), (Some(Shape::ImplicitMessages), 2)]
    );
    let cut = load(&[&text], &Options { truncation: Truncation::PromptStart, ..small }).unwrap();
    assert_eq!((cut.report.used, cut.report.truncated), (3, 1));
    assert!(cut.report.tokens.longest.max == 16);
}

#[test]
fn chunks_keep_the_order_and_limit_holds() {
    let row = |i: usize| json!({"prompt": format!("the {i}"), "chosen": " sky", "rejected": " sea"});
    let many = lines(&(0..CHUNK + 40).map(row).collect::<Vec<_>>());
    let all = load(&[&many, &lines(&[row(7)])], &options()).unwrap();
    assert_eq!(all.pairs.len(), CHUNK + 41);
    let expected: Vec<(u32, u32)> = (1..=CHUNK as u32 + 40).map(|line| (0, line)).chain([(1, 1)]).collect();
    assert_eq!(all.pairs.iter().map(|pair| pair.origin).collect::<Vec<_>>(), expected);
    for limit in [1, CHUNK, CHUNK + 3, CHUNK + 41, CHUNK + 100] {
        let some = load(&[&many, &lines(&[row(7)])], &Options { limit, ..options() }).unwrap();
        assert_eq!(some.pairs, all.pairs[..limit.min(CHUNK + 41)]);
    }
    assert_eq!(fingerprint(&all.pairs), fingerprint(&all.pairs.clone()));
    assert_ne!(fingerprint(&all.pairs), fingerprint(&all.pairs[1..]));
}

#[test]
fn rows_held_out_that_are_trained_on_are_counted() {
    let row = |i: usize| json!({"prompt": format!("the {i}"), "chosen": " sky", "rejected": " sea"});
    let turned = json!({"prompt": "the 1", "chosen": " sea", "rejected": " sky"});
    let train = load(&[&lines(&[row(1), row(2), row(2), row(3)])], &options()).unwrap().pairs;
    let held_out = load(&[&lines(&[turned, row(2), row(4), row(2), row(3)])], &options()).unwrap().pairs;
    assert_eq!(trained_on(&held_out, &train), 3);
    assert_eq!(trained_on(&held_out[..1], &train), 0);
    assert_eq!(trained_on(&[], &train), 0);
}

#[test]
fn errors_name_file_and_line() {
    let good = r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#;
    let chat = r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant"}]}"#;
    let then = |bad: &str| format!("{good}\n\n{bad}\n{good}\n");
    for (text, says) in [
        (then("{\"prompt\": \"p\", "), "0.jsonl:3: not a JSON object"),
        (then("3"), "0.jsonl:3: not a JSON object"),
        (then("{\"prompt\": \"p\", \"chosen\": \"c\"}"), "0.jsonl:3: `rejected` is missing"),
        (then("{\"chosen\": \"c\", \"rejected\": \"r\"}"), "0.jsonl:3: `prompt` is missing"),
        (format!("[\n{good},\n{good}\n]"), "0.jsonl:1: a JSON list"),
        ("{}".to_owned(), "0.jsonl:1: expected `chosen` and `rejected`"),
        (format!("{}\n", &"[".repeat(10_000)), "0.jsonl:1: "),
        (format!("{{\"prompt\": {}", "[".repeat(10_000)), "0.jsonl:1: not a JSON object: recursion"),
        (String::new(), "no usable row (0 rows read, 0 used)"),
        (r#"{"prompt": "p", "chosen": "c", "rejected": "c"}"#.to_owned(), "1 refused (both answers are the same: "),
    ] {
        let error = load(&[&text], &options()).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(says), "{error}");
    }
    let tokenizer = tokenizer("plain");
    let without = Dataset::load(&files(&[chat]).1, &tokenizer, None, &options()).unwrap_err();
    assert!(without.to_string().contains("0.jsonl:1: messages need a chat template"), "{without}");
    let strict = ChatTemplate::compile("strict.jinja", "\n{{ raise_exception('no') }}", &tokenizer).unwrap();
    let refused = Dataset::load(
        &files(&[&chat.replace("[{\"role\": \"assistant\"}]", "[{\"role\": \"assistant\", \"content\": \"c\"}]")]).1,
        &tokenizer,
        Some(&strict),
        &options(),
    );
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("0.jsonl:1: strict.jinja:2: chat template: the template refuses"), "{refused}");
}
