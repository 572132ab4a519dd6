//! Pages by one-sided RDMA writes, out of the source's guest RAM straight into the destination's.
//!
//! A lane is one reliable queue pair with a completion queue of its own. Guest RAM is registered in slices of
//! [`SLICE_PAGES`], the same at both ends; the destination returns a key for each, and its CPU has no further part in it.
//! Writes go out in linked lists, one doorbell and one signal a list; what may be on its way is bounded in bytes and in
//! requests. A write with an immediate, the round's number, closes a round: the destination sees it only after everything
//! written before it on that queue pair is in place (InfiniBand Architecture Specification, volume 1, 9.5).

mod landing;
mod lane;
mod pinning;
mod reach;
mod registrar;
mod slices;
mod transport;

use std::time::Duration;

pub(crate) use landing::RdmaLanding;
pub use reach::RdmaReach;
pub use slices::SLICE_PAGES;
pub(crate) use transport::RdmaOffer;

/// How long a lane may make no progress at all. A lost link is noticed sooner, by the queue pair's own retries.
const STALL_MAX: Duration = Duration::from_secs(30);

/// The longest write: 1 MiB. Longer ones gain nothing, and a lost packet costs more of them.
const WRITE_PAGES_MAX: u64 = 256;

/// How many writes make a list: one doorbell, one signal.
const LIST_WRITES: usize = 32;

/// How many bytes make a list, if its writes are long.
const LIST_BYTES: u64 = 4 << 20;

/// How many bytes may be on their way on one lane: more than 400 Gb/s × 100 µs.
const WINDOW_BYTES: u64 = 16 << 20;

/// How many requests may be outstanding on one lane, if the device allows.
const WINDOW_REQUESTS: u32 = 1024;

/// How many fences of a lane may be on their way.
const FENCES: u32 = 16;
