//! One elementwise pass over flat f32 tensors that writes its first one in place.
//!
//! On the CPU the pass is fused and runs on all cores; as every element depends on its own inputs alone, the result
//! is bit-equal at any number of threads. Other devices take the plain-tensor form that the caller gives.

use candle_core::{CpuStorage, Device, InplaceOp3, Layout, Storage, Tensor, bail};
use rayon::prelude::*;

/// Elements a rayon task: 64 KiB an operand, far above the cost of handing out a task.
const CHUNK: usize = 16 * 1024;

/// `dst[i] = f(dst[i], a[i], b[i])`.
struct Pass<F>(F);

impl<F: Fn(f32, f32, f32) -> f32 + Sync> InplaceOp3 for Pass<F> {
    fn name(&self) -> &'static str {
        "elementwise"
    }

    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        dst_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<()> {
        let CpuStorage::F32(dst) = dst else { bail!("the optimizer's tensors must be f32") };
        let dst = match dst_layout.contiguous_offsets() {
            Some((start, end)) => &mut dst[start..end],
            None => bail!("the optimizer's tensors must be contiguous"),
        };
        let (a, b) = (flat(a, a_layout)?, flat(b, b_layout)?);
        if a.len() != dst.len() || b.len() != dst.len() {
            bail!("the optimizer's tensors differ in length: {}, {}, {}", dst.len(), a.len(), b.len());
        }
        let f = &self.0;
        dst.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(|((dst, a), b)| {
            for ((x, &a), &b) in dst.iter_mut().zip(a).zip(b) {
                *x = f(*x, a, b);
            }
        });
        Ok(())
    }
}

/// The elements of a contiguous f32 tensor on the CPU.
pub(super) fn flat<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("the optimizer's tensors must be contiguous"),
    }
}

/// `dst[i] = f(dst[i], a[i], b[i])` in the storage that `dst` has, so that views of it see the new values; `plain` is
/// the same in tensor operations, for the devices that are not the CPU.
pub(super) fn update(
    dst: &Tensor,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(f32, f32, f32) -> f32 + Sync,
    plain: impl Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<()> {
    if is_fused(dst) { dst.inplace_op3(a, b, &Pass(f)) } else { dst.slice_set(&plain(dst, a, b)?.contiguous()?, 0, 0) }
}

/// Whether `holds` is true of every element of four flat f32 tensors of one length, which are only read: what an update
/// would make is looked at before it is made, since it is made in place.
pub(super) fn all(tensors: [&Tensor; 4], holds: impl Fn([f32; 4]) -> bool + Sync) -> candle_core::Result<bool> {
    // On the CPU this is the tensor itself, not a copy.
    let [a, b, c, d] = tensors.map(|tensor| tensor.to_device(&Device::Cpu));
    let (a, b, c, d) = (a?, b?, c?, d?);
    let ((a, la), (b, lb)) = (a.storage_and_layout(), b.storage_and_layout());
    let ((c, lc), (d, ld)) = (c.storage_and_layout(), d.storage_and_layout());
    let (Storage::Cpu(a), Storage::Cpu(b), Storage::Cpu(c), Storage::Cpu(d)) = (&*a, &*b, &*c, &*d) else {
        bail!("a tensor on the CPU lies elsewhere");
    };
    let (a, b, c, d) = (flat(a, la)?, flat(b, lb)?, flat(c, lc)?, flat(d, ld)?);
    if [b, c, d].iter().any(|other| other.len() != a.len()) {
        bail!("the optimizer's tensors differ in length: {}, {}, {}, {}", a.len(), b.len(), c.len(), d.len());
    }
    let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).zip(c.par_chunks(CHUNK)).zip(d.par_chunks(CHUNK));
    Ok(chunks.all(|(((a, b), c), d)| a.iter().zip(b).zip(c).zip(d).all(|(((&a, &b), &c), &d)| holds([a, b, c, d]))))
}

#[cfg(not(test))]
fn is_fused(dst: &Tensor) -> bool {
    dst.device().is_cpu()
}

#[cfg(test)]
thread_local! {
    /// Takes the plain-tensor form on the CPU too, so that a test without a GPU sees it.
    pub(super) static PLAIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
fn is_fused(dst: &Tensor) -> bool {
    dst.device().is_cpu() && !PLAIN.get()
}
