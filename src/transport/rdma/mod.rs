//! Pages by one-sided RDMA writes, from the source's guest RAM straight into the destination's.
//!
//! A lane is one reliable queue pair with a completion queue of its own. Guest RAM is registered in chunks,
//! the same at both ends; the destination returns a key for each, and its CPU has no further part in the
//! transfer. Writes are posted in linked lists, one doorbell a list and one signal every few lists; the
//! writes in flight are bounded in bytes and in requests ([`RdmaTuning`]). A write with an immediate, the
//! round's number, closes a round: the destination receives it only after everything written before it on
//! that queue pair is in place (InfiniBand Architecture Specification, volume 1, 9.5).
//!
//! If less memory may be pinned than the guest has, the budget is the lower of the two ends' limits: chunks
//! are registered when a lane reaches them and deregistered, least recently used first, once no write from
//! them is in flight.

mod bounds;
mod chunks;
mod exposed;
mod lane;
mod library;
#[cfg(feature = "unstable")]
mod null;
mod offer;
mod path;
mod pinning;
mod provider;
mod receiver;
mod registrar;
mod transport;
mod tuning;
#[cfg(not(feature = "unstable"))]
pub(crate) mod wire;
#[cfg(feature = "unstable")]
#[doc(hidden)]
pub mod wire;

#[cfg(feature = "unstable")]
pub(crate) use null::NullRegions;
pub use path::RdmaPath;
pub use provider::RdmaProvider;
pub use tuning::RdmaTuning;
