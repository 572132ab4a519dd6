//! The destination's end of the lanes.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use sterna_trust::Fingerprint;

use super::error::TransportError;
use super::remains::Remains;
use crate::control::ProtectedStream;
use crate::wire::Token;

/// The source of lane connections: all attempts share a socket, and this returns the connections of one
/// attempt.
pub trait LaneConnections {
    /// The next connection with the attempt's token, if one comes in time. Its greeting is complete.
    ///
    /// # Errors
    /// Those of the socket.
    fn connection_within(&self, limit: Duration) -> io::Result<Option<LaneConnection>>;
}

/// A connection of one lane.
#[derive(Debug)]
pub struct LaneConnection {
    /// The lane's number according to the peer.
    pub lane: u8,
    /// The connection.
    pub stream: ProtectedStream,
    /// The address of the source.
    pub from: SocketAddr,
    /// The key that the source has proved, if the connection has TLS.
    pub identity: Option<Fingerprint>,
}

/// The destination's end of all lanes.
pub trait LaneReceiver: Send + Debug {
    /// The parameters that the source needs to connect its lanes: at most
    /// [`LANE_BODY_MAX`](crate::wire::LANE_BODY_MAX) bytes, for [`connect`](super::SourceOffer::connect) of
    /// the same transport.
    ///
    /// # Errors
    /// [`TransportError`] if it cannot be encoded; the attempt is over.
    fn ready(&self) -> Result<Vec<u8>, TransportError>;

    /// The token of its lanes' connections, if lanes are connections to the socket of this host's receiver.
    fn token(&self) -> Option<Token> {
        None
    }

    /// Waits for the lanes to connect, if they are such connections.
    ///
    /// # Errors
    /// [`TransportError`] if they do not connect in time.
    fn connect(&mut self, _connections: &dyn LaneConnections) -> Result<(), TransportError> {
        Ok(())
    }

    /// Carries out a [request](super::send_request) of the source's end of this transport, and returns the
    /// answer, if the request has one. The bytes come from a peer, at most
    /// [`TRANSPORT_BODY_MAX`](crate::wire::TRANSPORT_BODY_MAX): check every range and length before acting.
    ///
    /// # Errors
    /// [`TransportError`] for an invalid request, a request that may not be granted, or one that the device
    /// refused.
    fn handle(&mut self, _request: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        Err(TransportError::Disagreement("a request beside the lanes, which this transport has not".into()))
    }

    /// Returns once the fences of `round` have arrived on every lane.
    ///
    /// # Errors
    /// [`TransportError`] if a lane broke or the fences do not come in time.
    fn await_round(&mut self, round: u32) -> Result<(), TransportError>;

    /// The expected duration of [`revoke`](Self::revoke), measured with as many unused lanes.
    fn revoke_time(&self) -> Duration;

    /// Revokes every remote access to guest RAM, in a time that does not grow with RAM. After it returns, no
    /// action of the source or the network can change a byte of guest RAM. The caller releases the returned
    /// remains later.
    ///
    /// # Errors
    /// [`TransportError`] if the device refuses; then the guest must not run on this host.
    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError>;
}
