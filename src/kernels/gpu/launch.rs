//! One launch of a kernel: its grid, its tensors and its numbers, on whatever device the tensors are.

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

/// Threads of a threadgroup (CUDA: of a block), as `common.cu` and `common.metal` have it.
pub const THREADS: usize = 256;

/// Which kernel, and over what.
pub struct Launch<'a> {
    /// One of [`super::KERNELS`], or of CUDA's on the matrix unit.
    pub kernel: &'static str,
    /// Threadgroups along x, y and z.
    pub groups: [usize; 3],
    /// The fields of the kernel's shape, each as the 32 bits that it has there.
    pub words: &'a [u32],
}

/// Whether this is a card, or a Mac's GPU on which the shaders compiled.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub fn compiled(device: &Device) -> bool {
    match device {
        #[cfg(feature = "metal")]
        Device::Metal(device) => crate::kernels::metal::device::pipelines(device).is_some(),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => true,
        _ => false,
    }
}

/// Whether the kernels do the work on this tensor: f32, where they compiled.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub fn serves(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && compiled(x.device())
}

/// Runs a kernel over `inputs`, `outputs` and the words, which are its arguments in this order. Inputs and outputs are
/// contiguous; outputs are changed in place.
pub fn run(launch: &Launch, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    for tensor in inputs.iter().chain(outputs) {
        // the kernels count in 32 bits
        if !tensor.is_contiguous() || tensor.elem_count() > u32::MAX as usize - THREADS {
            bail!("{}: a tensor {:?} is not contiguous or too large", launch.kernel, tensor.shape());
        }
    }
    // GPUs know no empty grid
    if launch.groups.contains(&0) {
        return Ok(());
    }
    #[cfg(test)]
    LAUNCHED.with_borrow_mut(|kernels| kernels.push(launch.kernel));
    match outputs[0].device() {
        #[cfg(feature = "metal")]
        Device::Metal(device) => crate::kernels::metal::device::run(device, launch, inputs, outputs),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::kernels::cuda::device::run(device, launch, inputs, outputs),
        #[cfg(test)]
        Device::Cpu => super::host::run(launch, inputs, outputs),
        other => bail!("{}: no kernel for {other:?}", launch.kernel),
    }
}

#[cfg(test)]
thread_local! {
    static LAUNCHED: std::cell::RefCell<Vec<&'static str>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// The kernels that this thread has launched since this was last called.
#[cfg(test)]
pub fn launched() -> Vec<&'static str> {
    LAUNCHED.take()
}

/// Room for a result, which a kernel fills whole.
pub fn room(shape: impl Into<Shape>, like: &Tensor) -> Result<Tensor> {
    room_for(shape, DType::F32, like)
}

/// The same for numbers of another type.
pub fn room_for(shape: impl Into<Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    #[cfg(test)]
    if like.device().is_cpu() {
        return Tensor::full(f32::NAN, shape.into(), like.device())?.to_dtype(dtype);
    }
    // SAFETY: the kernels write every element before anything reads the tensor; the GPU works in the order of the
    // calls.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

/// Threadgroups for a thread an element.
pub fn a_thread_each(elements: usize) -> [usize; 3] {
    [elements.div_ceil(THREADS), 1, 1]
}
