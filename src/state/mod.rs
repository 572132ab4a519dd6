//! What a host keeps of its guests, on its own disk.

#[cfg_attr(not(test), expect(dead_code, reason = "state files are to come"))]
mod folder;

pub use folder::{FolderError, StateFolder, StorageCheck};
