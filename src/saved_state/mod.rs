//! The saved state of vCPUs and devices on its way: in frames of bounded length, hashed at both ends as they go.
//!
//! Neither end needs it as a whole. At the source the VMM writes into a few buffers; one thread hashes them, another sends them, and
//! what is sent is written to again ([`StateSender`]). So the state travels while the VMM still saves, and beside the last pages.
//! The destination holds what has arrived, because it may load it only once remote access to guest RAM is revoked:
//! [`IncomingState`] takes the frames, in their order and up to a limit of its own.
//!
//! What the VMM writes and reads are named [sections](StateWriter) within that stream.

mod incoming;
mod sections;
mod sender;

pub use incoming::SavedStateError;
pub(crate) use incoming::{ArrivedState, IncomingState};
pub use sections::{SECTION_NAME_MAX, SectionError, SectionReader, SectionWriter, StateReader, StateWriter};
pub(crate) use sender::{SentState, StateSender};

/// The longest saved state that either end carries unless told otherwise, in bytes: 1 GiB.
pub const STATE_MAX_DEFAULT: u64 = 1 << 30;
