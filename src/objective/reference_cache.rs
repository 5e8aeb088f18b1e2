//! The reference's summed log-probs on disk, so that they are computed once a row.
//!
//! The file is a header (magic, key, checksum) and then one record a row (hash of its tokens, the two sums, checksum),
//! all little-endian. Records are appended only: whatever a crash leaves behind a whole record is cut off when the file
//! is opened again. A file under another key, or one that is no such file, is started afresh. Sums that are not finite
//! are never put there, and end the valid part where they are found.

use std::collections::HashMap;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use flate2::Crc;

use crate::data::{TokenizedPair, fingerprint};
use crate::store::disk::File;
use crate::{Error, Result};

/// Names the format; a change of the layout changes the last digit.
const MAGIC: &[u8; 16] = b"dpo-lora refs 1\n";
const HASH: usize = 32;
const CHECKSUM: usize = 4;
const HEADER: usize = MAGIC.len() + HASH + CHECKSUM;
const SUMS: usize = 2 * size_of::<f64>();
/// Bytes that a row takes in the file.
pub const RECORD: usize = HASH + SUMS + CHECKSUM;

/// Log-probs of the reference by row.
#[derive(Debug)]
pub struct ReferenceCache {
    path: PathBuf,
    rows: HashMap<[u8; HASH], [f64; 2]>,
    out: BufWriter<File>,
}

impl ReferenceCache {
    /// Opens or starts the cache of so many `rows` at `path`. `key` names everything besides the row that the log-probs
    /// depend on: base, start adapter, arithmetic, version of the code.
    pub fn open(path: &Path, key: [u8; HASH], rows: usize) -> Result<Self> {
        let writing = |error| Error::writing(path, error);
        let mut file = File::create_or_open(path).map_err(writing)?;
        let header = header(&key);
        let mut rows = HashMap::with_capacity(rows);
        let mut records = BufReader::new(&mut file);
        let mut next = |bytes: &mut [u8]| match records.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(Error::reading(path, error)),
        };
        let mut found = vec![0; HEADER];
        if next(&mut found)? && found == header {
            let (mut valid, mut record) = (HEADER as u64, [0; RECORD]);
            while next(&mut record)? {
                let Some((row, sums)) = parse(&record) else { break };
                rows.insert(row, sums);
                valid += RECORD as u64;
            }
            file.set_len(valid).map_err(writing)?;
            file.seek(SeekFrom::Start(valid)).map_err(writing)?;
        } else {
            file.set_len(0).map_err(writing)?;
            file.rewind().map_err(writing)?;
            file.write_all(&header).map_err(writing)?;
        }
        Ok(Self { path: path.to_path_buf(), rows, out: BufWriter::new(file) })
    }

    /// Bytes that a cache of so many rows holds: of its table's places, a power of two, at most seven eighths are
    /// taken, and each has a byte beside it.
    pub fn bytes(rows: usize) -> usize {
        (rows * 8).div_ceil(7).next_power_of_two() * (HASH + SUMS + 1)
    }

    /// Summed log-probs of the row's chosen and rejected answer, where they are known.
    pub fn get(&self, row: &[u8; HASH]) -> Option<[f64; 2]> {
        self.rows.get(row).copied()
    }

    /// Keeps a row's sums, bit for bit. A row that is known already is left as it is.
    pub fn put(&mut self, row: [u8; HASH], sums: [f64; 2]) -> Result<()> {
        if self.rows.contains_key(&row) {
            return Ok(());
        }
        let mut record = Vec::with_capacity(RECORD);
        record.extend(row);
        record.extend(sums.into_iter().flat_map(f64::to_le_bytes));
        record.extend(checksum(&record));
        self.out.write_all(&record).map_err(|error| Error::writing(&self.path, error))?;
        self.rows.insert(row, sums);
        Ok(())
    }

    /// Brings all that was put to the disk.
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().and_then(|()| self.out.get_ref().sync()).map_err(|error| Error::writing(&self.path, error))
    }
}

/// The name of a row in the cache: a hash of its tokens by part.
pub fn row_hash(pair: &TokenizedPair) -> [u8; HASH] {
    fingerprint(std::slice::from_ref(pair))
}

fn header(key: &[u8; HASH]) -> Vec<u8> {
    let mut header = [MAGIC.as_slice(), key].concat();
    header.extend(checksum(&header));
    header
}

/// A record's row and sums; none where it is cut short or damaged, or holds what never belonged there.
fn parse(record: &[u8]) -> Option<([u8; HASH], [f64; 2])> {
    let (content, sum) = record.split_at_checked(RECORD - CHECKSUM)?;
    if sum != checksum(content) {
        return None;
    }
    let (row, sums) = content.split_first_chunk::<HASH>()?;
    let (chosen, rejected) = sums.split_first_chunk::<8>()?;
    let sums = [f64::from_le_bytes(*chosen), f64::from_le_bytes(rejected.try_into().ok()?)];
    sums.iter().all(|sum| sum.is_finite()).then_some((*row, sums))
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; HASH] = [7; HASH];

    fn row(n: u32) -> [u8; HASH] {
        row_hash(&TokenizedPair { prompt: vec![1, n], chosen: vec![2], rejected: vec![3, 2], origin: (0, n) })
    }

    /// A cache of three rows, closed again.
    fn three_rows(path: &Path) -> Result<()> {
        let mut cache = ReferenceCache::open(path, KEY, 8)?;
        for n in 0..3 {
            cache.put(row(n), [-0.1 - f64::from(n), -1.0 / 3.0])?;
        }
        cache.flush()
    }

    #[test]
    fn sums_come_back_bit_for_bit_and_rows_can_be_added() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("reference.cache");
        three_rows(&path)?;
        let mut cache = ReferenceCache::open(&path, KEY, 8)?;
        assert_eq!((cache.rows.len(), cache.get(&row(9))), (3, None));
        assert_eq!(cache.get(&row(2)), Some([-2.1, -1.0 / 3.0]));
        cache.put(row(9), [f64::from(-1.5f32), -2.0])?;
        cache.put(row(9), [0.0, 0.0])?;
        cache.flush()?;
        let cache = ReferenceCache::open(&path, KEY, 8)?;
        assert_eq!((cache.rows.len(), cache.get(&row(9))), (4, Some([-1.5, -2.0])));
        Ok(())
    }

    #[test]
    fn another_key_or_another_file_starts_afresh() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("reference.cache");
        three_rows(&path)?;
        assert!(ReferenceCache::open(&path, [8; HASH], 8)?.rows.is_empty());
        assert!(ReferenceCache::open(&path, KEY, 8)?.rows.is_empty());
        std::fs::write(&path, b"something else").expect("written");
        assert!(ReferenceCache::open(&path, KEY, 8)?.rows.is_empty());
        Ok(())
    }

    #[test]
    fn a_crash_at_any_byte_leaves_a_valid_prefix() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("reference.cache");
        three_rows(&path)?;
        let whole = std::fs::read(&path).expect("the cache");
        assert_eq!(whole.len(), HEADER + 3 * RECORD);
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).expect("written");
            let mut cache = ReferenceCache::open(&path, KEY, 8)?;
            let expected = length.saturating_sub(HEADER) / RECORD;
            assert_eq!(cache.rows.len(), expected, "cut to {length} bytes");
            cache.put(row(5), [-5.0, -6.0])?;
            cache.flush()?;
            assert_eq!(ReferenceCache::open(&path, KEY, 8)?.rows.len(), expected + 1, "cut to {length} bytes");
        }
        Ok(())
    }

    #[test]
    fn a_damaged_record_ends_the_valid_part() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("reference.cache");
        three_rows(&path)?;
        let mut bytes = std::fs::read(&path).expect("the cache");
        bytes[HEADER + RECORD + HASH + 3] ^= 1;
        std::fs::write(&path, bytes).expect("written");
        let cache = ReferenceCache::open(&path, KEY, 8)?;
        assert_eq!((cache.rows.len(), cache.get(&row(1))), (1, None));
        Ok(())
    }

    #[test]
    fn sums_that_are_not_finite_end_the_valid_part_however_well_they_are_sealed() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("reference.cache");
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            three_rows(&path)?;
            let mut bytes = std::fs::read(&path).expect("the cache");
            let (start, end) = (HEADER + RECORD, HEADER + 2 * RECORD);
            bytes[start + HASH..start + HASH + 8].copy_from_slice(&bad.to_le_bytes());
            let seal = checksum(&bytes[start..end - CHECKSUM]);
            bytes[end - CHECKSUM..end].copy_from_slice(&seal);
            std::fs::write(&path, bytes).expect("written");
            let cache = ReferenceCache::open(&path, KEY, 8)?;
            assert_eq!((cache.rows.len(), cache.get(&row(1))), (1, None), "{bad}");
        }
        Ok(())
    }

    #[test]
    fn a_row_is_named_by_where_its_parts_meet() {
        let pair = |prompt: &[u32], chosen: &[u32]| TokenizedPair {
            prompt: prompt.to_vec(),
            chosen: chosen.to_vec(),
            rejected: vec![4],
            origin: (0, 1),
        };
        assert_ne!(row_hash(&pair(&[1, 2], &[3])), row_hash(&pair(&[1], &[2, 3])));
    }
}
