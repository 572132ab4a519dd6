//! The destination's end of the lanes.

use std::fmt::Debug;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::error::TransportError;
use super::remains::Remains;
use crate::wire::Token;

/// Where connections of lanes arrive: a socket that all attempts share, of which this brings those of one attempt.
pub trait LaneConnections {
    /// The next connection that bears the attempt's token, if one comes in time. Its preamble was read.
    ///
    /// # Errors
    /// Those of the socket.
    fn connection_within(&self, limit: Duration) -> io::Result<Option<LaneConnection>>;
}

/// A connection of one lane.
#[derive(Debug)]
pub struct LaneConnection {
    /// Which lane it says that it is.
    pub lane: u8,
    /// The connection.
    pub stream: TcpStream,
    /// The address of the source.
    pub from: SocketAddr,
}

/// The destination's end of all lanes.
pub trait LaneReceiver: Send + Debug {
    /// What the source must know to connect its lanes: at most [`LANE_BODY_MAX`](crate::wire::LANE_BODY_MAX) bytes, for the
    /// [`connect`](super::SourceOffer::connect) of the same transport.
    ///
    /// # Errors
    /// [`TransportError`] if it cannot be encoded; the attempt is over.
    fn ready(&self) -> Result<Vec<u8>, TransportError>;

    /// The token that the connections of its lanes bear, where lanes are connections to the socket of this host's receiver.
    fn token(&self) -> Option<Token> {
        None
    }

    /// Waits for the lanes to connect, where they are such connections.
    ///
    /// # Errors
    /// [`TransportError`] if they do not in time.
    fn connect(&mut self, _connections: &dyn LaneConnections) -> Result<(), TransportError> {
        Ok(())
    }

    /// Does what the source's end of this transport [requests](super::send_request) beside the lanes, and returns the answer, if
    /// that request has one. The bytes come from a peer, at most [`TRANSPORT_BODY_MAX`](crate::wire::TRANSPORT_BODY_MAX) of
    /// them: check every range and length before acting on it.
    ///
    /// # Errors
    /// [`TransportError`] for a request that is not one, that may not be granted, or that the device refused.
    fn handle(&mut self, _request: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        Err(TransportError::Disagreement("a request beside the lanes, which this transport has not".into()))
    }

    /// Returns once the fences of `round` are seen on every lane.
    ///
    /// # Errors
    /// [`TransportError`] if a lane broke or the fences do not come in time.
    fn await_round(&mut self, round: u32) -> Result<(), TransportError>;

    /// How long [`revoke`](Self::revoke) is expected to take: what it took of as many lanes made for nothing else.
    fn revoke_time(&self) -> Duration;

    /// Takes every remote access to guest RAM away, in a time that does not grow with RAM. When it returns, nothing that the
    /// source or the network does can change a byte of it. What remains is released when there is time.
    ///
    /// # Errors
    /// [`TransportError`] if the device would not let go; then the guest must not run here.
    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError>;
}
