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
mod digest;
mod error;
mod extents;
mod folder;
mod receive;
mod send;
mod store;
#[cfg(any(test, feature = "unstable"))]
mod take_offer;

unstable! { use digest::ImageDigest; }
pub use error::{SendError, SendFailure, StoreError};
pub use receive::Receiver;
unstable! { use receive::Stored; }
pub use send::{Options, Phase, Progress, Report, send};
pub use store::Store;

pub use crate::session::SessionError;
#[cfg(any(test, feature = "unstable"))]
pub(crate) use take_offer::take_offer;
