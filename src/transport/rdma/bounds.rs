//! Bounds that both ends of the lanes keep.

use std::time::Duration;

/// How long a lane may make no progress at all. A lost link is noticed sooner, by the queue pair's own retries.
pub(super) const STALL_MAX: Duration = Duration::from_secs(30);

/// How many fences of a lane may be on their way.
pub(super) const FENCES: u32 = 16;
