//! Bytes where they lie in a mapped file, and what a stored matrix is to a product.

use std::{
    fmt,
    fs::File,
    io,
    ops::{Deref, Range},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{Advice, Mmap, UncheckedAdvice};

use super::{DType, upload::Uploader};
use crate::{
    Error,
    kernels::{
        compute::Compute,
        dequantise::{Form, Numbers},
        held::DECODED,
        simd::{self, Cache},
    },
};

/// Columns in a decoded tile start at multiples of this; every quantised format's smallest block divides it or is it.
pub const ALIGN: usize = DECODED;

/// A file, mapped and open: its bytes are read where they lie, or copied by the system.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    file: File,
    path: PathBuf,
}

impl MappedFile {
    /// Maps a file that was opened at `path`. It stays valid only while nobody shortens the file.
    ///
    /// # Errors
    /// The system's, where it cannot be mapped.
    pub fn new(file: File, path: &Path) -> io::Result<Self> {
        // SAFETY: the map is read-only and private to the process's view of the file; the documented demand on the
        // caller is that no other program shortens or rewrites the weights while they are in use.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { map, file, path: path.to_path_buf() })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// A run of bytes of a mapped file, aligned to nothing. A clone is another view of the same bytes.
#[derive(Clone)]
pub struct MappedBytes {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl MappedBytes {
    /// The bytes `range` of `file`.
    ///
    /// # Panics
    /// Where the range is not in the file.
    pub fn new(file: Arc<MappedFile>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= file.len(), "{range:?} of a file of {} bytes", file.len());
        Self { file, range }
    }

    /// Copies the bytes from the `start`-th on to `out`, without touching the map: no page is mapped for it and let go
    /// of again, which takes longer than the copy (half of it on two machines), and a disk that fails is an error.
    ///
    /// # Errors
    /// [`Error::Input`] that names the file.
    pub fn copy(&self, start: usize, out: &mut [u8]) -> crate::Result<()> {
        let at = (self.range.start + start) as u64;
        self.file.file.read_exact_at(out, at).map_err(|error| Error::reading(&self.file.path, error))
    }

    /// Asks the system to read these bytes ahead. A hint: nothing depends on it.
    pub fn will_need(&self) {
        self.file.map.advise_range(Advice::WillNeed, self.range.start, self.range.len()).ok();
    }

    /// Lets go of the pages: they are read from the file again when next used. A hint: nothing depends on it.
    pub fn done_with(&self) {
        // SAFETY: the map is shared and read-only, so a dropped page comes back from the file with the same bytes.
        unsafe { self.file.map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.range.start, self.range.len()) }
            .ok();
    }
}

/// Asks the processor to fetch a range of `bytes` that is read soon, where they have it. A hint: nothing depends on it.
#[inline(always)]
pub fn fetch(bytes: &[u8], range: Range<usize>) {
    if let Some(bytes) = bytes.get(range) {
        simd::fetch(bytes, Cache::First);
    }
}

impl Deref for MappedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

impl fmt::Debug for MappedBytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} mapped bytes", self.range.len())
    }
}

/// A stored matrix, whatever its format, that decodes tiles of itself as f32.
pub trait StoredMatrix: fmt::Debug + Send + Sync {
    /// Fills `out` with `rows` × `columns`, row after row. `columns` starts at a multiple of [`ALIGN`] and ends at one
    /// or at the last column; both lie in the matrix, and `out` has exactly their size.
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);

    /// Everything of it that lies in files.
    fn parts(&self) -> Vec<&MappedBytes>;

    /// Bytes that it takes in its files.
    fn stored_bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }

    /// Row-major bf16, where that is what is stored: packed for bf16 products without a way through f32.
    fn bf16(&self) -> Option<&[u8]> {
        None
    }

    /// Whether every number that [`StoredMatrix::decode`] gives is a bf16 exactly: rounding it to one changes nothing.
    fn exact_in_bf16(&self) -> bool {
        false
    }

    /// The matrix `[rows, columns]` on a device: in its stored form where that has one there, else decoded to the type
    /// in which it multiplies.
    ///
    /// # Errors
    /// Where the device has no room.
    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        uploader.decoded(self, rows, columns)
    }

    /// Bytes that the matrix of so many numbers takes on a device, multiplying in `compute`.
    fn device_bytes(&self, numbers: usize, compute: Compute) -> usize {
        numbers * compute.size()
    }

    /// Whether the numbers of the matrix lie there as a product in `compute` takes them.
    fn is_plain_on_device(&self, numbers: usize, compute: Compute) -> bool {
        self.device_bytes(numbers, compute) == numbers * compute.size()
    }
}

/// A tensor of plain numbers where it lies in its file. A clone is another view of the same bytes.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    /// Row-major, little-endian.
    pub bytes: MappedBytes,
    /// How its numbers are stored.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl MappedTensor {
    /// The stored bytes, row-major, little-endian, aligned to nothing.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// A widened copy, for small tensors.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.dtype.decode(&self.bytes, &mut out);
        out
    }
}

impl StoredMatrix for MappedTensor {
    fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (size, width) = (self.dtype.size(), self.shape.last().copied().unwrap_or(1));
        for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len())) {
            // the same columns of the tile below, which most often comes next
            let below = (row + rows.len()) * width;
            fetch(&self.bytes, (below + columns.start) * size..(below + columns.end) * size);
            let at = row * width;
            self.dtype.decode(&self.bytes[(at + columns.start) * size..(at + columns.end) * size], out);
        }
    }

    fn parts(&self) -> Vec<&MappedBytes> {
        vec![&self.bytes]
    }

    fn bf16(&self) -> Option<&[u8]> {
        (self.dtype == DType::BF16).then_some(&*self.bytes)
    }

    fn exact_in_bf16(&self) -> bool {
        self.dtype == DType::BF16
    }

    fn on_device(&self, rows: usize, columns: usize, uploader: &Uploader) -> candle_core::Result<Form> {
        let numbers = uploader.raw(&self.bytes, self.dtype.into())?.reshape((rows, columns))?;
        Ok(Form { rows, columns, numbers: Numbers::Plain(numbers) })
    }

    fn device_bytes(&self, _: usize, _: Compute) -> usize {
        self.bytes.len()
    }

    fn is_plain_on_device(&self, _: usize, compute: Compute) -> bool {
        self.dtype
            == match compute {
                Compute::F32 => DType::F32,
                Compute::Bf16 => DType::BF16,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_copied_from_the_file_and_a_file_that_was_cut_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        let file = Arc::new(MappedFile::new(File::open(&path).unwrap(), &path).unwrap());
        let (bytes, mut out) = (MappedBytes::new(file, 10..90), [0; 5]);
        bytes.copy(20, &mut out).unwrap();
        assert_eq!((out, &bytes[20..25]), ([30, 31, 32, 33, 34], &[30, 31, 32, 33, 34][..]));
        File::options().write(true).open(&path).unwrap().set_len(32).unwrap();
        let error = bytes.copy(20, &mut out).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
