//! What a person sees: progress, metrics files, measured memory, the closing summary, the report's page.
//!
//! None of it knows how training works; it is handed numbers and rows.

pub mod available;
pub mod chart;
pub mod html;
pub mod memory;
pub mod metrics_file;
pub mod progress;
pub mod summary;
pub(crate) mod units;

pub use html::{Curves, Page, Sample};
pub use memory::MemoryMeter;
pub use metrics_file::MetricsFile;
pub use progress::{Figures, Phase, Progress, Stage};
pub use summary::Summary;
