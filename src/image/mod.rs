//! Moving a file: a memory image, or any large file, over the same lanes as a guest.
//!
//! An image is RAM that nobody writes to. The file is mapped; its *parts*, whole blocks of 2 MiB with data, are the regions of a
//! [`GuestRam`](crate::memory::GuestRam) in which a guest address is a place in the file. What lies between parts is a hole, at
//! both ends: it is not mapped by a lane, not registered, not sent and not made.
//!
//! | source ([`send`]) | destination ([`Receiver`]) |
//! |---|---|
//! | OFFER: name, length, parts | opens `NAME.sterna-partial`, READY, digests of what it holds from an earlier attempt |
//! | sends the blocks that differ | idle, under RDMA |
//! | FINAL; digests of all blocks, read anew | **revoke**, hash what is there, compare |
//! | done | cut to length, sync, rename, STORED |
//!
//! A transfer that was cut leaves `NAME.sterna-partial`. It is never trusted: the next attempt sends whatever differs from its digests.

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

/// What an image's content is: the BLAKE3 hash of its length (64 bits, little-endian) and of the BLAKE3 hashes of its 2 MiB blocks in
/// order, the last filled up with zeros to a whole page. Holes and written zeros are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageDigest(pub [u8; 32]);

impl fmt::Display for ImageDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}
