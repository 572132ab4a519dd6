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

mod bounds;
mod chunks;
mod exposed;
mod lane;
mod library;
mod null;
mod offer;
mod path;
mod pinning;
mod provider;
mod receiver;
mod registrar;
mod transport;
mod tuning;
#[doc(hidden)]
pub mod wire;

pub use library::load_ahead;
pub(crate) use null::NullRegions;
pub use path::RdmaPath;
pub use provider::RdmaProvider;
pub use tuning::RdmaTuning;
