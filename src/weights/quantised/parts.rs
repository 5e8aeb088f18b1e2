//! The tensors that make up a quantised matrix, taken out of a model's by name with dtype and shape checked.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::Tensor;

use crate::weights::dtype::DType;
use crate::weights::folder::Held;
use crate::weights::mapped::{MappedBytes, fetch};
use crate::weights::stored::StoredTensor;
use crate::weights::upload::Uploader;
use crate::{Error, Result};

/// A model's tensors, from which parts are taken.
pub struct Parts<'a> {
    path: &'a Path,
    tensors: &'a mut BTreeMap<String, Held>,
}

/// Plain numbers beside a quantised matrix, read one at a time.
#[derive(Debug)]
pub struct Floats {
    pub bytes: MappedBytes,
    pub dtype: DType,
}

/// [`Floats`] at hand.
#[derive(Clone, Copy)]
pub struct View<'a> {
    bytes: &'a [u8],
    dtype: DType,
}

impl View<'_> {
    #[inline(always)]
    pub fn at(&self, index: usize) -> f32 {
        self.dtype.at(self.bytes, index)
    }

    /// So many from a place on.
    #[inline(always)]
    pub fn read(&self, from: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        self.dtype.decode_here(&self.bytes[from * size..(from + out.len()) * size], out);
    }
}

impl Floats {
    /// Where loops take them from.
    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        View { bytes: &self.bytes, dtype: self.dtype }
    }

    /// Has some of them fetched, as [`fetch`] does.
    #[inline(always)]
    pub fn fetch(&self, range: Range<usize>) {
        let size = self.dtype.size();
        fetch(&self.bytes, range.start * size..range.end * size);
    }

    /// One of them.
    pub fn at(&self, index: usize) -> f32 {
        self.view().at(index)
    }

    /// All of them on a device, as f32.
    pub fn on_device(&self, uploader: &Uploader) -> candle_core::Result<Tensor> {
        uploader.widened(&self.bytes, self.dtype)
    }
}

/// Raw numbers of a part, with its shape.
pub struct Raw {
    pub bytes: MappedBytes,
    pub shape: Vec<usize>,
}

impl<'a> Parts<'a> {
    pub fn new(path: &'a Path, tensors: &'a mut BTreeMap<String, Held>) -> Self {
        Self { path, tensors }
    }

    /// What precedes `suffix` in the names that end in it.
    pub fn modules(&self, suffix: &str) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_suffix(suffix)).map(str::to_string).collect()
    }

    /// Whether a tensor is there and of this dtype (its name in the header).
    pub fn is(&self, name: &str, dtype: &str) -> bool {
        matches!(self.tensors.get(name), Some(Held::Unread(unread)) if unread.format == dtype)
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn bad(&self, name: &str, reason: &str) -> Error {
        Error::input(format!("{}: tensor {name:?} {reason}; fetch the model's files again", self.path.display()))
    }

    /// Of a good file, in a way that is not read here.
    pub fn unread(&self, name: &str, reason: &str) -> Error {
        Error::input(format!(
            "{}: tensor {name:?} {reason}, which is not read; use the unquantised checkpoint",
            self.path.display()
        ))
    }

    /// Takes a tensor of integers or bytes.
    pub fn raw(&mut self, name: &str, dtype: &str) -> Result<Raw> {
        match self.has(name) && !self.is(name, dtype) {
            true => Err(self.bad(name, &format!("is not stored as {dtype}"))),
            false => self.bytes(name),
        }
    }

    /// Takes the bytes of a tensor, whatever its numbers are said to be.
    pub fn bytes(&mut self, name: &str) -> Result<Raw> {
        match self.tensors.remove(name) {
            None => Err(self.bad(name, "is missing beside the others of its matrix")),
            Some(Held::Unread(unread)) => Ok(Raw { bytes: unread.bytes, shape: unread.shape }),
            Some(Held::Plain(tensor)) => Ok(Raw { bytes: tensor.bytes, shape: tensor.shape }),
            Some(_) => Err(self.bad(name, "is not stored as plain bytes")),
        }
    }

    /// Takes a tensor of two dimensions, neither of them 0.
    pub fn raw_matrix(&mut self, name: &str, dtype: &str) -> Result<(MappedBytes, [usize; 2])> {
        let Raw { bytes, shape } = self.raw(name, dtype)?;
        match shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok((bytes, [rows, columns])),
            _ => Err(self.bad(name, &format!("has the shape {shape:?} where a matrix is due"))),
        }
    }

    /// Takes plain numbers, of whatever shape.
    pub fn any_floats(&mut self, name: &str) -> Result<(Floats, Vec<usize>)> {
        match self.tensors.remove(name) {
            None => Err(self.bad(name, "is missing beside the others of its matrix")),
            Some(Held::Plain(tensor)) => {
                let shape = tensor.shape.clone();
                Ok((Floats { dtype: tensor.dtype, bytes: tensor.bytes }, shape))
            }
            Some(_) => Err(self.bad(name, "is not stored as F32, F16 or BF16")),
        }
    }

    /// Takes plain numbers of this shape.
    pub fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Floats> {
        let (floats, stated) = self.any_floats(name)?;
        if stated == shape { Ok(floats) } else { Err(self.misfit(name, &stated, shape)) }
    }

    pub fn misfit(&self, name: &str, stated: &[usize], due: &[usize]) -> Error {
        self.bad(name, &format!("has the shape {stated:?} where {due:?} is due beside the others of its matrix"))
    }

    /// Drops a tensor that says nothing of the numbers, where it is there.
    pub fn drop_part(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Puts a whole matrix in the place of its parts.
    pub fn put(&mut self, name: String, tensor: StoredTensor) -> Result<()> {
        if self.tensors.contains_key(&name) {
            return Err(self.bad(&name, "stands both quantised and plain"));
        }
        self.tensors.insert(name, Held::Quantised(tensor));
        Ok(())
    }
}
