#![no_main]

use dpo_lora_fuzz::{Kind, open};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| open(Kind::Gguf, bytes));
