use super::*;

/// A file in the making: metadata and tensors as bytes, with whatever lies one wants to tell.
struct Bytes(Vec<u8>);

impl Bytes {
    fn head(version: u32, tensors: u64, keys: u64) -> Self {
        let mut bytes = Self(b"GGUF".to_vec());
        bytes.u32(version).u64(tensors).u64(keys);
        bytes
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn byte(&mut self, byte: u8) -> &mut Self {
        self.0.push(byte);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.text(name).u32(dims.len() as u32);
        for dim in dims {
            self.u64(*dim);
        }
        self.u32(kind).u64(offset)
    }

    /// Padding to 32 and so many bytes of data.
    fn data(&mut self, n: usize) -> Vec<u8> {
        let padded = self.0.len().next_multiple_of(32) + n;
        self.0.resize(padded, 1);
        self.0.clone()
    }
}

fn refused(bytes: &[u8], reason: &str) {
    let said = parse(bytes).expect_err(reason);
    assert!(said.contains(reason), "said {said:?}, not {reason:?}");
}

fn one(name: &str, dims: &[u64], kind: u32, offset: u64, data: usize) -> Vec<u8> {
    Bytes::head(3, 1, 0).tensor(name, dims, kind, offset).data(data)
}

fn two(second: (&str, u64)) -> Vec<u8> {
    Bytes::head(3, 2, 0).tensor("a", &[3], 0, 0).tensor(second.0, &[3], 0, second.1).data(64)
}

#[test]
fn versions_2_and_3_are_read_and_shapes_turned_round() {
    for version in [2, 3] {
        let mut bytes = Bytes::head(version, 2, 2);
        bytes.text("general.alignment").u32(4).u32(64).text("t").u32(8).text("text");
        bytes.tensor("a", &[3], 0, 0).tensor("b", &[32, 2], 8, 64);
        bytes.0.resize(bytes.0.len().next_multiple_of(64) + 64 + 68, 0);
        let (values, tensors) = parse(&bytes.0).unwrap();
        assert_eq!(values.len(), 2);
        assert_eq!((tensors["b"].shape.as_slice(), tensors["b"].kind), (&[2, 32][..], GgmlType::Q8_0));
        assert_eq!(tensors["b"].range, bytes.0.len() - 68..bytes.0.len());
        assert_eq!(tensors["a"].range.len(), 12);
    }
}

#[test]
fn a_header_that_lies_is_refused() {
    refused(b"GGU", "cut short");
    refused(b"GGML\x03\0\0\0", "does not begin with GGUF");
    refused(&Bytes::head(1, 0, 0).0, "version 1");
    refused(&Bytes::head(4, 0, 0).0, "version 4");
    refused(&Bytes::head(0, 0, 0).0, "version 0");
    refused(&Bytes::head(3 << 24, 0, 0).0, "big-endian");
    refused(&Bytes::head(3, u64::MAX, 0).0, "tensors in");
    refused(&Bytes::head(3, 0, 1 << 40).0, "keys in");
    refused(&Bytes::head(3, 0, 1).data(0), "keys in");
}

#[test]
fn metadata_that_lie_are_refused() {
    let key = |name: &str, fill: &dyn Fn(&mut Bytes) -> &mut Bytes| {
        let mut bytes = Bytes::head(3, 0, 1);
        bytes.text(name);
        fill(&mut bytes);
        bytes.data(64)
    };
    refused(&key("a", &|b| b.u32(13)), "unknown type 13");
    refused(&key("", &|b| b.u32(4).u32(1)), "no proper name");
    refused(&key("a\u{7}", &|b| b.u32(4).u32(1)), "no proper name");
    refused(&key("a", &|b| b.u32(8).u64(u64::MAX)), "cut short");
    refused(&key("a", &|b| b.u32(8).u64(1).byte(0xff)), "not UTF-8");
    refused(&key("a", &|b| b.u32(7).byte(2)), "neither 0 nor 1");
    refused(&key("a", &|b| b.u32(9).u32(7).u64(1).byte(2)), "neither 0 nor 1");
    refused(&key("a", &|b| b.u32(9).u32(9).u64(1)), "list of lists");
    refused(&key("a", &|b| b.u32(9).u32(4).u64(1 << 61)), "cut short");
    refused(&key("a", &|b| b.u32(9).u32(4).u64(u64::MAX)), "cut short");
    refused(&key("a", &|b| b.u32(9).u32(8).u64(1 << 60)), "texts in");
    for alignment in [0, 3, 48] {
        refused(&key("general.alignment", &|b| b.u32(4).u32(alignment)), "not a power of two");
    }
    refused(&key("general.alignment", &|b| b.u32(5).u32(32)), "not a u32");
    let mut twice = Bytes::head(3, 0, 2);
    twice.text("a").u32(4).u32(1).text("a").u32(4).u32(2);
    refused(&twice.0, "\"a\" stands twice");
}

#[test]
fn tensors_that_lie_are_refused() {
    assert!(parse(&one("a", &[3], 0, 0, 12)).is_ok());
    assert!(parse(&two(("b", 32))).is_ok());
    refused(&one("a", &[3], 0, 0, 11), "beyond the file's");
    refused(&one("a", &[1 << 33, 1 << 33], 0, 0, 12), "impossible dimensions");
    refused(&one("a", &[1 << 40, 1 << 21, 2], 0, 0, 12), "impossible dimensions");
    refused(&one("a", &[1 << 61], 0, 0, 12), "impossible dimensions");
    refused(&one("a", &[0], 0, 0, 12), "impossible dimensions");
    refused(&one("a", &[], 0, 0, 12), "0 dimensions");
    refused(&one("a", &[1; 5], 0, 0, 12), "5 dimensions");
    refused(&one("a", &[33], 8, 0, 100), "whole blocks of 32");
    refused(&one("a", &[32], 12, 0, 200), "whole blocks of 256");
    refused(&one("a", &[3], 4, 0, 12), "unknown type 4");
    refused(&one("a", &[3], 0, 32, 64), "offset 32 where 0 is due");
    refused(&one("a", &[3], 0, 1, 64), "offset 1 where 0 is due");
    refused(&one(&"a".repeat(64), &[3], 0, 0, 12), "no proper name");
    refused(&two(("a", 32)), "\"a\" stands twice");
    refused(&two(("b", 0)), "offset 0 where 32 is due");
    refused(&two(("b", 12)), "offset 12 where 32 is due");
    refused(&two(("b", 64)), "offset 64 where 32 is due");
    refused(&two(("b", u64::MAX)), "where 32 is due");
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let mut bytes = Bytes::head(3, 1, 2);
    bytes.text("a").u32(9).u32(8).u64(2).text("x").text("y").text("b").u32(6).u32(0);
    let whole = bytes.tensor("t", &[32, 2], 8, 0).data(68);
    assert!(parse(&whole).is_ok());
    for length in 0..whole.len() {
        assert!(parse(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn values_come_back_by_key_and_type() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut bytes = Bytes::head(3, 0, 5);
    bytes.text("size").u32(5).u32(7).text("eps").u32(6).u32(1e-5f32.to_bits());
    bytes.text("texts").u32(9).u32(8).u64(2).text("x").text("yz");
    bytes.text("numbers").u32(9).u32(5).u64(2).u32(1).u32(u32::MAX).text("text").u32(8).text("ü");
    std::fs::write(&path, &bytes.0).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let metadata = file.metadata();
    assert_eq!((metadata.size("size").unwrap(), metadata.number("eps").unwrap()), (Some(7), Some(1e-5)));
    assert_eq!(metadata.texts("texts").unwrap().unwrap(), ["x", "yz"]);
    assert_eq!(metadata.numbers("numbers").unwrap().unwrap(), [1.0, -1.0]);
    assert_eq!((metadata.text("text").unwrap(), metadata.text("none").unwrap()), (Some("ü"), None));
    let said = metadata.size("text").unwrap_err();
    assert!(said.to_string().contains("x.gguf: text: it is not a whole number") && said.exit_code() == 3);
}
