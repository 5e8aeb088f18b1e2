//! What several test files share.

use std::path::PathBuf;

/// The folder or file that the environment variable `name` names, for a test that needs what the repository does not
/// carry (a real model, other programs). `.ci/run` sets all of these variables.
///
/// Unset, the test is to skip: `None`, and a line that says so. With `DPO_LORA_REQUIRE_ALL=1` that is a failure
/// instead, so that a complete run cannot skip by mistake.
///
/// # Panics
/// If the variable is unset and all are required, or if nothing lies where it points.
pub fn required_env(name: &str) -> Option<PathBuf> {
    match std::env::var_os(name).filter(|v| !v.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.exists(), "{name}={}: nothing is there", path.display());
            Some(path)
        }
        None => {
            let all = std::env::var_os("DPO_LORA_REQUIRE_ALL").is_some_and(|v| v == "1");
            assert!(!all, "{name} is not set, and DPO_LORA_REQUIRE_ALL=1 lets no test skip");
            eprintln!("skipped: {name} is not set");
            None
        }
    }
}
