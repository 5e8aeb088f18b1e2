//! Writes the good files of every kind into `corpus/TARGET/`, for the fuzzer to start from: `cargo run --bin corpus`.

use std::{fs, path::Path};

use dpo_lora_fuzz::openers::KINDS;

fn main() -> std::io::Result<()> {
    for kind in KINDS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(kind.target());
        fs::create_dir_all(&folder)?;
        for (number, seed) in kind.seeds().iter().enumerate() {
            fs::write(folder.join(format!("good-{number}")), seed)?;
        }
    }
    Ok(())
}
