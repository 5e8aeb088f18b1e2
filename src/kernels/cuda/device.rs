//! A launch on a CUDA card, in the order of candle's own work on its stream.

use candle_core::{
    CudaDevice, CudaStorage, Device, Layout, Result, Storage, Tensor, bail,
    cuda_backend::{
        CudaStorageSlice, WrapErr,
        cudarc::driver::{
            CudaContext, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
            sys::{
                CUdevice_attribute, CUmemPool_attribute, CUmemoryPool, CUresult, cuDeviceGetDefaultMemPool,
                cuMemPoolGetAttribute, cuMemPoolSetAttribute,
            },
        },
    },
};

use crate::kernels::gpu::launch::{Launch, THREADS};

/// All kernels; the driver makes machine code of them at the first use.
const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Room for the largest shape of a kernel, which is its last argument; a launch reads as much as the kernel declares.
#[repr(C)]
#[derive(Clone, Copy)]
struct Words([u32; 16]);

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Words {}

/// Nothing, or why no card can be used: no driver, no library, no card.
pub fn is_there() -> std::result::Result<(), String> {
    let why = match CudaContext::device_count() {
        Ok(0) => "there is no card".to_string(),
        Ok(_) => return Ok(()),
        Err(error) => match error.error_string() {
            Ok(words) => words.to_string_lossy().into_owned(),
            Err(_) => format!("{:?}", error.0),
        },
    };
    Err(format!("no card can be used ({why})"))
}

/// The card of that number, with one stream for the work of all threads.
///
/// candle's own `Device::new_cuda` gives each thread a stream of its own, and nothing orders one thread's work behind
/// another's. Here a step's gradient is made on one thread and read on another.
pub fn open(number: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(number)?;
    if let Device::Cuda(card) = &device {
        keep_freed(card);
        // SAFETY: nothing is allocated yet. All work on tensors goes to the one stream, whose order holds for their
        // memory too; the stream that copies weights is ordered behind and before it by the conveyor's own events.
        unsafe { card.disable_event_tracking() };
    }
    Ok(device)
}

/// The pool that the card's memory is taken from; none where the driver is too old for one.
fn pool(card: &CudaDevice) -> Option<CUmemoryPool> {
    let context = card.cuda_stream().context().clone();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the place outlives the call.
    let got = unsafe { cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()) };
    (context.has_async_alloc() && got == CUresult::CUDA_SUCCESS).then_some(pool)
}

/// Has the pool keep what is freed for the next tensors. By itself it gives all of it back whenever the host waits for
/// the card, several times a step, and must map it anew.
fn keep_freed(card: &CudaDevice) {
    if let Some(pool) = pool(card) {
        let mut all = u64::MAX;
        // a refusal costs time alone
        // SAFETY: this attribute is a u64, which outlives the call.
        unsafe {
            cuMemPoolSetAttribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut all).cast());
        }
    }
}

/// Operations a second of the card's matrix units in bf16 with sums in f32, by its kind, its size and its clock:
/// 1.07e15 for an H200, of which a product reaches three quarters.
pub fn peak(card: &CudaDevice) -> Option<f64> {
    let stream = card.cuda_stream();
    let context = stream.context();
    // operations a clock of a multiprocessor: NVIDIA's tables of dense bf16
    let each = match context.compute_capability().ok()? {
        (8, 0) => 2048,
        (9, _) => 4096,
        (10, _) => 8192,
        _ => 512,
    };
    let is = |what| context.attribute(what).ok();
    let many = is(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let kilohertz = is(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
    Some(f64::from(many) * f64::from(kilohertz) * 1e3 * f64::from(each))
}

/// The most bytes that tensors used at once, and that the pool held for them.
pub fn most_used(card: &CudaDevice) -> Option<[u64; 2]> {
    let pool = pool(card)?;
    let most = |attribute| {
        let mut bytes = 0u64;
        // SAFETY: both attributes are a u64, which outlives the call.
        let got = unsafe { cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()) };
        (got == CUresult::CUDA_SUCCESS).then_some(bytes)
    };
    let used = most(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
    Some([used, most(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?])
}

/// See [`crate::kernels::gpu::launch::run`].
pub fn run(device: &CudaDevice, launch: &Launch, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    let function = device.get_or_load_custom_func(launch.kernel, "dpo_lora", PTX)?;
    let stream = device.cuda_stream();
    let held: Vec<_> = inputs.iter().chain(outputs).map(|tensor| tensor.storage_and_layout()).collect();
    let (mut pointers, mut guards) = (Vec::new(), Vec::new());
    for (storage, layout) in &held {
        let Storage::Cuda(storage) = &**storage else { bail!("{}: a tensor is not on the card", launch.kernel) };
        let (pointer, guard) = pointer(storage, layout, &stream)?;
        pointers.push(pointer);
        guards.push(guard);
    }
    let mut words = Words([0; 16]);
    words.0[..launch.words.len()].copy_from_slice(launch.words);
    let mut arguments = function.builder();
    for pointer in &pointers {
        arguments.arg(pointer);
    }
    arguments.arg(&words);
    let [x, y, z] = launch.groups.map(|n| n as u32);
    let grid = LaunchConfig { grid_dim: (x, y, z), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the launchers give each kernel the tensors and the numbers that it declares, of sizes that the tests on
    // the CPU hold with margins around every buffer; `held` keeps them until the work is in the stream, whose order
    // candle's own work on them follows.
    unsafe { arguments.launch(grid) }.w()?;
    Ok(())
}

/// Where a tensor begins on the card. The guard is held until the work that uses it is in the stream.
pub fn pointer<'a>(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    let ((start, guard), size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream), 4),
        CudaStorageSlice::U32(slice) => (slice.device_ptr(stream), 4),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream), 2),
        CudaStorageSlice::U8(slice) => (slice.device_ptr(stream), 1),
        _ => bail!("no kernel takes numbers of this type"),
    };
    Ok((start + (layout.start_offset() * size) as u64, guard))
}
