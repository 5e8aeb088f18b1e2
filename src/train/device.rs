//! Where it computes.

use candle_core::{Device, utils};

pub use crate::kernels::compute::Compute;
use crate::{Error, Result, recipe};

/// The device of that name: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`. `auto` takes what the build and the machine have.
///
/// # Errors
/// [`Error::Recipe`] for another name, or for a device that this build or machine does not have.
pub fn choose(name: &str) -> Result<Device> {
    let kind = name.split(':').next().unwrap_or_default();
    match kind {
        "auto" if utils::cuda_is_available() => open(name, Device::new_cuda(0)),
        "auto" if utils::metal_is_available() => open(name, Device::new_metal(0)),
        "auto" | "cpu" => Ok(Device::Cpu),
        "cuda" if !utils::cuda_is_available() => Err(absent(name, "cuda")),
        "metal" if !utils::metal_is_available() => Err(absent(name, "metal")),
        "cuda" => {
            let number = name.strip_prefix("cuda").and_then(|rest| rest.strip_prefix(':')).unwrap_or("0");
            let number = number.parse().map_err(|_| unknown(name))?;
            open(name, Device::new_cuda(number))
        }
        "metal" => open(name, Device::new_metal(0)),
        _ => Err(unknown(name)),
    }
}

/// The type in which the frozen matrices multiply there.
///
/// # Errors
/// [`Error::Recipe`] where bf16 is asked for on another device than the CPU.
pub fn compute(asked: recipe::Compute, device: &Device) -> Result<Compute> {
    match asked {
        recipe::Compute::Auto | recipe::Compute::F32 => Ok(Compute::F32),
        recipe::Compute::Bf16 if device.is_cpu() => Ok(Compute::bf16_or_f32()),
        recipe::Compute::Bf16 => Err(Error::recipe(
            "memory.compute = \"bf16\" is for the CPU; set it to \"auto\", or run.device to \"cpu\"".to_string(),
        )),
    }
}

/// Uses so many threads from now on; 0: all cores. Has an effect once a process.
pub fn use_threads(threads: usize) -> Result<()> {
    // A pool that exists already stays: a library's caller may have made its own.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    Ok(())
}

fn open(name: &str, device: candle_core::Result<Device>) -> Result<Device> {
    device.map_err(|error| Error::recipe(format!("run.device = {name:?} cannot be opened: {error}")))
}

fn absent(name: &str, feature: &str) -> Error {
    Error::recipe(format!(
        "run.device = {name:?}: this build has no {feature}; use \"cpu\" or build with `--features {feature}`"
    ))
}

fn unknown(name: &str) -> Error {
    Error::recipe(format!("run.device = {name:?} is no device; name auto, cpu, cuda:0 or metal"))
}
