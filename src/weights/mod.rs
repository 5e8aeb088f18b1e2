//! Models on disk, memory-mapped: what is frozen and how it multiplies.
//!
//! [`dtype`] turns stored bytes into f32 and back; [`safetensors`] and [`gguf`] read one file each and trust none of
//! it, and [`SafetensorsWriter`] writes one; [`quantised`] puts quantised matrices together; [`folder`] makes one model
//! of them; [`mapped`] says what a stored matrix is, [`upload`] takes one to a device by a [`carrier`] and its
//! [`conveyor`] over the device's [`queues`] and `resident` keeps it there, [`stored`] is a tensor of any format,
//! `transposed` a stored matrix as its transpose, and [`matrix`] multiplies with one where it lies.

pub mod carrier;
pub mod conveyor;
pub mod dtype;
pub mod folder;
pub mod gguf;
pub mod mapped;
pub mod matrix;
pub mod quantised;
pub mod queues;
mod resident;
pub mod safetensors;
mod safetensors_writer;
pub mod stored;
mod transposed;
mod unique;
pub mod upload;

pub use dtype::DType;
pub use folder::{ModelFolder, TOOL_USE_TEMPLATE, config_object, is_gguf};
pub use mapped::{MappedBytes, MappedTensor, StoredMatrix};
pub use safetensors::SafetensorsFile;
pub use safetensors_writer::SafetensorsWriter;
pub use stored::StoredTensor;
