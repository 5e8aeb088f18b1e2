//! Where it computes.

use candle_core::{Device, utils};

pub use crate::kernels::compute::Compute;
use crate::{
    Error, Result, recipe,
    report::{MemoryMeter, Progress},
};

/// The device of that name: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`. `auto` takes what the build and the machine
/// have; where it cannot take a card that is there, `progress` is told why.
///
/// # Errors
/// [`Error::Recipe`] for another name, or for a device that this build or machine does not have.
pub fn choose(name: &str, progress: &Progress) -> Result<Device> {
    let kind = name.split(':').next().unwrap_or_default();
    match kind {
        "auto" if utils::cuda_is_available() => match cuda_is_there() {
            Ok(()) => open(name, new_cuda(0)),
            Err(why) => {
                progress.note(&format!("run.device = \"auto\" takes the CPU: {why}"));
                Ok(Device::Cpu)
            }
        },
        "auto" if utils::metal_is_available() => open(name, Device::new_metal(0)),
        "auto" | "cpu" => Ok(Device::Cpu),
        "cuda" if !utils::cuda_is_available() => Err(absent(name, "cuda")),
        "metal" if !utils::metal_is_available() => Err(absent(name, "metal")),
        "cuda" => {
            let number = name.strip_prefix("cuda").and_then(|rest| rest.strip_prefix(':')).unwrap_or("0");
            let number = number.parse().map_err(|_| unknown(name))?;
            cuda_is_there().map_err(|why| Error::recipe(format!("run.device = {name:?} cannot be opened: {why}")))?;
            open(name, new_cuda(number))
        }
        "metal" => open(name, Device::new_metal(0)),
        _ => Err(unknown(name)),
    }
}

/// Whether a name means an accelerator, be it there or not; `auto` does where the build and the machine have one.
pub fn is_accelerator(name: &str) -> bool {
    match name.split(':').next() {
        Some("auto") => cuda_is_there().is_ok() || utils::metal_is_available(),
        kind => matches!(kind, Some("cuda" | "metal")),
    }
}

/// Whether a name means a CUDA card, be it there or not.
pub fn is_card(name: &str) -> bool {
    match name.split(':').next() {
        Some("auto") => cuda_is_there().is_ok(),
        kind => kind == Some("cuda"),
    }
}

/// The kind of a device: `cpu`, `cuda` or `metal`.
pub fn kind(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// Nothing, or why no card can be used.
fn cuda_is_there() -> std::result::Result<(), String> {
    #[cfg(feature = "cuda")]
    return crate::kernels::cuda::device::is_there();
    #[cfg(not(feature = "cuda"))]
    Err("this build has no cuda".into())
}

fn new_cuda(number: usize) -> candle_core::Result<Device> {
    #[cfg(feature = "cuda")]
    return crate::kernels::cuda::device::open(number);
    #[cfg(not(feature = "cuda"))]
    Device::new_cuda(number)
}

/// The type in which the frozen matrices multiply: on an accelerator `auto` is bf16.
pub fn compute(asked: recipe::Compute, accelerator: bool) -> Compute {
    match (asked, accelerator) {
        (recipe::Compute::F32, _) | (recipe::Compute::Auto, false) => Compute::F32,
        (recipe::Compute::Bf16, false) => Compute::bf16_or_f32(),
        (recipe::Compute::Auto | recipe::Compute::Bf16, true) => Compute::Bf16,
    }
}

/// Reads how much of a device's memory is free, in bytes: all programs' use counted on CUDA, this process's on Metal,
/// of what Metal recommends. None for the CPU, and where the device does not say.
pub fn free(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => None,
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => cuda.cuda_stream().context().mem_get_info().ok().map(|(free, _)| free as u64),
        #[cfg(feature = "metal")]
        Device::Metal(metal) => {
            let device = metal.metal_device();
            let most = device.recommended_max_working_set_size();
            Some(most.saturating_sub(device.current_allocated_size()) as u64)
        }
        #[allow(unreachable_patterns)] // a build with neither has devices that cannot be opened
        _ => None,
    }
}

/// Operations a second that a device's matrix unit does at most in bf16; none where it does not say.
pub fn peak(device: &Device) -> Option<f64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => crate::kernels::cuda::device::peak(card),
        _ => None,
    }
}

/// The most bytes of a device's memory that tensors used at once, and that were held for them; none where it does not
/// say.
pub fn most_used(device: &Device) -> Option<[u64; 2]> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => crate::kernels::cuda::device::most_used(card),
        _ => None,
    }
}

/// A meter of the memory that a run is planned for, the host's or the device's, and what the device has free as it
/// starts.
pub fn meter(device: &Device) -> (MemoryMeter, Option<u64>) {
    match (device.is_cpu(), free(device)) {
        (true, _) => (MemoryMeter::start(), None),
        (false, None) => (MemoryMeter::of(|| None), None),
        (false, Some(at_start)) => {
            let device = device.clone();
            let taken = move || Some(at_start.saturating_sub(free(&device)?).max(1));
            (MemoryMeter::of(taken), Some(at_start))
        }
    }
}

/// Uses so many threads from now on; 0: all cores. Has an effect once a process.
pub fn use_threads(threads: usize) {
    // A pool that exists already stays: a library's caller may have made its own.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
}

fn open(name: &str, device: candle_core::Result<Device>) -> Result<Device> {
    device.map_err(|error| {
        // candle puts a backtrace behind its words where the environment asks for one
        let error = error.to_string();
        let why = error.lines().next().unwrap_or_default();
        Error::recipe(format!("run.device = {name:?} cannot be opened: {why}"))
    })
}

fn absent(name: &str, feature: &str) -> Error {
    Error::recipe(format!(
        "run.device = {name:?}: this build has no {feature}; use \"cpu\" or build with `--features {feature}`"
    ))
}

fn unknown(name: &str) -> Error {
    Error::recipe(format!("run.device = {name:?} is no device; name auto, cpu, cuda:0 or metal"))
}
