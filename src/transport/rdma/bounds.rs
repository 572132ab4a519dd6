//! Bounds that both ends of the lanes keep.

use std::time::Duration;

/// How long a lane may make no progress at all. The queue pair's own retries notice a lost link sooner.
pub(super) const STALL_MAX: Duration = Duration::from_secs(30);

/// How many fences of a lane may be in flight.
pub(super) const FENCES: u32 = 16;
