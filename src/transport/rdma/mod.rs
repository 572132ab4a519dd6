//! Pages by one-sided RDMA writes, out of the source's guest RAM straight into the destination's.
//!
//! A lane is one reliable queue pair with a completion queue of its own. Guest RAM is registered in chunks, the same at
//! both ends; the destination returns a key for each, and its CPU has no further part in it. Writes go out in linked lists,
//! one doorbell a list and one signal every few lists; what may be on its way is bounded in bytes and in requests
//! ([`RdmaTuning`]). A write with an immediate, the round's number, closes a round: the destination sees it only after
//! everything written before it on that queue pair is in place (InfiniBand Architecture Specification, volume 1, 9.5).
//!
//! Where less memory may be pinned than the guest has, the lower of what the two ends may pin is the budget: chunks are
//! registered when a lane comes to them and deregistered, least recently used first, once nothing is on its way from them.

mod chunks;
mod exposed;
mod lane;
mod library;
mod null;
mod path;
mod pinning;
mod receiver;
mod registrar;
mod transport;
mod tuning;

use std::time::Duration;

pub use library::load_ahead;
pub(crate) use null::NullRegions;
pub use path::RdmaPath;
pub(crate) use receiver::RdmaReceiver;
#[cfg(test)]
pub(in crate::transport) use registrar::await_keys;
pub(crate) use transport::RdmaOffer;
pub use tuning::RdmaTuning;

/// How long a lane may make no progress at all. A lost link is noticed sooner, by the queue pair's own retries.
const STALL_MAX: Duration = Duration::from_secs(30);

/// How many fences of a lane may be on their way.
const FENCES: u32 = 16;
