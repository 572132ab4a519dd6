//! Moving a file: a memory image, or any large file, over the same lanes as a guest.
//!
//! An image is RAM that nothing writes to. The file is mapped; its *parts*, whole blocks of 2 MiB with data,
//! are the regions of a [`GuestRam`](crate::memory::GuestRam) in which a guest address is an offset in the
//! file. The ranges between parts are holes at both ends: no lane maps them, and they are not registered,
//! sent or filled.
//!
//! | source ([`send`]) | destination ([`Receiver`]) |
//! |---|---|
//! | OFFER: name, length, parts | opens `NAME.sterna-partial`, READY, digests of its data |
//! | sends the blocks that differ | idle, under RDMA |
//! | FINAL; digests of all blocks, read anew | **revoke**, hash the file, compare |
//! | done | truncate to length, sync, rename, STORED |
//!
//! An interrupted transfer leaves `NAME.sterna-partial`. Its content is never trusted: the next attempt sends
//! every block with a different digest.

mod blocks;
mod error;
mod extents;
mod folder;
mod receive;
mod send;
mod store;

use std::fmt;

pub use error::{SendError, SendFailure, StoreError};
pub use receive::{Receiver, Stored};
pub use send::{Options, Phase, Progress, Report, send};
pub use store::Store;

/// The digest of an image's content: the BLAKE3 hash of its length (64 bits, little-endian) and of the BLAKE3
/// hashes of its 2 MiB blocks in order, the last padded with zeros to a whole page. Holes and written zeros
/// are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageDigest(pub [u8; 32]);

impl fmt::Display for ImageDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}
