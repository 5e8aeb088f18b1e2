//! A model's folder: the index against its shards, and what may stand in the weights' place.

use std::fs;

use crate::openers::{Bench, Kind, safetensors};
use crate::{Case, alone, case, fault};

/// An index with these entries in its `weight_map`.
fn map(entries: &str) -> String {
    format!("{{\"metadata\": {{}}, \"weight_map\": {{{entries}}}}}")
}

/// The right entries but for `c`, which is said to be here.
fn elsewhere(shard: &str) -> String {
    map(&format!("\"a\": \"one.safetensors\", \"b\": \"one.safetensors\", \"c\": {shard}"))
}

pub fn indexes() -> Vec<Case> {
    const NO_FILE: &[&str] = &["model.safetensors.index.json: ", "is not the name of a file in this folder", "fetch"];
    let many: Vec<String> = (0..200_000).map(|i| format!("\"{i}\": \"one.safetensors\"")).collect();
    let mut cases: Vec<Case> = vec![
        case("nothing", "", &["model.safetensors.index.json: EOF", "fetch the model's files again"]),
        case("a list", "[]", &["fetch the model's files again"]),
        case("no map", "{}", &["missing field `weight_map`"]),
        case("a map that is null", "{\"weight_map\": null}", &["invalid type: null"]),
        case("a map that is a list", "{\"weight_map\": []}", &["invalid type: sequence"]),
        case("an empty map", map(""), &["it names no tensor"]),
        case("a number for a file", elsewhere("3"), &["invalid type: integer `3`"]),
        case("a list for a file", elsewhere("[\"two.safetensors\"]"), &["invalid type: sequence"]),
        case("two maps", "{\"weight_map\": {}, \"weight_map\": {}}", &["duplicate field"]),
        case("a tensor twice", elsewhere("\"two.safetensors\", \"c\": \"one.safetensors\""), &["\"c\" stands twice"]),
        case(
            "a tensor twice, once escaped",
            elsewhere("\"two.safetensors\", \"\\u0063\": \"x\""),
            &["\"c\" stands twice"],
        ),
        case("depth", format!("{{\"metadata\": {}", "[".repeat(200_000)), &["index.json: EOF while parsing"]),
        case("400,000 values", format!("{{\"metadata\": [{}0]}}", "0,".repeat(400_000)), &["400003 values"]),
        case("200,000 tensors that are not there", map(&many.join(",")), &["\"0\" is not in \"one.safetensors\""]),
        case("a file of 65 MiB", vec![b' '; 65 << 20], &["68157440 bytes, and no such file has more"]),
        case(
            "a shard that is not there",
            elsewhere("\"three.safetensors\""),
            &["\"three.safetensors\" that it names is missing"],
        ),
        case("the wrong shard", elsewhere("\"one.safetensors\""), &["tensor \"c\" is not in \"one.safetensors\""]),
        case("a tensor too many", elsewhere("\"two.safetensors\", \"d\": \"two.safetensors\""), &["\"d\" is not in"]),
        case(
            "a tensor too few",
            map("\"a\": \"one.safetensors\", \"c\": \"two.safetensors\""),
            &["\"b\" of \"one.safetensors\" is not in the index"],
        ),
        case(
            "a shard too few",
            map("\"a\": \"one.safetensors\", \"b\": \"one.safetensors\", \"d\": \"one.safetensors\""),
            &["\"d\" is not in"],
        ),
    ];
    for name in [
        "",
        ".",
        "..",
        "../two.safetensors",
        "/etc/passwd",
        "a/../../x",
        "a/b.safetensors",
        "./two.safetensors",
        "C:\\\\x.safetensors",
        "C:x.safetensors",
        "..\\\\x",
        "\\\\\\\\host\\\\share\\\\x",
        "//host/share/x",
        "two.safetensors/",
        "two.safetensors\\u0000",
        "two.safetensors:stream",
        "CON",
        "nul.safetensors",
        "aux",
        "COM1.safetensors",
        "two\\n.safetensors",
        "two.safetensors.",
        "two.safetensors ",
    ] {
        cases.push(case("a name that leads elsewhere", elsewhere(&format!("\"{name}\"")), NO_FILE));
    }
    cases
}

/// What is spoilt, how, and what the message must say.
type Spoilt<'a> = (&'a str, fn(&Bench), &'a [&'a str]);

/// Puts what `spoil` says into the bench's sharded folder and opens it.
#[track_caller]
fn spoilt(cases: &[Spoilt]) {
    let _alone = alone();
    let mut wrong = Vec::new();
    for (what, spoil, says) in cases {
        let bench = Bench::new();
        spoil(&bench);
        let outcome = dpo_lora::weights::ModelFolder::open(&bench.path("sharded")).map(drop);
        wrong.extend(fault(&bench, Kind::Index, outcome, says).map(|why| format!("{what}: {why}")));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn write(bench: &Bench, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(bench.path("sharded").join(name), bytes).unwrap();
}

fn remove(bench: &Bench, name: &str) {
    fs::remove_file(bench.path("sharded").join(name)).unwrap();
}

/// The folder with this one file in place of index and shards.
fn single(bench: &Bench, name: &str) {
    for name in ["one.safetensors", "two.safetensors", "model.safetensors.index.json"] {
        remove(bench, name);
    }
    write(bench, name, "x");
}

#[test]
fn shards() {
    const PICKLE: &[&str] = &["is a pickle, which can run code when it is read and is refused", "save_pretrained"];
    spoilt(&[
        (
            "one tensor in two shards",
            |b| write(b, "two.safetensors", safetensors(&[("a", "F32", &[1]), ("c", "F16", &[5])])),
            &["tensor \"a\" stands in both \"one.safetensors\" and \"two.safetensors\""],
        ),
        (
            "a shard of another model",
            |b| write(b, "two.safetensors", safetensors(&[("x", "F32", &[1])])),
            &["tensor \"c\" is not in \"two.safetensors\""],
        ),
        (
            "a shard with a tensor more",
            |b| write(b, "two.safetensors", safetensors(&[("c", "F16", &[5]), ("x", "F32", &[1])])),
            &["tensor \"x\" of \"two.safetensors\" is not in the index"],
        ),
        ("an empty shard", |b| write(b, "two.safetensors", ""), &["two.safetensors: it holds 0 bytes"]),
        (
            "a shard cut short",
            |b| {
                let bytes = safetensors(&[("c", "F16", &[5])]);
                write(b, "two.safetensors", &bytes[..bytes.len() - 2])
            },
            &["two.safetensors: tensor \"c\"", "do not lie within"],
        ),
        (
            "a shard that is a folder",
            |b| {
                remove(b, "two.safetensors");
                fs::create_dir(b.path("sharded/two.safetensors")).unwrap()
            },
            &["two.safetensors: not a regular file"],
        ),
        (
            "weights that are a folder",
            |b| fs::create_dir(b.path("sharded/model.safetensors")).unwrap(),
            &["model.safetensors: not a regular file"],
        ),
        (
            "an index that is a folder",
            |b| {
                remove(b, "model.safetensors.index.json");
                fs::create_dir(b.path("sharded/model.safetensors.index.json")).unwrap()
            },
            &["index.json: not a regular file"],
        ),
        (
            "a config that is a folder",
            |b| fs::create_dir(b.path("sharded/config.json")).unwrap(),
            &["config.json: not a regular file"],
        ),
        ("a PyTorch file", |b| single(b, "pytorch_model.bin"), PICKLE),
        ("PyTorch files in parts", |b| single(b, "pytorch_model-00001-of-00002.bin"), PICKLE),
        ("a .pt", |b| single(b, "model.pt"), PICKLE),
        ("a .pth", |b| single(b, "consolidated.00.pth"), PICKLE),
        ("a .ckpt", |b| single(b, "model.ckpt"), PICKLE),
        ("a .pkl", |b| single(b, "model.pkl"), PICKLE),
        ("a .pickle", |b| single(b, "model.pickle"), PICKLE),
        ("capitals", |b| single(b, "MODEL.BIN"), PICKLE),
        ("a numpy archive", |b| single(b, "weights.npz"), &["neither model.safetensors nor"]),
        ("an ONNX file", |b| single(b, "model.onnx"), &["neither model.safetensors nor"]),
        ("notes", |b| single(b, "notes.txt"), &["there are no weights here"]),
        ("an adapter", |b| single(b, "adapter_config.json"), &["holds an adapter, not a model; name its base"]),
        ("a shard without an index", |b| single(b, "model-00001-of-00002.safetensors"), &["download the missing file"]),
        ("a hidden one", |b| single(b, ".safetensors"), &["neither model.safetensors nor"]),
    ]);
}

#[cfg(unix)]
#[test]
fn links_and_pipes() {
    use std::os::unix::fs::symlink;
    fn linked(bench: &Bench, name: &str, to: &str) {
        let file = bench.path("sharded").join(name);
        let _ = fs::remove_file(&file);
        symlink(to, file).unwrap();
    }
    spoilt(&[
        (
            "weights without end",
            |b| linked(b, "model.safetensors", "/dev/zero"),
            &["model.safetensors: not a regular file"],
        ),
        (
            "a shard without end",
            |b| linked(b, "two.safetensors", "/dev/zero"),
            &["two.safetensors: not a regular file"],
        ),
        ("an index without end", |b| linked(b, "model.safetensors.index.json", "/dev/zero"), &["not a regular file"]),
        ("a config without end", |b| linked(b, "config.json", "/dev/zero"), &["config.json: not a regular file"]),
        ("a link to itself", |b| linked(b, "two.safetensors", "two.safetensors"), &["two.safetensors"]),
        ("a link to nothing", |b| linked(b, "two.safetensors", "nowhere"), &["two.safetensors"]),
        (
            "a pipe",
            |b| {
                remove(b, "two.safetensors");
                pipe(b, "sharded/two.safetensors")
            },
            &["two.safetensors: not a regular file"],
        ),
        ("a pipe for a config", |b| pipe(b, "sharded/config.json"), &["config.json: not a regular file"]),
    ]);
}

/// A named pipe that nobody writes to: opening it would wait for ever.
#[cfg(unix)]
fn pipe(bench: &Bench, name: &str) {
    assert!(std::process::Command::new("mkfifo").arg(bench.path(name)).status().unwrap().success());
}
