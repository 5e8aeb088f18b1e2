//! Room on a disk, asked for before it is needed.

use std::path::Path;

use crate::{Error, Result};

/// Bytes that this user may still write where `path` lies, a folder that exists; none where the system does not say.
pub fn available(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(path).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Refuses to begin what will write `needed` bytes into the folder `path` where they do not fit. Where the system does
/// not say how much room there is, nothing is refused.
///
/// # Errors
/// [`Error::Resource`] with both figures.
pub fn require(path: &Path, needed: u64, what: &str) -> Result<()> {
    match available(path) {
        Some(room) if room < needed => Err(Error::Resource(format!(
            "{}: {what} needs {} on this disk and {} are free; make room, write to another disk, or keep fewer \
             checkpoints (train.keep_checkpoints)",
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
        require(here, 1, "a byte").expect("a byte fits");
        if let Some(room) = available(here) {
            assert!(room > 0);
            let error = require(here, u64::MAX, "everything").expect_err("no disk is that large");
            assert_eq!(error.exit_code(), 4);
            assert!(error.to_string().contains("everything needs 18446744073710 MB on this disk"), "{error}");
        }
    }
}
