//! Rows, plain and packed.

use std::io::Write as _;

use crate::openers::gzip;
use crate::{Case, case};

fn row(prompt: &str, chosen: &str, rejected: &str) -> String {
    format!("{{\"prompt\": {prompt}, \"chosen\": {chosen}, \"rejected\": {rejected}}}")
}

/// One good row and then this line.
fn second(line: &str) -> String {
    format!("{}\n{line}\n", row("\"a\"", "\"b\"", "\"c\""))
}

pub fn lines() -> Vec<Case> {
    let messages = |prompt: &str| {
        row(
            prompt,
            "[{\"role\": \"assistant\", \"content\": \"b\"}]",
            "[{\"role\": \"assistant\", \"content\": \"c\"}]",
        )
    };
    let mut cases: Vec<Case> = vec![
        case("nothing", "", &["rows.jsonl: no usable row (0 rows read"]),
        case("blank lines", "\n\n \t\r\n", &["no usable row (0 rows read"]),
        case("a million blank lines", "\n".repeat(1 << 20), &["no usable row"]),
        case(
            "a row cut short",
            second("{\"prompt\": \"a\", "),
            &["rows.jsonl:2: not a JSON object", "mend or remove this one"],
        ),
        case("two rows in a line", second("{}{}"), &["rows.jsonl:2: not a JSON object: trailing"]),
        case("a number", second("3"), &["rows.jsonl:2: not a JSON object"]),
        case("null", second("null"), &["rows.jsonl:2: not a JSON object"]),
        case("a list of rows", "[\n{}\n]", &["rows.jsonl:1: a JSON list; rows are one JSON object a line"]),
        case("a table", "prompt,chosen,rejected\na,b,c\n", &["rows.jsonl:1: not a JSON object"]),
        case("single quotes", "{'prompt': 'a'}", &["rows.jsonl:1: not a JSON object: key must be a string"]),
        case("no UTF-8", b"{\"prompt\": \"\xff\"}".to_vec(), &["rows.jsonl:1: not UTF-8 text; save the file as UTF-8"]),
        case("UTF-16", b"\xff\xfe{\0}\0".to_vec(), &["rows.jsonl:1: not UTF-8"]),
        case("Parquet", b"PAR1\x15\0\xff\xfe".to_vec(), &["rows.jsonl: cannot be read: it is a Parquet file"]),
        case("zeros", vec![0; 1 << 16], &["rows.jsonl:1: not a JSON object"]),
        case("a line of 17 MiB", vec![b'x'; 17 << 20], &["rows.jsonl:1: a line of more than 16777216 bytes"]),
        case("a line of 17 MiB of blanks", vec![b' '; 17 << 20], &["rows.jsonl:1: a line of more than"]),
        case(
            "depth of lists",
            second(&format!("{{\"prompt\": {}", "[".repeat(1 << 20))),
            &["rows.jsonl:2: not a JSON object: "],
        ),
        case(
            "depth of 200",
            second(&format!("{{\"prompt\": {}", "[".repeat(200))),
            &["rows.jsonl:2: ", "recursion limit"],
        ),
        case("depth of objects", second(&"{\"a\":".repeat(1000)), &["recursion limit"]),
        case(
            "5 million values",
            second(&format!("{{\"x\": [{}0]}}", "0,".repeat(5_000_000))),
            &["rows.jsonl:2: ", "values, and 300000 at most"],
        ),
        case(
            "half a surrogate pair",
            second(&row("\"\\ud800\"", "\"b\"", "\"c\"")),
            &["rows.jsonl:2: not a JSON object"],
        ),
        case("half a pair the other way", second(&row("\"\\udc00\"", "\"b\"", "\"c\"")), &["rows.jsonl:2: "]),
        case(
            "a raw control character",
            second(&row("\"\x1b[2J\"", "\"b\"", "\"c\"")),
            &["rows.jsonl:2: ", "control character"],
        ),
        case("no field", "{}", &["rows.jsonl:1: expected `chosen` and `rejected`"]),
        case("other fields", "{\"question\": \"a\", \"answer\": \"b\"}", &["expected `chosen` and `rejected`"]),
        case(
            "answers of two kinds",
            row("\"a\"", "\"b\"", "[]"),
            &["expected `chosen` and `rejected`, both text or both"],
        ),
        case(
            "a number for an answer",
            second(&row("\"a\"", "7", "\"c\"")),
            &["rows.jsonl:2: `chosen` must be text, not a number"],
        ),
        case("an object for an answer", second(&row("\"a\"", "{}", "\"c\"")), &["rows.jsonl:2: `chosen` must be text"]),
        case(
            "an answer missing",
            second("{\"prompt\": \"a\", \"chosen\": \"b\"}"),
            &["rows.jsonl:2: `rejected` is missing"],
        ),
        case("equal answers", row("\"a\"", "\"b\"", "\"b\""), &["no usable row", "both answers are the same"]),
        case("empty answers", row("\"a\"", "\"\"", "\" \\n\""), &["no usable row", "an answer is empty"]),
        case("an empty prompt", row("\"\"", "\"b\"", "\"c\""), &["no usable row", "the prompt is empty"]),
        case(
            "a prompt past max_length",
            row(&format!("\"{}\"", "a b ".repeat(9999)), "\"b\"", "\"c\""),
            &["over max_length"],
        ),
        case(
            "a message without a role",
            messages("[{\"content\": \"a\"}]"),
            &["`prompt[0]` must be an object with a text `role`"],
        ),
        case("a message that is a number", messages("[3]"), &["rows.jsonl:1: `prompt[0]`"]),
        case("a role that is a list", messages("[{\"role\": [], \"content\": \"a\"}]"), &["`prompt[0]`"]),
        case(
            "a content that is a number",
            messages("[{\"role\": \"user\", \"content\": 3}]"),
            &["`prompt[0].content` must be text"],
        ),
        case("messages in messages", messages("[[{\"role\": \"user\", \"content\": \"a\"}]]"), &["`prompt[0]`"]),
    ];
    cases.push(case("a bad row after 3000 good ones", second("{}").repeat(1500), &["rows.jsonl:2: `"]));
    cases
}

/// `unit` so many times, packed.
fn bomb(unit: &[u8], times: usize) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let block = unit.repeat((1 << 16) / unit.len());
    for _ in 0..times * unit.len() / block.len() {
        encoder.write_all(&block).unwrap();
    }
    encoder.finish().unwrap()
}

pub fn packed() -> Vec<Case> {
    const BOMB: &[&str] = &["it unpacks to more than 100 times its size", "gunzip"];
    let good = second(&row("\"a\"", "\"d\"", "\"e\"")).into_bytes();
    let whole = gzip(&good.repeat(200));
    let line = row("\"a\"", "\"b\"", "\"b\"") + "\n";
    let cut = |n: usize| whole[..n].to_vec();
    let flip = |at: usize| {
        let mut bytes = whole.clone();
        let at = if at < 1000 { at } else { bytes.len() - (at - 1000) };
        bytes[at] ^= 0x55;
        bytes
    };
    const READ: &[&str] = &["rows.jsonl.gz:", "cannot be read on", "fetch or pack the file again"];
    let stored = |length: u16, check: u16| {
        let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
        bytes.extend(length.to_le_bytes());
        bytes.extend(check.to_le_bytes());
        bytes
    };
    let head = |flags: u8| vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255];
    vec![
        case("200 MiB of blank lines", bomb(b"\n", 200 << 20), BOMB),
        case("200 MiB of blanks", bomb(b" ", 200 << 20), &["a line of more than 16777216 bytes"]),
        case("200 MiB of zeros", bomb(b"\0", 200 << 20), &["a line of more than"]),
        case("200 MiB of one row", bomb(line.as_bytes(), 4_000_000), BOMB),
        case("200 MiB of empty objects", bomb(b"{}\n", 70 << 20), &["rows.jsonl.gz:1: expected `chosen`"]),
        case("a bomb after a good member", [gzip(&good), bomb(b"\n", 200 << 20)].concat(), BOMB),
        case("many members of blank lines", bomb(b"\n", 1 << 20).repeat(100), BOMB),
        case("a bomb in a bomb", gzip(&bomb(b"\n", 200 << 20)), &["not UTF-8"]),
        case("nothing in it", gzip(b""), &["no usable row (0 rows read"]),
        case("two bytes", cut(2), READ),
        case("half a head", cut(6), READ),
        case("a head alone", cut(10), READ),
        case("cut in the data", cut(whole.len() / 2), READ),
        case("cut in the sum", cut(whole.len() - 6), READ),
        case("cut by one byte", cut(whole.len() - 1), READ),
        case("another method", flip(2), READ),
        case("reserved flags", flip(3), READ),
        case("a changed first block", flip(11), READ),
        case("a changed byte", flip(40), READ),
        case("a changed sum", flip(1005), READ),
        case("a changed length", flip(1001), READ),
        case("a stored block that lies", stored(5, 5), READ),
        case("a stored block without data", stored(9, !9), READ),
        case("a reserved block", [head(0), vec![7, 0, 0]].concat(), READ),
        case("a name without end", [head(8), vec![b'x'; 1 << 20]].concat(), READ),
        case("a comment without end", [head(16), vec![b'x'; 1 << 20]].concat(), READ),
        case("an extra field past the end", [head(4), vec![0xff; 3]].concat(), READ),
        case("a distance before the start", [head(0), vec![0x4b, 0x04, 0x23, 0x0c]].concat(), READ),
        case("bytes after the last member", [&whole[..], b"rubbish"].concat(), READ),
        case("a member cut short after a whole one", [&whole[..], &whole[..30]].concat(), READ),
        case("a bad row", gzip(b"{}\n"), &["rows.jsonl.gz:1: expected `chosen`"]),
        case("a bad row further down", gzip(&[&good[..], b"{"].concat()), &["rows.jsonl.gz:3: not a JSON object"]),
        case("no UTF-8", gzip(b"\xff"), &["rows.jsonl.gz:1: not UTF-8"]),
    ]
}
