//! Results go to stdout; a reader that has seen enough (`| head`) is no error.

use std::io::{ErrorKind, Write};

use crate::{Error, Result};

/// Writes bytes to stdout. Once the reader is gone they vanish, and the command goes on to its end.
///
/// # Errors
/// [`Error::Run`] where stdout cannot be written for another reason, such as a full disk behind it.
pub fn write(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::run(format!("stdout cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}

/// Whether somebody may still read stdout: where printing is all that a command does, it need not go on for nobody. A
/// reader that goes away is seen before the next write.
pub fn is_read() -> bool {
    #[cfg(unix)]
    {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let stdout = std::io::stdout();
        let mut looks = [PollFd::new(&stdout, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::ERR | PollFlags::HUP;
        poll(&mut looks, Some(&now)).is_err() || !looks[0].revents().intersects(gone)
    }
    #[cfg(not(unix))]
    {
        true
    }
}

/// Writes one line to stdout, as [`fn@write`] does.
///
/// # Errors
/// As [`fn@write`].
pub fn line(text: impl AsRef<str>) -> Result<()> {
    write(format!("{}\n", text.as_ref()).as_bytes())
}

/// Writes one JSON object on one line.
///
/// # Errors
/// As [`fn@write`].
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    line(serde_json::to_string(value).map_err(|error| Error::run(format!("the result is no JSON: {error}")))?)
}
