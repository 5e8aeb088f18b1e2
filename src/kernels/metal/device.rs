//! The shaders on a Mac: compiled once for a device, and encoded among candle's own commands.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock},
};

use candle_core::{MetalDevice, MetalError, Result, Storage, Tensor, bail, metal_backend::DeviceId};
use candle_metal_kernels::metal::ComputePipeline;
use objc2_metal::{MTLCompileOptions, MTLSize};

use super::SOURCES;
use crate::kernels::gpu::{
    KERNELS,
    launch::{Launch, THREADS},
};

/// The compiled kernels by name.
type Pipelines = HashMap<&'static str, ComputePipeline>;

/// The device's kernels, compiled when first asked for; none where this system's compiler refuses them, which is said
/// once on standard error: candle's operations then do the work.
pub fn pipelines(device: &MetalDevice) -> Option<Arc<Pipelines>> {
    static COMPILED: OnceLock<Mutex<HashMap<DeviceId, Option<Arc<Pipelines>>>>> = OnceLock::new();
    let mut compiled = COMPILED.get_or_init(Default::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let compiled = compiled.entry(device.id()).or_insert_with(|| match compile(device) {
        Ok(pipelines) => Some(Arc::new(pipelines)),
        Err(error) => {
            eprintln!("the Metal kernels do not compile here and candle's operations are used: {error}");
            None
        }
    });
    compiled.clone()
}

fn compile(device: &MetalDevice) -> Result<Pipelines> {
    let options = MTLCompileOptions::new();
    // fast arithmetic may take no number to be infinite or NaN, and its exp is not good to the last bits; the newer
    // setting is not there before macOS 15
    #[allow(deprecated)]
    options.setFastMathEnabled(false);
    let library = device.metal_device().new_library_with_source(&SOURCES.concat(), Some(&options));
    let library = library.map_err(MetalError::from)?;
    let mut pipelines = Pipelines::new();
    for kernel in KERNELS {
        let function = library.get_function(kernel, None).map_err(MetalError::from)?;
        let pipeline = device.metal_device().new_compute_pipeline_state_with_function(&function);
        let pipeline = pipeline.map_err(MetalError::from)?;
        if pipeline.max_total_threads_per_threadgroup() < THREADS {
            bail!("{kernel} runs with fewer than {THREADS} threads");
        }
        pipelines.insert(kernel, pipeline);
    }
    Ok(pipelines)
}

/// See [`crate::kernels::gpu::launch::run`].
pub fn run(device: &MetalDevice, launch: &Launch, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    let pipelines = pipelines(device);
    let Some(pipeline) = pipelines.as_ref().and_then(|pipelines| pipelines.get(launch.kernel)) else {
        bail!("no Metal kernel {:?}", launch.kernel);
    };
    let held: Vec<_> = inputs.iter().chain(outputs).map(|tensor| tensor.storage_and_layout()).collect();
    let commands = device.command_encoder()?;
    let encoder = commands.as_ref();
    encoder.set_compute_pipeline_state(pipeline);
    for (i, (storage, layout)) in held.iter().enumerate() {
        let Storage::Metal(storage) = &**storage else { bail!("{}: a tensor is not on the GPU", launch.kernel) };
        let offset = layout.start_offset() * layout_size(storage);
        // outputs are read too: the encoder puts a barrier before them for both
        match i < inputs.len() {
            true => encoder.set_input_buffer(i, Some(storage.buffer()), offset),
            false => encoder.set_output_buffer(i, Some(storage.buffer()), offset),
        }
    }
    encoder.set_bytes_directly(held.len(), size_of_val(launch.words), launch.words.as_ptr().cast());
    let [width, height, depth] = launch.groups;
    let threads = MTLSize { width: THREADS, height: 1, depth: 1 };
    encoder.dispatch_thread_groups(MTLSize { width, height, depth }, threads);
    Ok(())
}

fn layout_size(storage: &candle_core::MetalStorage) -> usize {
    use candle_core::backend::BackendStorage;
    storage.dtype().size_in_bytes()
}
