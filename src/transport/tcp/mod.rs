//! Pages over TCP: several streams, vectored writes straight out of guest RAM and reads straight into it.
//!
//! A frame is a head, a list of runs, and the bytes of their pages. Nothing is acknowledged but the fence that closes a round.

mod lane;
mod receiver;

use std::io;
use std::time::Duration;

#[cfg(test)]
pub(crate) use lane::TcpLane;
pub(crate) use lane::TcpTransport;
pub(crate) use receiver::TcpReceiver;

use crate::transport::TransportError;

/// How long a lane may make no progress at all.
const STALL_MAX: Duration = Duration::from_secs(30);

/// What an error on a lane's connection means.
fn broken(lane: usize, error: io::Error) -> TransportError {
    match error.kind() {
        io::ErrorKind::WouldBlock => TransportError::Stalled { lane, silence: STALL_MAX },
        io::ErrorKind::UnexpectedEof => TransportError::Closed { lane },
        _ => TransportError::Stream { lane, error },
    }
}
