//! The saved state of vCPUs and devices in transit: in frames of bounded length, hashed at both ends as they
//! pass.
//!
//! Neither end needs the state in one piece. At the source the VMM writes into a few buffers; one thread
//! hashes them, another sends them and returns them for reuse (`StateSender`). So the state travels while
//! the VMM still saves, and beside the last pages. The destination holds what has arrived, because it may
//! load the state only once remote access to guest RAM is revoked: `IncomingState` takes the frames, in
//! order and up to its own limit.
//!
//! The VMM writes and reads named [sections](StateWriter) within that stream.

mod incoming;
mod sections;
mod sender;

pub use incoming::SavedStateError;
pub(crate) use incoming::{ArrivedState, IncomingState};
pub use sections::{SectionError, StateReader, StateWriter};
unstable! { use sections::{SECTION_NAME_MAX, SectionReader, SectionWriter}; }
pub(crate) use sender::{SentState, StateSender};

/// Default limit of the saved state at either end, in bytes: 1 GiB.
pub(crate) const STATE_MAX_DEFAULT: u64 = 1 << 30;
