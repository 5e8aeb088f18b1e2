//! PEFT's folders.

use crate::openers::{Kind, safetensors, with_header};
use crate::{Case, case, with};

fn set(key: &str, json: &str) -> Vec<u8> {
    with(&Kind::AdapterConfig.seeds()[0], key, json)
}

pub fn configs() -> Vec<Case> {
    let deep = format!("{{\"r\": {}", "[".repeat(200_000));
    let patterns = |n: usize, pattern: &str| {
        let entries: Vec<String> = (0..n).map(|i| format!("\"{i}{pattern}\": 4")).collect();
        set("rank_pattern", &format!("{{{}}}", entries.join(",")))
    };
    let mut cases: Vec<Case> = vec![
        case("nothing", "", &["adapter_config.json: not a JSON object", "fetch the file again"]),
        case("a list", "[]", &["not a JSON object"]),
        case("depth", deep, &["recursion limit"]),
        case("no UTF-8", b"{\"r\": \"\xff\"}".to_vec(), &["not a JSON object"]),
        case("a million values", set("x", &format!("[{}0]", "0,".repeat(1_000_000))), &["values, and 300000 at most"]),
        case("no method", set("peft_type", ""), &["peft_type: it is missing"]),
        case("another method", set("peft_type", "\"IA3\""), &["peft_type: \"IA3\" is not read; LORA is"]),
        case("a method that is a list", set("peft_type", "[]"), &["peft_type: [] is not a text"]),
        case("no rank", set("r", ""), &["r: it is missing"]),
        case("a rank of 0", set("r", "0"), &["r: 0 is not a whole number from 1"]),
        case("a rank below 0", set("r", "-4"), &["r: -4 is not"]),
        case("a rank past any", set("r", "16777217"), &["r: 16777217 is not"]),
        case("a rank past 2^64", set("r", "1e30"), &["r: 1e+30 is not"]),
        case(
            "a rank that does not fit",
            set("r", "5"),
            &["but the config says rank 5", "fetch both files of one adapter"],
        ),
        case("no alpha", set("lora_alpha", ""), &["lora_alpha: it is missing"]),
        case("an alpha of 0", set("lora_alpha", "0"), &["lora_alpha: 0 is not a positive number"]),
        case("an alpha past f32", set("lora_alpha", "1e300"), &["lora_alpha: 1e+300 is not a positive number"]),
        case("an alpha as a text", set("lora_alpha", "\"16\""), &["lora_alpha: \"16\" is not a positive number"]),
        case("no targets", set("target_modules", ""), &["target_modules: it is missing"]),
        case("targets that are a number", set("target_modules", "3"), &["target_modules: 3 is not a text or a list"]),
        case("targets of numbers", set("target_modules", "[3]"), &["target_modules: [3] is not a text or a list"]),
        case("a regex cut short", set("target_modules", "\"(q_proj\""), &["target_modules: \"(q_proj\" is no regular"]),
        case(
            "a regex that backtracks",
            set("target_modules", "\"(?:(?=(a|.)+)+.)*(?<=x)y(a+)+$\""),
            &["target_modules: "],
        ),
        case("a regex of any size", set("target_modules", "\"(((a{999}){999}){999})\""), &["target_modules: "]),
        case(
            "a regex of any depth",
            set("target_modules", &format!("\"{}\"", "(".repeat(100_000))),
            &["target_modules: "],
        ),
        case(
            "targets that it has no matrices for",
            set("target_modules", "\".*\""),
            &["the adapter was made for another base"],
        )
        .but_ok(),
        case("biases", set("bias", "\"all\""), &["bias: adapters with trained biases are not read"]),
        case(
            "a base of another kind",
            set("init_lora_weights", "\"pissa\""),
            &["init_lora_weights: \"pissa\" changes the base"],
        ),
        case("a scale as a text", set("use_rslora", "\"true\""), &["use_rslora: \"true\" is not true or false"]),
        case("a rank pattern that is a list", set("rank_pattern", "[1]"), &["rank_pattern: [1] is not an object"]),
        case("a rank of 0 in a pattern", set("rank_pattern", "{\"q_proj\": 0}"), &["rank_pattern.q_proj: 0 is not"]),
        case(
            "an alpha below 0 in a pattern",
            set("alpha_pattern", "{\"q_proj\": -1}"),
            &["alpha_pattern.q_proj: -1 is not"],
        ),
        case(
            "a pattern that is no regex",
            set("rank_pattern", "{\"(\": 1}"),
            &["rank_pattern: ", "no regular expression"],
        ),
        case("5,000 patterns", patterns(5000, ".q_proj"), &["rank_pattern: 5000 patterns, and at most"]),
        case("4,000 heavy patterns", patterns(4000, "(\\\\w{99}){9}"), &["rank_pattern: "]),
    ];
    for field in [
        "use_dora",
        "layers_to_transform",
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "lora_bias",
        "exclude_modules",
        "target_parameters",
        "alora_invocation_tokens",
        "megatron_config",
    ] {
        let json = "[\"lm_head\"]";
        cases.push(case(
            "a field that is not read",
            set(field, json),
            &["adapters that use it are not read; merge it"],
        ));
    }
    cases.retain(|case| !case.says.is_empty());
    cases
}

impl Case {
    /// Left out: the bench's adapter has matrices for all its modules.
    fn but_ok(mut self) -> Self {
        self.says = &[];
        self
    }
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const Q1: &str = "base_model.model.model.layers.1.self_attn.q_proj";

/// The bench's matrices with other shapes or names.
fn matrices(a: (&str, &[usize]), b: (&str, &[usize])) -> Vec<u8> {
    let (a_name, b_name) = (format!("{Q1}{}", a.0), format!("{Q1}{}", b.0));
    let (first_a, first_b) = (format!("{Q0}.lora_A.weight"), format!("{Q0}.lora_B.weight"));
    safetensors(&[(&first_a, "F32", &[2, 6]), (&first_b, "F32", &[6, 2]), (&a_name, "F32", a.1), (&b_name, "F32", b.1)])
}

pub fn weights() -> Vec<Case> {
    const A: &str = ".lora_A.weight";
    const B: &str = ".lora_B.weight";
    let good = || matrices((A, &[4, 6]), (B, &[6, 4]));
    let value = |bits: u32| {
        let mut bytes = good();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&bits.to_le_bytes());
        bytes
    };
    let one = |name: &str, dtype: &str| safetensors(&[(name, dtype, &[4, 6])]);
    let in_dtype = |dtype: &str| {
        let mut bytes = good();
        let at = bytes.windows(3).position(|three| three == b"F32").unwrap();
        bytes[at..at + 3].copy_from_slice(dtype.as_bytes());
        bytes
    };
    vec![
        case("nothing", "", &["adapter_model.safetensors: it holds 0 bytes"]),
        case("cut short", &good()[..good().len() - 4], &["do not lie within", "fetch the file again"]),
        case("a pickle", [&b"\x80\x02"[..], &[0; 60]].concat(), &["it is a pickle", "refused"]),
        case("a zip of pickles", [&b"PK\x03\x04"[..], &[0; 60]].concat(), &["it is a pickle"]),
        case("no matrices", safetensors(&[]), &["it holds no matrices"]),
        case("metadata alone", with_header("{\"__metadata__\":{\"format\":\"pt\"}}", 0), &["it holds no matrices"]),
        case("other names", one("weight", "F32"), &["tensor \"weight\" is not a LoRA matrix"]),
        case("a name that is a prefix alone", one("base_model.model.", "F32"), &["is not a LoRA matrix"]),
        case("no module", one("base_model.model..lora_A.weight", "F32"), &["has no proper name"]),
        case("an empty module", one("base_model.model.lora_A.weight", "F32"), &["is not a LoRA matrix"]),
        case("a name that climbs", one("base_model.model.../..lora_A.weight", "F32"), &["has no proper name"]),
        case("A alone", one("base_model.model.x.lora_A.weight", "F32"), &["x.lora_B.weight\" is missing"]),
        case("B alone", one("base_model.model.x.lora_B.weight", "F32"), &["has no .lora_A.weight beside it"]),
        case("an embedding's", one("base_model.model.x.lora_embedding_A", "F32"), &["is not a LoRA matrix"]),
        case("DoRA's magnitudes", one("base_model.model.x.lora_magnitude_vector", "F32"), &["is not a LoRA matrix"]),
        case("a named adapter's", one("base_model.model.x.lora_A.default.weight", "F32"), &["is not a LoRA matrix"]),
        case("a layer saved whole", one("base_model.model.lm_head.weight", "F32"), &["is not a LoRA matrix"]),
        case("whole numbers", in_dtype("I32"), &["should be a matrix of floats, it is Other(\"I32\")"]),
        case("64 bits", in_dtype("F64"), &["does not fill its"]),
        case("a vector", matrices((A, &[24]), (B, &[6, 4])), &["should be a matrix of floats"]),
        case("three dimensions", matrices((A, &[4, 6, 1]), (B, &[6, 4])), &["should be a matrix of floats"]),
        case("a number", matrices((A, &[]), (B, &[6, 4])), &["should be a matrix of floats"]),
        case("no rows", matrices((A, &[0, 6]), (B, &[6, 0])), &["is empty or not finite"]),
        case(
            "another rank in A",
            matrices((A, &[5, 6]), (B, &[6, 4])),
            &["A is [5, 6] and B is [6, 4], but the config says"],
        ),
        case("another rank in B", matrices((A, &[4, 6]), (B, &[6, 5])), &["but the config says rank"]),
        case("another rank in both", matrices((A, &[1, 6]), (B, &[6, 1])), &["but the config says rank", "fetch both"]),
        case("turned round", matrices((A, &[6, 4]), (B, &[4, 6])), &["but the config says rank"]),
        case("another width", matrices((A, &[4, 7]), (B, &[6, 4])), &["is 6 → 6 here, the adapter has 7 → 6"]),
        case("another height", matrices((A, &[4, 6]), (B, &[9, 4])), &["is 6 → 6 here, the adapter has 6 → 9"]),
        case("not a number", value(0x7fc0_0000), &["not finite; use an earlier checkpoint"]),
        case("infinite", value(0x7f80_0000), &["not finite"]),
        case("infinite below 0", value(0xff80_0000), &["not finite"]),
        case("a module twice", with_header(&format!("{{\"{Q0}{A}\":{{}},\"{Q0}{A}\":{{}}}}"), 0), &["missing field"]),
    ]
}
