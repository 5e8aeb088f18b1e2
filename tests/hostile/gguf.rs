//! GGUF: what ggml's own reader refuses, and lies about sizes.

use crate::{Case, case};

/// A file under construction, each part as the format lays it out.
#[derive(Clone)]
struct Gguf {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    counts: Option<(u64, u64)>,
    data: usize,
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name.as_bytes())[..], &kind.to_le_bytes(), value].concat()
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Gguf {
    /// One key that names an architecture, no tensor.
    fn new() -> Self {
        let keys = vec![key("general.architecture", 8, &text(b"llama"))];
        Self { version: 3, keys, tensors: Vec::new(), counts: None, data: 0 }
    }

    fn key(mut self, name: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.push(key(name, kind, value));
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push(tensor(name, dims, kind, offset));
        self
    }

    fn counts(mut self, tensors: u64, keys: u64) -> Self {
        self.counts = Some((tensors, keys));
        self
    }

    fn data(mut self, bytes: usize) -> Self {
        self.data = bytes;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [&b"GGUF"[..], &self.version.to_le_bytes()].concat();
        let (tensors, keys) = self.counts.unwrap_or((self.tensors.len() as u64, self.keys.len() as u64));
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        self.keys.iter().chain(&self.tensors).for_each(|part| bytes.extend(part));
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
        }
        bytes.resize(bytes.len() + self.data, 0);
        bytes
    }
}

pub fn headers() -> Vec<Case> {
    const CUT: &[&str] = &["the file is cut short", "fetch the file again"];
    let version = |version: u32| Gguf { version, ..Gguf::new() }.bytes();
    let list = |kind: u32, count: u64, rest: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat();
    let alignment = |kind, value: &[u8]| Gguf::new().key("general.alignment", kind, value).bytes();
    let whole = Gguf::new().tensor("token_embd.weight", &[32, 2], 0, 0).data(256).bytes();
    let named = |name: &str| Gguf::new().tensor(name, &[32], 0, 0).data(128).bytes();
    vec![
        case("nothing", "", &["model.gguf: it is empty; fetch the file again"]),
        case("a magic alone", "GGUF", CUT),
        case("another magic", b"GGML\x03\0\0\0".to_vec(), &["it does not begin with GGUF"]),
        case("a web page", "<html></html>", &["it does not begin with GGUF"]),
        case("a pickle", b"\x80\x04\x95\0\0\0\0.".to_vec(), &["it does not begin with GGUF"]),
        case("version 0", version(0), &["it is of version 0; 2 and 3 are read"]),
        case("version 1", version(1), &["it is of version 1"]),
        case("version 4", version(4), &["it is of version 4"]),
        case("version 2^32 - 1", version(u32::MAX), &["it is of version 4294967295"]),
        case("the other byte order", version(3 << 24), &["it is big-endian"]),
        case("2^64 - 1 tensors", Gguf::new().counts(u64::MAX, 1).bytes(), &["it claims 18446744073709551615 tensors"]),
        case("2^64 - 1 keys", Gguf::new().counts(0, u64::MAX).bytes(), &["it claims 18446744073709551615 keys"]),
        case("a million tensors", Gguf::new().counts(1 << 20, 1).bytes(), &["it claims 1048576 tensors"]),
        case("a key more than there is", Gguf::new().counts(0, 2).bytes(), CUT),
        case(
            "a key twice",
            Gguf::new().key("a", 4, &[0; 4]).key("a", 4, &[0; 4]).bytes(),
            &["the key \"a\" stands twice"],
        ),
        case("a key without a name", Gguf::new().key("", 4, &[0; 4]).bytes(), &["no proper name"]),
        case(
            "a key of 70,000 bytes",
            Gguf::new().key(&"k".repeat(70_000), 4, &[0; 4]).bytes(),
            &["no proper name of at most 65535"],
        ),
        case("a key that is a command", Gguf::new().key("\x1b[2J", 4, &[0; 4]).bytes(), &["no proper name"]),
        case("an unknown type", Gguf::new().key("a", 13, &[0; 16]).bytes(), &["key \"a\" has the unknown type 13"]),
        case("a bool of 2", Gguf::new().key("a", 7, &[2; 8]).bytes(), &["neither 0 nor 1"]),
        case("bools of 2", Gguf::new().key("a", 9, &list(7, 2, &[1, 2])).bytes(), &["neither 0 nor 1"]),
        case("a text past the end", Gguf::new().key("a", 8, &u64::MAX.to_le_bytes()).bytes(), CUT),
        case("a text that is none", Gguf::new().key("a", 8, &text(b"\xff\xfe")).bytes(), &["is not UTF-8"]),
        case("a list of lists", Gguf::new().key("a", 9, &list(9, 1, &[0; 16])).bytes(), &["is a list of lists"]),
        case("2^64 - 1 numbers", Gguf::new().key("a", 9, &list(4, u64::MAX, &[])).bytes(), CUT),
        case("2^62 numbers of 4 bytes", Gguf::new().key("a", 9, &list(4, 1 << 62, &[])).bytes(), CUT),
        case(
            "2^60 texts",
            Gguf::new().key("a", 9, &list(8, 1 << 60, &[0; 64])).bytes(),
            &["claims 1152921504606846976 texts"],
        ),
        case(
            "an unknown type in a list",
            Gguf::new().key("a", 9, &list(99, 1, &[0; 16])).bytes(),
            &["the unknown type 99"],
        ),
        case("alignment 0", alignment(4, &[0; 4]), &["general.alignment is not a power of two"]),
        case("alignment 33", alignment(4, &33u32.to_le_bytes()), &["general.alignment is not a power of two"]),
        case("alignment 32 as a u64", alignment(10, &32u64.to_le_bytes()), &["general.alignment is not a u32"]),
        case("alignment 32 as a u8", alignment(0, &[32]), &["general.alignment is not a u32"]),
        case("alignment 2^63", alignment(10, &(1u64 << 63).to_le_bytes()), &["general.alignment is not"]),
        case("alignment as a text", alignment(8, &text(b"32")), &["general.alignment is not"]),
        case("alignment below 0", alignment(5, &(-32i32).to_le_bytes()), &["general.alignment is not"]),
        case("cut in the data", &whole[..whole.len() - 1], &["reaches beyond the file's", "cut short"]),
        case("cut in the description", &whole[..70], CUT),
        case("a tensor without a name", named(""), &["no proper name"]),
        case("a tensor's name of 64 bytes", named(&"n".repeat(64)), &["no proper name of at most 63"]),
        case("a tensor's name that is a command", named("a\x1b[2J"), &["no proper name"]),
        case("a tensor of another model", named("../../etc/passwd"), &["model.gguf: tensor \"../../etc/passwd\""])
            .or_config(),
    ]
}

impl Case {
    /// What the metadata lacks may be said before.
    fn or_config(mut self) -> Self {
        self.says = &["model.gguf: "];
        self
    }
}

pub fn tensors() -> Vec<Case> {
    let one = |dims: &[u64], kind: u32, offset: u64| {
        Gguf::new().tensor("token_embd.weight", dims, kind, offset).data(4096).bytes()
    };
    let two = |second: u64| {
        let first = Gguf::new().tensor("a", &[32], 0, 0);
        first.tensor("b", &[32], 0, second).data(4096).bytes()
    };
    const DIMS: &[&str] = &["has the impossible dimensions"];
    let set = |name: &str, kind: u32, value: &[u8]| Gguf::new().key(name, kind, value).bytes();
    let mut cases = vec![
        case("no dimension", one(&[], 0, 0), &["has 0 dimensions; 1 to 4"]),
        case("five dimensions", one(&[1; 5], 0, 0), &["has 5 dimensions; 1 to 4"]),
        case("a dimension of 0", one(&[32, 0], 0, 0), DIMS),
        case("2^33 by 2^33", one(&[1 << 33, 1 << 33], 0, 0), DIMS),
        case("2^63", one(&[1 << 63], 0, 0), DIMS),
        case("2^64 - 1 four times", one(&[u64::MAX; 4], 0, 0), DIMS),
        case("elements that fit, bytes that do not", one(&[1 << 61], 0, 0), DIMS),
        case("a terabyte in a small file", one(&[1 << 38], 0, 0), &["reaches beyond the file's"]),
        case("an unknown format", one(&[32], 999, 0), &["has the unknown type 999"]),
        case("a format that was taken back", one(&[32], 4, 0), &["has the unknown type 4"]),
        case("rows that are no whole blocks", one(&[33], 2, 0), &["are not in whole blocks of 32"]),
        case("rows of 32 in blocks of 256", one(&[32], 12, 0), &["are not in whole blocks of 256"]),
        case("an offset that is not due", one(&[32], 0, 32), &["has the offset 32 where 0 is due"]),
        case("an offset that is not aligned", two(129), &["tensor \"b\" has the offset 129 where 128 is due"]),
        case("an overlap", two(0), &["tensor \"b\" has the offset 0 where 128 is due"]),
        case("a gap", two(256), &["tensor \"b\" has the offset 256 where 128 is due"]),
        case(
            "offsets by another alignment than the file's",
            Gguf::new()
                .key("general.alignment", 4, &64u32.to_le_bytes())
                .tensor("a", &[8], 0, 0)
                .tensor("b", &[8], 0, 32)
                .data(4096)
                .bytes(),
            &["tensor \"b\" has the offset 32 where 64 is due"],
        ),
        case("a dimension below 0", one(&[32, (-1i64).cast_unsigned()], 0, 0), DIMS),
        case("an offset of 2^64 - 1", two(u64::MAX), &["where 128 is due"]),
        case(
            "a tensor twice",
            Gguf::new().tensor("a", &[32], 0, 0).tensor("a", &[32], 0, 128).data(256).bytes(),
            &["the tensor \"a\" stands twice"],
        ),
        case(
            "an unknown architecture",
            Gguf { keys: vec![key("general.architecture", 8, &text(b"evil"))], ..Gguf::new() }.bytes(),
            &["\"evil\" is not read from GGUF"],
        ),
        case(
            "no architecture",
            Gguf { keys: vec![key("a", 4, &[0; 4])], ..Gguf::new() }.bytes(),
            &["general.architecture: it is missing"],
        ),
        case(
            "an architecture that is a number",
            Gguf { keys: vec![key("general.architecture", 4, &[0; 4])], ..Gguf::new() }.bytes(),
            &["general.architecture: it is not a text"],
        ),
        case("an adapter", set("general.type", 8, &text(b"adapter")), &["it holds a \"adapter\", not a model"]),
        case("one part of several", set("split.count", 2, &2u16.to_le_bytes()), &["it is one part of several"]),
        case("nothing but an architecture", Gguf::new().bytes(), &["it is missing"]),
    ];
    for (name, kind, value) in [
        ("llama.embedding_length", 8, text(b"64")),
        ("llama.embedding_length", 5, (-1i32).to_le_bytes().to_vec()),
        ("llama.attention.head_count", 6, 1f32.to_le_bytes().to_vec()),
        ("llama.context_length", 7, vec![1]),
        ("llama.block_count", 9, list_of_one()),
        ("general.type", 4, vec![0; 4]),
        ("split.count", 8, text(b"2")),
        ("llama.expert_count", 4, 8u32.to_le_bytes().to_vec()),
    ] {
        cases.push(case("a value of another kind", set(name, kind, &value), &["model.gguf: "]));
    }
    cases
}

fn list_of_one() -> Vec<u8> {
    [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0; 4]].concat()
}
