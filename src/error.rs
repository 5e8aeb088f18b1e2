//! The one error type of the library. Its variant decides the exit code; its text names the place and the remedy.

use std::path::Path;

/// What went wrong, sorted by who can mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The recipe or the command line is wrong: exit 2. Names file, line and key.
    #[error("{0}")]
    Recipe(String),
    /// A file from outside (model, rows, adapter, template) is bad or missing: exit 3.
    #[error("{0}")]
    Input(String),
    /// Not enough memory or disk: exit 4.
    #[error("{0}")]
    Resource(String),
    /// The run itself failed: exit 1.
    #[error("{0}")]
    Run(String),
    /// Numbers that came of these rows, each `(file, line)`, are not finite: a training step is left out for it.
    /// Exit 3 where a file from outside is at fault, else 1.
    #[error("row {} of file {}: {why}", .rows.first().map_or(0, |row| row.1), .rows.first().map_or(0, |row| row.0 + 1))]
    NotFinite {
        /// What is not finite, and the remedy.
        why: String,
        /// Of which rows; several where it cannot be told of which of them.
        rows: Vec<(u32, u32)>,
        /// Whether a file from outside is at fault.
        outside: bool,
    },
    /// Stopped by a signal (1, 2 or 15), with nothing half-written left: exit 128 + signal.
    #[error("stopped by signal {0}")]
    Stopped(i32),
    /// A tensor operation failed: exit 1.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

/// A tensor operation that failed. Where a device has no memory left that is [`Error::Resource`], with the remedy.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let said = error.to_string();
        match OUT_OF_MEMORY.iter().find(|name| said.contains(**name)) {
            Some(name) => Self::Resource(format!(
                "the device has no memory left ({name}): other programs may hold some of it; lower memory.budget, which \
                 bounds what a run takes there, or take another device"
            )),
            None => Self::Tensor(error),
        }
    }
}

/// What CUDA's driver, cuBLAS and candle's Metal call a device without memory.
const OUT_OF_MEMORY: [&str; 3] =
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "Failed to create metal resource: Buffer"];

/// Most characters of a message. Bad files are quoted in it, and a name or a value in one may have any length.
const MAX_MESSAGE: usize = 4000;

/// The message as a terminal may show it: control characters but line ends and tabs are written out, and what is over
/// [`MAX_MESSAGE`] is left out.
fn shown(message: String) -> String {
    let hidden = |c: char| {
        (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if message.len() <= MAX_MESSAGE && !message.contains(hidden) {
        return message;
    }
    let mut out = String::new();
    let length = message.chars().count();
    // The start names the place, the end the remedy.
    let (start, end) =
        if length > MAX_MESSAGE { (MAX_MESSAGE / 2, length - MAX_MESSAGE / 2) } else { (length, length) };
    for (at, c) in message.chars().enumerate() {
        match c {
            _ if at == start && at < end => out.push_str(&format!(" … ({} characters left out) … ", end - start)),
            _ if (start..end).contains(&at) => {}
            c if hidden(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An unusable recipe or command line.
    pub fn recipe(message: impl Into<String>) -> Self {
        Self::Recipe(shown(message.into()))
    }

    /// A bad or missing file from outside.
    pub fn input(message: impl Into<String>) -> Self {
        Self::Input(shown(message.into()))
    }

    /// A failed run.
    pub fn run(message: impl Into<String>) -> Self {
        Self::Run(shown(message.into()))
    }

    /// A file from outside that cannot be read.
    pub fn reading(path: &Path, error: std::io::Error) -> Self {
        let why = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "there is no such file; check the path, or fetch the files again".to_string()
            }
            _ => error.to_string(),
        };
        Self::input(format!("{}: cannot be read: {why}", path.display()))
    }

    /// A file of ours that cannot be written; a full disk is a lack of resources.
    pub fn writing(path: &Path, error: std::io::Error) -> Self {
        let message = shown(format!("{}: cannot be written: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::Resource(message),
            _ => Self::Run(message),
        }
    }

    /// The process's exit code for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Run(_) | Self::Tensor(_) | Self::NotFinite { outside: false, .. } => 1,
            Self::Recipe(_) => 2,
            Self::Input(_) | Self::NotFinite { outside: true, .. } => 3,
            Self::Resource(_) => 4,
            Self::Stopped(signal) => 128 + *signal as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_bad_file_says_does_not_reach_the_terminal_raw() {
        let said = Error::input("a\u{1b}[2J\u{202e}b\tc\nd").to_string();
        assert_eq!(said, "a\\u{1b}[2J\\u{202e}b\tc\nd");
    }

    #[test]
    fn a_device_without_memory_is_a_lack_of_resources() {
        let error = |text: &str| Error::from(candle_core::Error::Msg(text.into()));
        let full = error("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert_eq!(full.exit_code(), 4);
        assert!(full.to_string().contains("no memory left (CUDA_ERROR_OUT_OF_MEMORY)"), "{full}");
        assert_eq!(error("shape mismatch").exit_code(), 1);
    }

    #[test]
    fn a_long_message_keeps_its_start_and_its_end() {
        let said = Error::recipe(format!("place: {}; remedy", "é".repeat(9000))).to_string();
        assert!(
            said.starts_with("place: é") && said.ends_with("é; remedy") && said.contains("5015 characters left out"),
            "{said}"
        );
        assert!(said.chars().count() < MAX_MESSAGE + 50);
    }
}
