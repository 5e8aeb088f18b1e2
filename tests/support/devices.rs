//! Where the numerical tests run: the CPU, the CPU by the way that matrices go on an accelerator, and every accelerator
//! that this build knows and this machine opens.

use std::path::{Path, PathBuf};

use candle_core::Device;
use dpo_lora::{
    kernels::compute::Compute,
    model::{Config, decoder::Decoder},
    report::Progress,
    train::device,
    weights::ModelFolder,
};

/// A device by name. Matrices are uploaded to it, also to the CPU.
#[derive(Debug)]
pub struct Place {
    pub name: &'static str,
    pub device: Device,
}

/// Every device of this machine.
///
/// # Panics
/// Where `DPO_LORA_REQUIRE_DEVICE` names one that is not there.
pub fn devices() -> Vec<Place> {
    let mut found = vec![Place { name: "the CPU, uploaded", device: Device::Cpu }];
    for (name, full) in [("cuda", "cuda:0"), ("metal", "metal")] {
        found.extend(device::choose(full, &Progress::stderr()).ok().map(|device| Place { name, device }));
    }
    if let Ok(required) = std::env::var("DPO_LORA_REQUIRE_DEVICE") {
        assert!(found.iter().any(|place| place.name == required), "{required} cannot be opened");
    }
    println!("devices: {}", found.iter().map(|place| place.name).collect::<Vec<_>>().join(", "));
    found
}

/// The folder `tests/fixtures`: of the sources, or where `DPO_LORA_FIXTURES` says, for a test that was taken to another
/// machine.
pub fn fixtures() -> PathBuf {
    match std::env::var_os("DPO_LORA_FIXTURES") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    }
}

impl Place {
    /// The model in a folder or file, its matrices uploaded.
    pub fn open(&self, path: &Path, compute: Compute) -> Decoder {
        let config = Config::read(path).expect("a config");
        let folder = ModelFolder::open(path).expect("weights");
        Decoder::open_uploaded(&folder, &config, &self.device, compute).expect("a decoder")
    }
}
