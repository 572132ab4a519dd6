//! The meaning of an error on a lane's connection.

use std::io;
use std::time::Duration;

use crate::transport::error::TransportError;

/// How long a lane may make no progress at all.
pub(super) const STALL_MAX: Duration = Duration::from_secs(30);

/// The meaning of an error on a lane's connection.
pub(super) fn broken(lane: usize, error: io::Error) -> TransportError {
    match error.kind() {
        io::ErrorKind::WouldBlock => TransportError::Stalled { lane, silence: STALL_MAX },
        io::ErrorKind::UnexpectedEof => TransportError::Closed { lane },
        _ => TransportError::Stream { lane, error },
    }
}
