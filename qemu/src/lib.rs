//! Stock QEMU in a migration: its stream, its monitor, its memory.
//!
//! The RAM of a guest that is to move is a file, or a memfd, that this process maps as well. The source QEMU
//! "migrates" into a socket of this process. Its stream names the pages that changed; their bytes are
//! discarded, and the user of this crate moves the pages from guest RAM to guest RAM. QEMU clears the dirty
//! bit of a page before it names the page, so a copy made at any time after the name is at least as new.
//!
//! What is not RAM in a shared file (firmware, video memory, device state) becomes one *blob*: a migration
//! stream without pages of shared RAM. The destination QEMU loads it once all of RAM is in place.
//!
//! The crate knows nothing of transports or of handing a guest over.

#![forbid(unsafe_code)]

pub mod compat;
pub mod destination;
mod drain;
pub mod error;
#[cfg(any(test, feature = "unstable"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod input;
pub mod monitor;
pub mod multifd;
pub mod named_pages;
pub mod names;
mod news;
mod note;
mod page;
pub mod qmp;
pub mod settle;
pub mod shared_ram;
pub mod source;
pub mod stream;
mod text;
pub mod tracker;
mod write_quota;

pub use page::Marks;
