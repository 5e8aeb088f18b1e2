//! SHA-256 of files, and digests as they are written down.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Adds a file's bytes to what is hashed, and says how many they are. They are read in the ordinary way, not through a
/// map, so that none of its pages count as this process's memory.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn add(hash: &mut Sha256, path: &Path) -> io::Result<u64> {
    let (mut file, mut bytes, mut buffer) = (File::open(path)?, 0, vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(bytes),
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
