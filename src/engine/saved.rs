//! The layers' inputs between the forward and the backward pass: in memory, a card's in the host's, or in a file that
//! vanishes with its handle.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};

#[cfg(feature = "cuda")]
use crate::kernels::cuda::pinned::Pinned;

use crate::{
    Error, Result,
    kernels::host::{bytes, floats_from},
};

/// Numbers of a sweep that a card's host may hold, 2 GiB.
const ON_HOST: usize = 512 << 20;

/// Whether so many numbers of a sweep, where they are not to stay where they are computed, wait in the host's memory: a
/// CUDA card's, if they are not too many. All others wait in a file.
pub fn wait_on_host(card: bool, numbers: usize) -> bool {
    card && numbers <= ON_HOST
}

/// Tensors by the order in which they were put in; each is taken once.
pub struct Inputs(Place);

enum Place {
    Memory(Vec<Option<Tensor>>),
    #[cfg(feature = "cuda")]
    Pinned(Pinned),
    File(Scratch),
}

impl Inputs {
    /// Keeps tensors in memory.
    pub fn in_memory() -> Self {
        Self(Place::Memory(Vec::new()))
    }

    /// Keeps so many numbers of a device elsewhere: in the host's memory where they [`wait_on_host`], else in a file of
    /// their own in `folder`, as where the host has no room that the card can reach.
    ///
    /// # Errors
    /// [`Error::Run`] where the file cannot be made.
    pub fn aside(device: &Device, numbers: usize, folder: &Path) -> Result<Self> {
        let on_host = wait_on_host(device.is_cuda(), numbers).then(|| Self::on_host(device, numbers)).flatten();
        on_host.map_or_else(|| Self::in_file(folder), Ok)
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn on_host(device: &Device, numbers: usize) -> Option<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(card) => Pinned::new(card, numbers).ok().map(|pinned| Self(Place::Pinned(pinned))),
            _ => None,
        }
    }

    fn in_file(folder: &Path) -> Result<Self> {
        Ok(Self(Place::File(Scratch::create(folder)?)))
    }

    /// Puts an f32 tensor in.
    pub fn put(&mut self, tensor: Tensor) -> Result<()> {
        match &mut self.0 {
            Place::Memory(all) => all.push(Some(tensor)),
            #[cfg(feature = "cuda")]
            Place::Pinned(pinned) => pinned.put(&tensor)?,
            Place::File(scratch) => scratch.append(&tensor)?,
        }
        Ok(())
    }

    /// Takes the `index`-th tensor out.
    ///
    /// # Panics
    /// Where there is none, or it was taken before.
    pub fn take(&mut self, index: usize) -> Result<Tensor> {
        match &mut self.0 {
            Place::Memory(all) => Ok(all[index].take().expect("an input is taken once")),
            #[cfg(feature = "cuda")]
            Place::Pinned(pinned) => Ok(pinned.get(index)?),
            Place::File(scratch) => scratch.read(index),
        }
    }
}

/// A file without a name: its space comes back whatever ends this process.
struct Scratch {
    file: File,
    folder: PathBuf,
    end: u64,
    entries: Vec<Entry>,
}

struct Entry {
    at: u64,
    shape: (usize, usize),
    device: Device,
}

impl Scratch {
    fn create(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(|error| Error::writing(folder, error))?;
        Ok(Self { file, folder: folder.to_path_buf(), end: 0, entries: Vec::new() })
    }

    fn append(&mut self, tensor: &Tensor) -> Result<()> {
        let host = tensor.to_device(&Device::Cpu)?;
        let written = bytes(&host, |bytes| {
            self.file.seek(SeekFrom::Start(self.end))?;
            self.file.write_all(bytes)?;
            Ok(bytes.len())
        })?;
        let written = written.map_err(|error: std::io::Error| Error::writing(&self.folder, error))?;
        self.entries.push(Entry { at: self.end, shape: tensor.dims2()?, device: tensor.device().clone() });
        self.end += written as u64;
        Ok(())
    }

    fn read(&mut self, index: usize) -> Result<Tensor> {
        let Entry { at, shape, device } = &self.entries[index];
        let read = floats_from(shape.0 * shape.1, |bytes| {
            self.file.seek(SeekFrom::Start(*at))?;
            self.file.read_exact(bytes)
        });
        let values = read.map_err(|error| Error::reading(&self.folder, error))?;
        Ok(Tensor::from_vec(values, *shape, device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{random, worst};

    #[test]
    fn what_is_put_comes_back_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = [random((3, 5), 1), random((1, 7), 2), random((4, 2), 3)];
        let places = [Inputs::in_memory(), Inputs::in_file(folder.path()).unwrap()];
        for mut inputs in places {
            tensors.iter().for_each(|tensor| inputs.put(tensor.clone()).unwrap());
            for index in [1, 0, 2] {
                assert_eq!(worst(&inputs.take(index).unwrap(), &tensors[index]), 0.0);
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let error = Inputs::in_file(Path::new("/there/is/none")).err().unwrap();
        assert!(error.to_string().contains("/there/is/none"), "{error}");
    }
}
