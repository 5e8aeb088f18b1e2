//! Tensors of the CPU as plain slices: read through their storage's lock, made from a `Vec` without a copy.

use std::{
    mem::MaybeUninit,
    ops::{Deref, Range},
};

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, bail};

/// The elements of a contiguous f32 tensor on the CPU, for as long as the guard of its storage is held.
pub struct Floats<G> {
    storage: G,
    range: Range<usize>,
}

/// Borrows a tensor's elements. Fails on another device, on another type and on a strided view.
pub fn floats(tensor: &Tensor) -> Result<Floats<impl Deref<Target = Storage> + Sync + '_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = range(layout)?;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(Floats { storage, range }),
        _ => bail!("an f32 tensor on the CPU is expected, got {:?} on {:?}", tensor.dtype(), tensor.device()),
    }
}

impl<G: Deref<Target = Storage>> Deref for Floats<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => &[],
        }
    }
}

/// Where a contiguous tensor's elements stand in its storage.
fn range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("a contiguous tensor is expected, got strides {:?} for {:?}", layout.stride(), layout.shape()),
    }
}

/// The elements of an operand of a custom operation.
pub fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(all) => Ok(&all[range(layout)?]),
        _ => bail!("an f32 operand is expected"),
    }
}

/// The elements of the operand that a custom operation changes.
pub fn operand_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(all) => Ok(&mut all[range(layout)?]),
        _ => bail!("an f32 operand is expected"),
    }
}

/// A matrix `[rows, columns]` on the CPU that takes the `Vec` over.
pub fn matrix(elements: Vec<f32>, rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::from_vec(elements, (rows, columns), &Device::Cpu)
}

/// `n` floats, all of which `fill` writes: the zeros of a `vec!` are a pass over memory, made by one thread.
///
/// # Safety
/// `fill` initialises every element.
pub unsafe fn filled(n: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut floats = Vec::with_capacity(n);
    fill(&mut floats.spare_capacity_mut()[..n]);
    // SAFETY: the caller's `fill` has initialised them.
    unsafe { floats.set_len(n) };
    floats
}

/// Σ a·b in sixteen interleaved sums: vectorises, and depends on nothing but the row.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Calls `f` with the bytes of a contiguous f32 tensor of the CPU, in the order of this machine.
pub fn bytes<T>(tensor: &Tensor, f: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let floats = floats(tensor)?;
    // SAFETY: every float is four bytes without padding, all of them initialised, and the borrow outlives the call.
    Ok(f(unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(&*floats)) }))
}

/// `n` floats from the bytes that `f` fills in, in the order of this machine.
pub fn floats_from(n: usize, f: impl FnOnce(&mut [u8]) -> std::io::Result<()>) -> std::io::Result<Vec<f32>> {
    let mut floats = vec![0f32; n];
    // SAFETY: any four bytes are a float, and the borrow ends before the floats are used again.
    f(unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(&*floats)) })?;
    Ok(floats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_floats_come_back_as_they_were() {
        let tensor = matrix(vec![1.0, -0.0, f32::MIN_POSITIVE, 3.5, f32::MAX, -7.25], 3, 2).unwrap();
        // a view that begins within the storage
        let view = tensor.narrow(0, 1, 2).unwrap();
        let copy = bytes(&view, <[u8]>::to_vec).unwrap();
        let back = floats_from(4, |out| {
            out.copy_from_slice(&copy);
            Ok(())
        });
        assert_eq!(back.unwrap(), [f32::MIN_POSITIVE, 3.5, f32::MAX, -7.25]);
        assert!(bytes(&tensor.t().unwrap(), <[u8]>::len).is_err(), "a strided view has no bytes in a row");
        let failed = floats_from(1, |_| Err(std::io::ErrorKind::UnexpectedEof.into()));
        assert_eq!(failed.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}
