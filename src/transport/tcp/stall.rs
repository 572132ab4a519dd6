//! What an end of a TCP lane makes of an error on its connection.

use std::io;
use std::time::Duration;

use crate::transport::error::TransportError;

/// How long a lane may make no progress at all.
pub(super) const STALL_MAX: Duration = Duration::from_secs(30);

/// What an error on a lane's connection means.
pub(super) fn broken(lane: usize, error: io::Error) -> TransportError {
    match error.kind() {
        io::ErrorKind::WouldBlock => TransportError::Stalled { lane, silence: STALL_MAX },
        io::ErrorKind::UnexpectedEof => TransportError::Closed { lane },
        _ => TransportError::Stream { lane, error },
    }
}
