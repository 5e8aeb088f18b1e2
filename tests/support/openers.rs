//! Every kind of file from outside, opened as a run opens it: for tables of bad files, mutations and fuzzing.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use dpo_lora::Result;
use dpo_lora::data::{ChatTemplate, Dataset, Extras, Options, Tokenizer};
use dpo_lora::export::AdapterFolder;
use dpo_lora::model::Config;
use dpo_lora::recipe::{Format, Recipe, Truncation};
use dpo_lora::weights::{ModelFolder, SafetensorsFile};
use tempfile::TempDir;

/// A folder in which everything is right, for one file at a time to be bad in.
pub struct Bench {
    folder: TempDir,
    tokenizer: Tokenizer,
}

/// A kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Safetensors,
    Gguf,
    Index,
    Config,
    Tokenizer,
    TokenizerConfig,
    Template,
    AdapterConfig,
    AdapterWeights,
    Rows,
    PackedRows,
    Recipe,
}

/// All of them.
pub const KINDS: [Kind; 12] = [
    Kind::Safetensors,
    Kind::Gguf,
    Kind::Index,
    Kind::Config,
    Kind::Tokenizer,
    Kind::TokenizerConfig,
    Kind::Template,
    Kind::AdapterConfig,
    Kind::AdapterWeights,
    Kind::Rows,
    Kind::PackedRows,
    Kind::Recipe,
];

const TOKENIZER: [(&str, &[u8]); 3] = [
    ("tokenizer.json", include_bytes!("../fixtures/tokenizer/plain/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../fixtures/tokenizer/plain/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../fixtures/tokenizer/plain/chat_template.jinja")),
];
const CONFIG: &[u8] = include_bytes!("../fixtures/models/llama/config.json");
const ADAPTER_CONFIG: &[u8] = include_bytes!("../fixtures/models/llama/adapters/patterns/adapter_config.json");
const ROWS: &str = concat!(
    r#"{"prompt": [{"role": "user", "content": "sky?"}], "chosen": [{"role": "assistant", "content": "blue"}], "#,
    r#""rejected": [{"role": "assistant", "content": "green"}]}"#,
    "\n",
    r#"{"prompt": [{"role": "user", "content": "\u00fc \ud83d\ude00"}], "chosen": [{"role": "assistant", "content": "a"}], "#,
    r#""rejected": [{"role": "assistant", "content": "b", "thinking": null}]}"#,
    "\n",
);
const TEXT_ROWS: &str = "{\"prompt\": \"What is it?\\n\", \"chosen\": \"A sky.\", \"rejected\": \"No.\"}\n";
const RECIPE: &str = r#"[model]
base = "./base"
[adapter]
r = 4
lora_alpha = 8.0
target_modules = ["q_proj", "v_proj"]
[data]
train = ["rows.jsonl"]
eval_fraction = 0.1
[objective]
loss = "sigmoid"
beta = 0.1
[train]
batch_size = 4
learning_rate = 1e-2
adam_betas = [0.9, 0.999]
[run]
device = "cpu"
"#;

impl Kind {
    /// Where a file of this kind lies on a bench.
    pub fn file(self) -> &'static str {
        match self {
            Self::Safetensors => "base/model.safetensors",
            Self::Gguf => "model.gguf",
            Self::Index => "sharded/model.safetensors.index.json",
            Self::Config => "base/config.json",
            Self::Tokenizer => "base/tokenizer.json",
            Self::TokenizerConfig => "base/tokenizer_config.json",
            Self::Template => "base/chat_template.jinja",
            Self::AdapterConfig => "adapter/adapter_config.json",
            Self::AdapterWeights => "adapter/adapter_model.safetensors",
            Self::Rows => "rows.jsonl",
            Self::PackedRows => "rows.jsonl.gz",
            Self::Recipe => "recipe.toml",
        }
    }

    /// Its fuzz target in `fuzz/`.
    pub fn target(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Gguf => "gguf",
            Self::Index => "index",
            Self::Config => "config",
            Self::Tokenizer => "tokenizer",
            Self::TokenizerConfig => "tokenizer_config",
            Self::Template => "template",
            Self::AdapterConfig => "adapter_config",
            Self::AdapterWeights => "adapter_weights",
            Self::Rows => "rows",
            Self::PackedRows => "packed_rows",
            Self::Recipe => "recipe",
        }
    }

    /// The exit code of a bad one.
    pub fn exit_code(self) -> u8 {
        if self == Self::Recipe { 2 } else { 3 }
    }

    /// Good files of this kind, which mutations start from.
    pub fn seeds(self) -> Vec<Vec<u8>> {
        match self {
            Self::Safetensors => vec![
                safetensors(&[("a", "F32", &[2, 3]), ("b.c", "BF16", &[4]), ("none", "I64", &[0, 5])]),
                safetensors(&[("model.norm.weight", "F16", &[8])]),
            ],
            Self::Gguf => vec![
                include_bytes!("../fixtures/formats/gguf/model.gguf").to_vec(),
                include_bytes!("../fixtures/gguf/gemma3/model.gguf").to_vec(),
                include_bytes!("../fixtures/gguf/phi3/model.gguf").to_vec(),
                include_bytes!("../fixtures/gguf/qwen2/model.gguf").to_vec(),
                include_bytes!("../fixtures/gguf/granite/model.gguf").to_vec(),
            ],
            Self::Index => vec![index()],
            Self::Config => {
                vec![CONFIG.to_vec(), include_bytes!("../fixtures/models/llama3-rope/config.json").to_vec()]
            }
            Self::Tokenizer => {
                vec![TOKENIZER[0].1.to_vec(), include_bytes!("../fixtures/tokenizer/bos/tokenizer.json").to_vec()]
            }
            Self::TokenizerConfig => vec![
                TOKENIZER[1].1.to_vec(),
                include_bytes!("../fixtures/tokenizer/bos/tokenizer_config.json").to_vec(),
                br#"{"eos_token": "<|im_end|>", "chat_template": [{"name": "default", "template": "{{ 1 }}"}]}"#
                    .to_vec(),
            ],
            Self::Template => vec![TOKENIZER[2].1.to_vec(), TEMPLATE.into()],
            Self::AdapterConfig => vec![ADAPTER_CONFIG.to_vec()],
            Self::AdapterWeights => vec![adapter_weights()],
            Self::Rows => vec![ROWS.into(), TEXT_ROWS.repeat(3).into(), HH_ROW.into()],
            Self::PackedRows => vec![gzip(ROWS.as_bytes()), [gzip(b"\n"), gzip(TEXT_ROWS.as_bytes())].concat()],
            Self::Recipe => vec![RECIPE.into()],
        }
    }

    /// Pieces that files of this kind are made of, which mutations put in.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Safetensors | Self::AdapterWeights => &[
                "\"F32\"",
                "\"BF16\"",
                "\"F8_E4M3\"",
                "\"U8\"",
                "\"__metadata__\":{},",
                "\"dtype\":",
                "\"shape\":[",
                "\"data_offsets\":[0,0]",
                "../",
                "18446744073709551615",
                "-1",
                "[",
                "{",
                "}",
                "]",
                ",",
                "\\u0000",
            ],
            Self::Template => &[
                "{%",
                "%}",
                "{{",
                "}}",
                "{% for m in messages %}",
                "{% endfor %}",
                "{% set x = x ~ x %}",
                "{% if x %}",
                "{% endif %}",
                "{% macro m() %}",
                "{% endmacro %}",
                "messages",
                "namespace()",
                "range(99999)",
                " | tojson",
                " | list",
                " | join",
                " | replace('a', 'b')",
                "loop",
                "[0]",
                ".items()",
                " ~ ",
                " * 99999",
                "{% include 'x' %}",
                "{% import 'x' as x %}",
                "{% extends 'x' %}",
                "{#",
                "#}",
                "'",
                "raise_exception(",
            ],
            Self::Recipe => &[
                "[model]\n",
                "[[data]]\n",
                "\"\"\"",
                "'''",
                "= [",
                "{ a = 1 }",
                "inf",
                "nan",
                "1979-05-27T07:32:00Z",
                "0xffffffffffffffff",
                "\\u0000",
                "hf://datasets/a/b/c",
                "*",
                "~",
                "..",
                "true",
                "\n",
                "=",
                "#",
            ],
            Self::Gguf => &[
                "\0\0\0\0\0\0\0\0",
                "\x08\0\0\0",
                "\x09\0\0\0",
                "general.alignment",
                "general.architecture",
                "llama",
                "gemma3",
                "phi3",
                ".attention.",
                ".rope.scaling.",
                "tokenizer.ggml.",
                "blk.0.attn_q.weight",
                "output.weight",
                "GGUF",
                "\x7f\x7f\x7f\x7f",
                "\x01\0\0\0",
            ],
            Self::PackedRows => &["\x1f\u{8b}\x08", "\0", "\x02", "\n"],
            _ => &[
                "null",
                "true",
                "-1",
                "0",
                "1e308",
                "1e-320",
                "18446744073709551616",
                "[]",
                "{}",
                "[[[[",
                "\"\"",
                "\"\\u0000\"",
                "\"\\ud800\"",
                ":",
                ",",
                "\"..\"",
                "\"/etc/passwd\"",
                "{\"a\":",
                "\"type\":",
                "\"Sequence\"",
                "\"Replace\"",
                "\"linear\"",
                "\"yarn\"",
                "\"(a+)+\"",
                "\u{feff}",
                "\u{202e}",
            ],
        }
    }

    /// Bytes that opening `size` bytes may hold: twice the file itself for what is copied out of it and 64 MiB; for
    /// `tokenizer.json` what src/data/tokenizer.rs grants the library.
    pub fn allowance(self, size: usize) -> usize {
        match self {
            Self::Tokenizer => (64 << 20) + 66 * size,
            // decoded to f32, and the tokenizer within
            Self::Gguf => (64 << 20) + 66 * size,
            Self::PackedRows => (64 << 20) + 200 * size,
            // what it writes is its own 64 MiB
            Self::Template => (66 << 20) + 2 * size,
            _ => (64 << 20) + 2 * size,
        }
    }
}

const HH_ROW: &str =
    "{\"chosen\": \"\\n\\nHuman: a\\n\\nAssistant: b\", \"rejected\": \"\\n\\nHuman: a\\n\\nAssistant: c\"}\n";
const TEMPLATE: &str = "{%- set ns = namespace(found=false, last=messages|length) -%}
{%- macro turn(m) -%}<|im_start|>{{ m.role | upper }}\n{{ m['content'].strip().split('</think>')[-1] | trim }}{%- endmacro -%}
{%- for m in messages -%}{%- if loop.first and m.role != 'system' -%}{{ 'You' ~ ' help' * 2 }}{%- endif -%}
{{- turn(m) }}{%- for k, v in m.items() -%}{{ k }}: {{ v | tojson(indent=2) }}{%- endfor -%}
{%- set ns.found = true -%}{%- endfor -%}{{ strftime_now('%d %b %Y') if ns.found else raise_exception('none') }}";

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["base", "sharded", "adapter"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        for (name, bytes) in TOKENIZER {
            fs::write(folder.path().join("base").join(name), bytes).unwrap();
        }
        for (name, tensors) in SHARDS {
            fs::write(folder.path().join("sharded").join(name), safetensors(tensors)).unwrap();
        }
        for kind in KINDS {
            fs::write(folder.path().join(kind.file()), &kind.seeds()[0]).unwrap();
        }
        let tokenizer = Tokenizer::open(&folder.path().join("base")).unwrap();
        Self { folder, tokenizer }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a file in its place, opens it as a run does and uses it a little; the file is then right again.
    pub fn open(&self, kind: Kind, bytes: &[u8]) -> Result<()> {
        let file = self.path(kind.file());
        fs::write(&file, bytes).unwrap();
        let outcome = self.used(kind, &file);
        fs::write(&file, &kind.seeds()[0]).unwrap();
        outcome
    }

    fn used(&self, kind: Kind, file: &Path) -> Result<()> {
        let folder = file.parent().unwrap();
        match kind {
            Kind::Safetensors => {
                let open = SafetensorsFile::open(file)?;
                let bytes: usize = open.entries().keys().map(|name| open.bytes(name).unwrap().len()).sum();
                assert!(bytes as u64 <= fs::metadata(file).unwrap().len());
                all_tensors(&ModelFolder::open(folder)?)
            }
            Kind::Gguf => {
                Config::read(file)?;
                all_tensors(&ModelFolder::open(file)?)?;
                // one of the fixtures has none, and says so
                let Ok(tokenizer) = Tokenizer::open(file) else { return Ok(()) };
                tokenizer.decode(&tokenizer.encode("a sky", true)?, false).map(drop)
            }
            Kind::Index => all_tensors(&ModelFolder::open(folder)?),
            Kind::Config => {
                Config::read(folder)?;
                ModelFolder::open(folder)?;
                Tokenizer::open(folder).map(drop)
            }
            Kind::Tokenizer | Kind::TokenizerConfig => {
                let tokenizer = Tokenizer::open(folder)?;
                let ids = tokenizer.encode("a sky ü\n\n<|im_end|> 12", true)?;
                tokenizer.decode(&ids, false)?;
                tokenizer.pieces(&ids)?;
                match ChatTemplate::choose("auto", &tokenizer)? {
                    Some(template) => template.render(&chat(), &Extras::default(), true).map(drop),
                    None => Ok(()),
                }
            }
            Kind::Template => {
                let template = ChatTemplate::choose(file.to_str().unwrap(), &self.tokenizer)?;
                template.unwrap().render(&chat(), &Extras::default(), true).map(drop)
            }
            Kind::AdapterConfig | Kind::AdapterWeights => {
                let adapter = AdapterFolder::read(folder)?;
                for matrix in &adapter.matrices {
                    adapter.config.scale_of(&matrix.module)?;
                }
                let modules: Vec<_> = MODULES.iter().map(|name| (name.to_string(), 6, 6)).collect();
                adapter.check_fits(&modules)
            }
            Kind::Rows | Kind::PackedRows => {
                let template = ChatTemplate::choose("auto", &self.tokenizer)?;
                let options =
                    Options { format: Format::Auto, max_length: 256, truncation: Truncation::Refuse, limit: 0 };
                Dataset::load(&[file.to_owned()], &self.tokenizer, template.as_ref(), &options)?.usable().map(drop)
            }
            Kind::Recipe => {
                let recipe = Recipe::load(file, &[])?;
                assert!(recipe.to_toml().contains("[model]"));
                Ok(())
            }
        }
    }
}

fn all_tensors(model: &ModelFolder) -> Result<()> {
    for name in model.names() {
        if let Ok(tensor) = model.tensor(name) {
            assert_eq!(tensor.to_f32().len(), tensor.rows() * tensor.columns());
        }
    }
    model.fingerprint().map(drop)
}

fn chat() -> Vec<dpo_lora::data::Message> {
    serde_json::from_str(r#"[{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]"#).unwrap()
}

type Tensors<'a> = &'a [(&'a str, &'a str, &'a [usize])];

const SHARDS: [(&str, Tensors); 2] =
    [("one.safetensors", &[("a", "F32", &[2]), ("b", "F32", &[3])]), ("two.safetensors", &[("c", "F16", &[5])])];
const MODULES: [&str; 2] = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];

fn index() -> Vec<u8> {
    br#"{"metadata": {"total_size": 30}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}"#
        .to_vec()
}

/// Matrices of the ranks that the fixture's config has.
fn adapter_weights() -> Vec<u8> {
    let config: serde_json::Value = serde_json::from_slice(ADAPTER_CONFIG).unwrap();
    let rank = config["r"].as_u64().unwrap() as usize;
    let name = |module: &str, half: &str| format!("base_model.model.{module}.lora_{half}.weight");
    let ranks = MODULES.iter().zip([2, rank]);
    let names: Vec<(String, [usize; 2])> =
        ranks.flat_map(|(module, rank)| [(name(module, "A"), [rank, 6]), (name(module, "B"), [6, rank])]).collect();
    let tensors: Vec<(&str, &str, &[usize])> =
        names.iter().map(|(name, shape)| (name.as_str(), "F32", shape.as_slice())).collect();
    safetensors(&tensors)
}

/// A safetensors file of these tensors, filled with zeros.
pub fn safetensors(tensors: Tensors) -> Vec<u8> {
    let size = |dtype: &str| match dtype {
        "F32" => 4,
        "I64" => 8,
        _ => 2,
    };
    let (mut header, mut at) = (Vec::new(), 0);
    for (name, dtype, shape) in tensors {
        let end = at + shape.iter().product::<usize>() * size(dtype);
        header.push(format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}"));
        at = end;
    }
    with_header(&format!("{{{}}}", header.join(",")), at)
}

/// A safetensors file with this header and so many bytes of data.
pub fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Packed bytes.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
