//! Model folders on disk, memory-mapped: what is frozen and how it multiplies.
//!
//! [`dtype`] turns stored bytes into f32 and back, [`safetensors`] reads one file and trusts none of it, [`folder`]
//! puts the files of one model together, [`mapped`] says what a stored matrix is, [`Turned`] is one as its transpose, [`matrix`] multiplies with a tensor where it lies.

pub mod dtype;
pub mod folder;
pub mod mapped;
pub mod matrix;
pub mod safetensors;
mod turned;
mod unique;

pub use dtype::DType;
pub use folder::ModelFolder;
pub use mapped::{MappedBytes, MappedTensor, StoredMatrix};
pub use safetensors::SafetensorsFile;
pub use turned::Turned;
