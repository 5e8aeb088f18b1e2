//! One writer a run's folder: a lock that the system takes back when the process ends, however it ends.
//!
//! The lock is on `.lock` in the folder (`flock` on Unix, `LockFileEx` on Windows), which also says who took it last.
//! The file stays: removing it would let two processes hold a lock on two files of one name.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The lock's file in a run's folder.
pub const LOCK: &str = ".lock";

/// The right to write to a run's folder, for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    /// None where the file system knows no locks.
    _file: Option<File>,
}

/// Who took a lock.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    host: String,
    /// Seconds since 1970.
    since: u64,
}

impl Lock {
    /// Takes the lock of a folder that exists.
    ///
    /// # Errors
    /// [`Error::Run`] naming the holder, where another process has it.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        let writing = |error| Error::writing(&path, error);
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(writing)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(folder, fs::read_to_string(&path).ok())),
            // Some network file systems know no locks; a run there is as safe as it was before there were any.
            Err(TryLockError::Error(_)) => return Ok(Self { _file: None }),
        }
        let holder = serde_json::to_string(&Holder { pid: std::process::id(), host: host(), since: now() });
        let text = holder.map_err(|error| Error::run(format!("{}: {error}", path.display())))? + "\n";
        file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(writing)?;
        Ok(Self { _file: Some(file) })
    }
}

fn held(folder: &Path, said: Option<String>) -> Error {
    // On Windows what is locked cannot be read.
    let who = match said.and_then(|said| serde_json::from_str::<Holder>(&said).ok()) {
        Some(Holder { pid, host, since }) => format!("process {pid} on {host} since {}", utc(since)),
        None => "another process".to_string(),
    };
    Error::run(format!(
        "{}: {who} writes to this run's folder; wait for it, stop it, or name another folder as run.output",
        folder.display()
    ))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(unix)]
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_else(|_| "this machine".into())
}

/// Seconds since 1970 as `2026-11-24 02:17:49 UTC`; the calendar as Howard Hinnant's `civil_from_days` counts it.
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_holds_it_and_gets_it_afterwards() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let first = Lock::take(folder.path())?;
        // Locks are between open files, so that two in one process are as two processes.
        let error = Lock::take(folder.path()).expect_err("held");
        let said = error.to_string();
        assert_eq!(error.exit_code(), 1);
        assert!(said.contains(&format!("process {} on {} since 20", std::process::id(), host())), "{said}");
        drop(first);
        Lock::take(folder.path())?;
        Ok(())
    }

    #[test]
    fn what_a_dead_process_left_in_the_file_does_not_matter() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        for left in ["", "half a li", "{\"pid\":1,\"host\":\"elsewhere and a very long name of it\",\"since\":5}\n"] {
            fs::write(folder.path().join(LOCK), left).expect("written");
            let _lock = Lock::take(folder.path())?;
            let said: Holder = serde_json::from_str(&fs::read_to_string(folder.path().join(LOCK)).expect("read"))
                .expect("one holder and nothing behind it");
            assert_eq!(said.pid, std::process::id());
        }
        Ok(())
    }

    #[test]
    fn moments_are_told_by_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_486_669, "2026-11-24 02:17:49 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
