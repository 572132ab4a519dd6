//! How long each side of a control channel waits for the other.

use std::time::Duration;

/// How often either end of a control channel sends a keepalive.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// The other side counts as lost after this many of this side's own keepalives without any message from it.
/// Many, because a process on an overloaded host may not be scheduled for seconds.
pub const KEEPALIVES_MISSED_MAX: u32 = 10;

/// How long a peer's kernel may leave data or TCP keepalives unanswered before a connection breaks.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);

/// The time limit of one step of the protocol that processes nothing larger than a message.
pub const STEP_MAX: Duration = Duration::from_secs(20);
