//! The destination's side of a migration: the same five steps as at the [source](crate::source).
//!
//! Under RDMA the destination does nothing in steps 2 and 3: pages appear in guest RAM. In step 4 the order
//! keeps a late write away from a running guest: **revoke, then compare, then load, then PREPARED**.
//!
//! | step | leads to |
//! |---|---|
//! | a source connects and says HELLO | [`Incoming`] |
//! | 1 prepare | `Prepared` |
//! | 2, 3 pages arrive, until FINAL | `Filled` |
//! | 4 switch | `Running` |
//! | 5 complete | [`Arrival`] |
//!
//! Each step is a value that the next consumes, and gives the guest up itself if it fails.

mod acceptor;
mod arriving;
mod complete;
mod durable_handover;
mod error;
mod fill;
mod incoming;
mod lane_ends;
mod options;
mod pending;
mod prepare;
mod receiver;
mod switch;
mod takeover;

pub use error::ReceiveError;
pub use incoming::{Arrival, Incoming};
pub use options::Options;
pub use pending::{ArrivalPhase, PendingArrival, WordOutcome};
pub use receiver::Receiver;
