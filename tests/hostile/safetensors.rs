//! Weights.

use crate::openers::{safetensors, with_header};
use crate::{Case, case};

const FETCH: &str = "fetch the file again";

fn tensor(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}")
}

/// One tensor `a` of 8 bytes, or as the arguments say.
fn one(dtype: &str, shape: &str, offsets: &str) -> Vec<u8> {
    with_header(&format!("{{{}}}", tensor("a", dtype, shape, offsets)), 8)
}

fn two(first: [&str; 2], second: [&str; 2], data: usize) -> Vec<u8> {
    let of = |name, [shape, offsets]: [&str; 2]| tensor(name, "F32", shape, offsets);
    with_header(&format!("{{{},{}}}", of("a", first), of("b", second)), data)
}

fn named(name: &str) -> Vec<u8> {
    with_header(&format!("{{{}}}", tensor(name, "F32", "[2]", "[0,8]")), 8)
}

fn claiming(length: u64, rest: usize) -> Vec<u8> {
    [length.to_le_bytes().to_vec(), vec![b' '; rest]].concat()
}

pub fn lengths() -> Vec<Case> {
    let whole = safetensors(&[("a", "F32", &[2])]);
    let entries: Vec<String> = (0..300_000).map(|i| tensor(&i.to_string(), "U8", "[0]", "[0,0]")).collect();
    let many = with_header(&format!("{{{}}}", entries.join(",")), 0);
    vec![
        case("nothing", "", &["it holds 0 bytes", "download it again"]),
        case("seven bytes", &whole[..7], &["it holds 7 bytes"]),
        case("a length alone", &whole[..8], &["cut short", FETCH]),
        case("cut in the header", &whole[..20], &["cut short", FETCH]),
        case("cut in the data", &whole[..whole.len() - 1], &["do not lie within the 7 bytes", FETCH]),
        case("a length of all ones", claiming(u64::MAX, 100), &["claims 18446744073709551615 bytes", FETCH]),
        case("a length of 2^63", claiming(1 << 63, 100), &["claims 9223372036854775808 bytes"]),
        case("a length beyond any", claiming((16 << 20) + 1, 100), &["claims 16777217 bytes"]),
        case("a length of all that follows and one", claiming(101, 100), &["claims 101 bytes of 100"]),
        case("a length of 0", claiming(0, 100), &["its header is not as it should be"]),
        case("a length too short by one", [&[whole[0] - 1], &whole[1..]].concat(), &["its header is not"]),
        case("a length too long by one", [&[whole[0] + 1], &whole[1..]].concat(), &["its header is not"]),
        case("blanks", claiming(100, 100), &["its header is not as it should be: EOF"]),
        case("zeros", vec![0; 64], &["its header is not as it should be"]),
        case("bytes after the last tensor", [&whole[..], &[0; 3]].concat(), &["3 bytes after the last tensor"]),
        case("data and no tensor", with_header("{}", 4), &["4 bytes after the last tensor belong to none"]),
        case("300,000 tensors", many, &["its header claims", "over the 16777216 of any"]),
        case(
            "250,000 tensors and one too many",
            with_header(&format!("{{{},{}}}", entries[..250_000].join(","), tensor("", "U8", "[0]", "[0,0]")), 0),
            &["tensor \"\" has no proper name"],
        ),
        case("a pickle", &b"\x80\x02}q\0."[..], &["it holds 6 bytes"]),
        case("a pickle in full", [&b"\x80\x04\x95"[..], &[0; 60]].concat(), &["it is a pickle", "save_pretrained"]),
        case("a zip of pickles", [&b"PK\x03\x04"[..], &[0; 60]].concat(), &["it is a pickle", "refused"]),
        case("GGUF", [&b"GGUF\x03\0\0\0"[..], &[0; 60]].concat(), &["it is GGUF", ".gguf"]),
        case(
            "a pointer of git-lfs",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            &["git-lfs", "git lfs pull"],
        ),
        case("a web page", "<!DOCTYPE html><html><body>404</body></html>", &["it is a web page"]),
        case("text", "weights weights weights", &["its header claims", "is it safetensors?"]),
        case("no UTF-8", with_header("{\"a\u{ff}", 0).replace_last(0xff), &["its header is not UTF-8"]),
        case("no JSON", with_header("{a: 1}", 0), &["its header is not as it should be: key must be"]),
        case("JSON cut short", with_header("{\"a\":{", 0), &["EOF while parsing"]),
        case("a list", with_header("[]", 0), &["an object of tensors"]),
        case("a number", with_header("3", 0), &["an object of tensors"]),
        case("null", with_header("null", 0), &["an object of tensors"]),
        case("two objects", with_header("{}{}", 0), &["trailing characters"]),
        case("depth", with_header(&"[".repeat(1 << 20), 0), &["an object of tensors"]),
        case("depth in a shape", one("F32", &"[".repeat(100_000), "[0,8]"), &["its header is not"]),
        case(
            "depth in the metadata",
            with_header(&format!("{{\"__metadata__\":{{\"a\":{}", "[".repeat(100_000)), 0),
            &["its header is not as it should be: invalid type: sequence"],
        ),
    ]
}

pub fn layouts() -> Vec<Case> {
    let long = format!("[{}1]", "1,".repeat(4 << 20));
    vec![
        case("offsets past the end", one("F32", "[2]", "[0,9]"), &["tensor \"a\": offsets 0..9 do not lie within"]),
        case("offsets turned round", one("F32", "[2]", "[8,0]"), &["offsets 8..0 do not lie within"]),
        case("offsets past 2^63", one("F32", "[2]", "[18446744073709551608,18446744073709551615]"), &["do not lie"]),
        case("offsets below 0", one("F32", "[2]", "[-8,0]"), &["invalid value: integer `-8`"]),
        case("offsets in fractions", one("F32", "[2]", "[0.0,8.0]"), &["invalid type: floating point"]),
        case("three offsets", one("F32", "[2]", "[0,8,8]"), &["its header is not as it should be"]),
        case("one offset", one("F32", "[2]", "[0]"), &["invalid length 1"]),
        case("offsets as a text", one("F32", "[2]", "\"0,8\""), &["invalid type: string"]),
        case("a shape too small", one("F32", "[1]", "[0,8]"), &["F32 of shape [1] does not fill its 8 bytes"]),
        case("a shape too large", one("F32", "[3]", "[0,8]"), &["does not fill its 8 bytes"]),
        case("a shape past 2^64", one("F32", "[4294967296,4294967296]", "[0,0]"), &["does not fill its 0 bytes"]),
        case("a shape that wraps to 8", one("F32", "[9223372036854775808,2,2]", "[0,8]"), &["does not fill"]),
        case("a dimension past 2^64", one("F32", "[18446744073709551616]", "[0,8]"), &["invalid type"]),
        case("a dimension below 0", one("F32", "[-2]", "[0,8]"), &["invalid value: integer `-2`"]),
        case("a dimension as a text", one("F32", "[\"2\"]", "[0,8]"), &["invalid type: string \"2\""]),
        case("a shape that is none", one("F32", "{}", "[0,8]"), &["expected a list of dimensions"]),
        case("nine dimensions", one("F32", "[2,1,1,1,1,1,1,1,1]", "[0,8]"), &["more than 8 dimensions"]),
        case("four million dimensions", one("F32", &long, "[0,8]"), &["more than 8 dimensions"]),
        case("a gap", two(["[2]", "[0,8]"], ["[1]", "[12,16]"], 16), &["4 bytes before tensor \"b\" belong to none"]),
        case("a gap at the start", one("F32", "[1]", "[4,8]"), &["4 bytes before tensor \"a\" belong to none"]),
        case("an overlap", two(["[2]", "[0,8]"], ["[2]", "[4,12]"], 12), &["tensor \"b\" overlaps"]),
        case("one place for two", two(["[2]", "[0,8]"], ["[2]", "[0,8]"], 8), &["tensor \"b\" overlaps"]),
        case("one within the other", two(["[4]", "[0,16]"], ["[1]", "[4,8]"], 16), &["tensor \"b\" overlaps"]),
        case("an empty one within another", two(["[4]", "[0,16]"], ["[0]", "[4,4]"], 16), &["tensor \"b\" overlaps"]),
        case("an unknown dtype", one("F33", "[2]", "[0,8]"), &["the dtype \"F33\" is not known"]),
        case("a dtype in small letters", one("f32", "[2]", "[0,8]"), &["the dtype \"f32\" is not known"]),
        case("a dtype below a byte", one("F4", "[16]", "[0,8]"), &["the dtype \"F4\" is not known"]),
        case("a dtype that is a number", with_header("{\"a\":{\"dtype\":32}}", 0), &["invalid type: integer `32`"]),
        case("no dtype", with_header("{\"a\":{\"shape\":[],\"data_offsets\":[0,0]}}", 0), &["missing field `dtype`"]),
        case(
            "no shape",
            with_header("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,0]}}", 0),
            &["missing field `shape`"],
        ),
        case(
            "no offsets",
            with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[]}}", 0),
            &["missing field `data_offsets`"],
        ),
        case(
            "a field more",
            with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0],\"x\\u001b[2J\":1}}", 0),
            &["unknown field `x\\u{1b}[2J`"],
        ),
        case("a tensor that is null", with_header("{\"a\":null}", 0), &["invalid type: null"]),
    ]
}

pub fn names() -> Vec<Case> {
    let good = tensor("a", "F32", "[2]", "[0,8]");
    let long = "n".repeat(1 << 20);
    vec![
        case("a name twice", with_header(&format!("{{{good},{good}}}"), 8), &["the key \"a\" stands twice"]),
        case(
            "a name twice, once escaped",
            with_header(&format!("{{{good},{}}}", tensor("\\u0061", "F32", "[2]", "[8,16]")), 16),
            &["the key \"a\" stands twice"],
        ),
        case("metadata twice", with_header("{\"__metadata__\":{},\"__metadata__\":{}}", 0), &["stands twice"]),
        case(
            "a key of the metadata twice",
            with_header("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0),
            &["the key \"k\" stands twice"],
        ),
        case("a field twice", with_header("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F16\"}}", 0), &["duplicate field"]),
        case("metadata that is a number", with_header("{\"__metadata__\":{\"k\":1}}", 0), &["invalid type"]),
        case("metadata that is a list", with_header("{\"__metadata__\":[]}", 0), &["invalid type: sequence"]),
        case("metadata that is null", with_header("{\"__metadata__\":null}", 0), &["invalid type: null"]),
        case("no name", named(""), &["tensor \"\" has no proper name"]),
        case("two dots", named(".."), &["has no proper name"]),
        case("a way up", named("../../etc/passwd"), &["tensor \"../../etc/passwd\" has no proper name"]),
        case("a way up in the middle", named("a/../../b"), &["has no proper name"]),
        case("a path from the root", named("/etc/passwd"), &["has no proper name"]),
        case("a path from a Windows root", named("C:\\\\Windows\\\\x"), &["has no proper name"]),
        case("a way up on Windows", named("..\\\\..\\\\x"), &["has no proper name"]),
        case("a network share", named("\\\\\\\\host\\\\share"), &["has no proper name"]),
        case("a network share with slashes", named("//host/share"), &["has no proper name"]),
        case("a device namespace", named("\\\\\\\\.\\\\PhysicalDrive0"), &["has no proper name"]),
        case("a path of a drive", named("C:x"), &["has no proper name"]),
        case("a stream of NTFS", named("a:b"), &["has no proper name"]),
        case("a slash at the end", named("a/"), &["has no proper name"]),
        case("a zero byte", named("a\\u0000b"), &["tensor \"a\\0b\" has no proper name"]),
        case("a line end", named("a\\nb"), &["has no proper name"]),
        case("a terminal's command", named("a\\u001b[2Jb"), &["tensor \"a\\u{1b}[2Jb\" has no proper name"]),
        case("a C1 control", named("a\\u009bb"), &["has no proper name"]),
        case("text that runs backwards", named("a\\u202eb"), &["has no proper name"]),
        case("text that is not seen", named("a\\u200bb"), &["has no proper name"]),
        case("a name of a megabyte", named(&long), &["has no proper name", "characters left out"]),
        case("a name of 1025 bytes", named(&long[..1025]), &["has no proper name"]),
        case("half a surrogate pair", named("\\ud800"), &["its header is not as it should be"]),
        case(
            "a good one and a bad one",
            with_header(&format!("{{{good},{}}}", tensor("..", "F32", "[0]", "[8,8]")), 8),
            &["tensor \"..\""],
        ),
    ]
}

trait ReplaceLast {
    /// With the last byte replaced: what no `str` can hold.
    fn replace_last(self, byte: u8) -> Self;
}

impl ReplaceLast for Vec<u8> {
    fn replace_last(mut self, byte: u8) -> Self {
        self.pop();
        self.push(byte);
        self
    }
}
