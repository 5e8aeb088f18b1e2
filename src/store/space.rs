//! Room on a disk, asked for before it is needed.

use std::path::Path;

use crate::{Error, Result};

/// Bytes that this user may still write where `path` lies or will lie; none where the system does not say.
pub fn available(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
        let found = rustix::fs::statvfs(there).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Refuses to begin `what`, which will write `needed` bytes at `path` or in the folder there, where they do not fit.
/// Where the system does not say how much room there is, nothing is refused.
///
/// # Errors
/// [`Error::Resource`] with both figures and the `remedy`.
pub fn require(path: &Path, needed: u64, what: &str, remedy: &str) -> Result<()> {
    match available(path) {
        Some(room) if room < needed => Err(Error::Resource(format!(
            "{}: {what} needs {} on this disk and {} are free; {remedy}",
            path.display(),
            megabytes(needed),
            megabytes(room)
        ))),
        _ => Ok(()),
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_known_and_more_than_it_is_refused() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        for path in [here, &here.join("none/here"), Path::new("a-name"), Path::new("")] {
            require(path, 1, "a byte", "").expect("a byte fits");
            if let Some(room) = available(path) {
                assert!(room > 0);
                let error = require(path, u64::MAX, "everything", "take less").expect_err("no disk is that large");
                assert_eq!(error.exit_code(), 4);
                let said = error.to_string();
                assert!(said.contains("everything needs 18446744073710 MB on this disk"), "{said}");
                assert!(said.ends_with(" are free; take less"), "{said}");
            }
        }
    }
}
