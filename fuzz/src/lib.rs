//! What the fuzz targets share: the files' kinds and openers of the tests.

use std::sync::OnceLock;

#[path = "../../tests/support/openers.rs"]
pub mod openers;

use dpo_lora::confined::Allocator;
pub use openers::Kind;
use openers::Bench;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator::SYSTEM;

/// Opens `bytes` as a file of this kind. What it says of a bad one does not matter here; that it says it does.
pub fn open(kind: Kind, bytes: &[u8]) {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    let _ = BENCH.get_or_init(Bench::new).open(kind, bytes);
}
