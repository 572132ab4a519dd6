//! The persistent state of a host's guests: a state file for each, `NAME.state`, in a folder of this host
//! alone.
//!
//! The file holds the guest's [sequence of records](crate::handover::Journal), whichever role the host plays
//! in an attempt. A process that runs a guest, brings one to this host or moves one away holds a lock on the
//! file (`flock(2)`) until it ends, however it ends. So the lock and the last record alone answer these
//! questions:
//!
//! * Does a process of this host have the guest? Only if the file is locked.
//! * Is the name free? Only if no process has the file locked: two starts cannot both win.
//! * May the guest be started anew? See [`Standing`].
//!
//! All of the file's space is reserved and its head durable before anything depends on it. A file without a
//! record is removed when it is released, so that attempts which fail early leave nothing behind. A file with
//! a record stays, because another host may ask for that record: 136 KiB for each name. What one source may
//! leave behind with guests that never ran is bounded (`room`).

mod claim;
mod error;
mod file;
mod folder;
mod holder;
mod host_state;
mod index;
mod memory;
mod room;
mod sender;
mod sighting;
#[cfg(test)]
mod tests;

pub use self::claim::GuestClaim;
pub(crate) use self::claim::RecordWriter;
pub use self::error::{StartError, StateError};
pub use self::folder::{FolderError, StorageCheck};
unstable! { use self::folder::StateFolder; }
pub use self::holder::LockHolder;
pub use self::host_state::HostState;
pub use self::sighting::Sighting;
pub use crate::handover::{Journal, Record, RecordKind, Side, Standing};
