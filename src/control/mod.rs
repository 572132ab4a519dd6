//! The control channel: [`wire`](crate::wire) messages over one TCP connection.
//!
//! No wait for a lost peer is without end. Both ends send a keepalive every [`KEEPALIVE_INTERVAL`], whatever
//! else they do. A peer counts as lost when nothing at all arrived from it for [`KEEPALIVES_MISSED_MAX`]
//! keepalives. So a process that hangs or was stopped is noticed, although its kernel still answers and RDMA
//! would go on writing to its memory. Each awaited answer has its own time limit as well. `TCP_USER_TIMEOUT`
//! and TCP keepalive do the same for the lanes, which carry no keepalives.

mod connection;
mod error;
mod greeting;
mod protected_stream;
mod security;
mod times;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use sterna_trust::{Fingerprint, Peer, Right, TrustStore};
use zerocopy::IntoBytes;

use self::connection::Connection;
pub use self::error::ControlError;
use self::greeting::open_control;
pub(crate) use self::greeting::{
    Greeted, answer_stranger, greet, open_lane, read_lane_opening, read_preamble,
};
pub use self::protected_stream::ProtectedStream;
pub use self::security::Security;
pub use self::times::{KEEPALIVE_INTERVAL, KEEPALIVES_MISSED_MAX, SILENCE_MAX, STEP_MAX};
use crate::wire::{FrameHead, Message};

/// How long to try to connect.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// One end of a control connection.
#[derive(Debug)]
pub struct ControlChannel {
    connection: Arc<Connection>,
    peer: SocketAddr,
    local: SocketAddr,
    round_trip: Duration,
    /// The other host and the files by which it is trusted, if the connection has TLS.
    host: Option<Box<(Peer, TrustStore)>>,
}

/// Checks from any thread whether the other end of a control channel is alive.
#[derive(Clone, Debug)]
pub(crate) struct PeerLiveness(Arc<Connection>);

impl PeerLiveness {
    /// Whether the other end can still send messages.
    ///
    /// # Errors
    /// [`ControlError`] with the reason why it cannot.
    pub(crate) fn check(&self) -> Result<(), ControlError> {
        self.0.check()
    }

    /// As [`check`](Self::check), but only for a peer that fell silent.
    ///
    /// # Errors
    /// [`ControlError::Silent`].
    pub(crate) fn check_heard(&self) -> Result<(), ControlError> {
        match self.check() {
            Err(error @ ControlError::Silent { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Ends every wait for the other end, by receivers and on the lanes that are [shut with](Self::shut_with)
    /// the channel. Short messages can still be sent.
    pub(crate) fn interrupt(&self) {
        self.0.interrupt();
    }

    /// Whether the channel was interrupted, for threads that wait on neither.
    ///
    /// # Errors
    /// [`ControlError::Interrupted`].
    pub(crate) fn check_not_interrupted(&self) -> Result<(), ControlError> {
        self.0.check_not_interrupted()
    }

    /// Shuts a lane down when the other end can send no more, so that no thread waits on it.
    ///
    /// # Errors
    /// Those of `dup(2)`.
    pub(crate) fn shut_with(&self, lane: &TcpStream) -> io::Result<()> {
        self.0.shut_with(lane.try_clone()?);
        Ok(())
    }
}

/// Sends frames that are made elsewhere, from any thread, between the messages of a control channel.
#[derive(Clone, Debug)]
pub(crate) struct FrameSender(Arc<Connection>);

impl FrameSender {
    /// Sends a whole frame. `name` names the frame in the error.
    ///
    /// # Errors
    /// As for [`ControlChannel::send`].
    pub(crate) fn send(&self, frame: &[u8], name: &'static str) -> Result<(), ControlError> {
        // Short messages may be sent after an interrupt; frames may not.
        self.0.check_not_interrupted()?;
        self.0.send(frame, name)
    }
}

impl ControlChannel {
    /// Connects to a destination at `HOST:PORT`, trying each of its addresses.
    ///
    /// # Errors
    /// [`ControlError`]: the host is unknown, no process listens, the listener is not a peer of this
    /// version, or the hosts do not trust each other.
    pub fn connect(address: &str, security: &Security) -> Result<Self, ControlError> {
        Self::connect_within(address, (security, None), (CONNECT_MAX, STEP_MAX))
    }

    /// As [`connect`](Self::connect), to the host that has the `expected` key, with these time limits for
    /// each address and for the greeting.
    pub(crate) fn connect_within(
        address: &str,
        (security, expected): (&Security, Option<Fingerprint>),
        (connect_max, greeting_max): (Duration, Duration),
    ) -> Result<Self, ControlError> {
        let addresses = address
            .to_socket_addrs()
            .map_err(|error| ControlError::Resolve { host: address.to_owned(), error })?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for candidate in addresses {
            let store = security.to_open(candidate, expected)?;
            match TcpStream::connect_timeout(&candidate, connect_max) {
                Ok(stream) => {
                    tune(&stream).map_err(ControlError::Io)?;
                    let (greeted, round_trip) = open_control(stream, store, expected, greeting_max)?;
                    let mut channel = Self::over(greeted)?;
                    channel.round_trip = round_trip;
                    return Ok(channel);
                }
                Err(error) => failure = error,
            }
        }
        Err(ControlError::Connect { address: address.to_owned(), error: failure })
    }

    /// Takes an end of a connection after its greeting.
    pub(crate) fn over(greeted: Greeted) -> Result<Self, ControlError> {
        let Greeted { stream, host } = greeted;
        let host = host.map(Box::new);
        let socket = stream.socket();
        let (peer, local) = tune(socket)
            .and_then(|()| Ok((socket.peer_addr()?, socket.local_addr()?)))
            .map_err(ControlError::Io)?;
        let connection = Connection::start(stream, KEEPALIVE_INTERVAL).map_err(ControlError::Io)?;
        Ok(Self { connection, peer, local, round_trip: Duration::ZERO, host })
    }

    /// The other host, if the connection has TLS, by which it has proved its key.
    #[must_use]
    pub fn peer_host(&self) -> Option<&Peer> {
        self.host.as_deref().map(|(host, _)| host)
    }

    /// The key that the other host has proved.
    pub(crate) fn identity(&self) -> Option<Fingerprint> {
        self.peer_host().map(|host| host.fingerprint)
    }

    /// The files by which the other host is trusted, and its key: for the lanes to it.
    pub(crate) fn trusted_by(&self) -> Option<(&TrustStore, Fingerprint)> {
        self.host.as_deref().map(|(host, store)| (store, host.fingerprint))
    }

    /// Fails if the other host is known and may not do this.
    pub(crate) fn check_may(&self, right: Right) -> Result<(), ControlError> {
        match self.peer_host().filter(|host| !host.may(right)) {
            Some(host) => Err(ControlError::NotAllowed { name: host.name.clone(), right }),
            None => Ok(()),
        }
    }

    /// A handle to check from any thread whether the other end is alive.
    pub(crate) fn liveness(&self) -> PeerLiveness {
        PeerLiveness(self.connection.clone())
    }

    /// Allocates memory for this much saved state in a thread of its own: the guest is paused while the state
    /// arrives, and a fast link delivers it faster than memory is allocated. If the thread cannot be started,
    /// memory is allocated as the state arrives.
    pub(crate) fn expect_state(&self, len_bytes: u64) {
        let (connection, missing) =
            (Arc::downgrade(&self.connection), self.connection.state_buffers_missing(len_bytes));
        let work = move || {
            (0..missing)
                .all(|_| connection.upgrade().is_some_and(|connection| connection.add_state_buffer()));
        };
        if let Err(error) = thread::Builder::new().name("state-memory".into()).spawn(work) {
            tracing::warn!("no thread makes memory ready for the state of the guest: {error}");
        }
    }

    /// A handle that sends frames between this channel's messages.
    pub(crate) fn frame_sender(&self) -> FrameSender {
        FrameSender(self.connection.clone())
    }

    /// The other end's address.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.peer
    }

    /// The address of this host that reaches the peer.
    #[must_use]
    pub fn local_ip(&self) -> IpAddr {
        match self.local.ip() {
            IpAddr::V6(address) => address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4),
            address => address,
        }
    }

    /// How long the other side took to answer the greeting; zero at the destination.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`ControlError::Io`] if the connection is broken, [`ControlError::NotTaken`] if the peer does not
    /// read. The message may still have arrived.
    pub fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        let body = message.encode()?;
        let mut frame = FrameHead::new(message.kind(), &body)?.as_bytes().to_vec();
        frame.extend(body);
        self.connection.send(&frame, message.name())
    }

    /// Waits for the next message, for `limit`, or for as long as the peer lives. `awaited` names the message
    /// in the error.
    ///
    /// # Errors
    /// [`ControlError`]; after [`ControlError::Timeout`] the message may still arrive.
    pub fn receive(
        &mut self,
        awaited: &'static str,
        limit: Option<Duration>,
    ) -> Result<Message, ControlError> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let message = self.connection.receive(awaited, deadline)?;
        message.ok_or_else(|| ControlError::Timeout { awaited, limit: limit.unwrap_or_default() })
    }
}

impl Drop for ControlChannel {
    fn drop(&mut self) {
        self.connection.leave();
    }
}

/// The destination's end of a connection without TLS, after its greeting.
#[cfg(test)]
pub(crate) fn answered(mut stream: TcpStream, limit: Duration) -> ControlChannel {
    let opened = read_preamble(&mut stream, limit).unwrap();
    ControlChannel::over(greet(stream, opened, &Security::default(), limit).unwrap()).unwrap()
}

/// Configures a connection so that a dead peer is noticed and small messages are sent at once.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(SILENCE_MAX / 4).with_interval(SILENCE_MAX / 4).with_retries(3);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE_MAX))?;
    stream.set_nodelay(true)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::wire::{AttemptId, PREAMBLE_LEN, PROTOCOL_VERSION, Preamble, Protection, Role, WireError};

    /// A peer that answers each connection with `reply`, and then closes it.
    fn peer(reply: Vec<u8>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut greeting = [0; PREAMBLE_LEN];
            stream.read_exact(&mut greeting).unwrap();
            stream.write_all(&reply).unwrap();
        });
        address
    }

    fn connect(address: &str) -> Result<ControlChannel, ControlError> {
        ControlChannel::connect(address, &Security::default())
    }

    fn greeting() -> Vec<u8> {
        Preamble { role: Role::Control, protection: Protection::Plain }.encode().to_vec()
    }

    #[test]
    fn messages_arrive_in_order_and_a_closed_peer_is_said_so() {
        let mut bytes = greeting();
        for message in [Message::RoundClosed(3), Message::Go(AttemptId([1; 16]))] {
            let body = message.encode().unwrap();
            bytes.extend(FrameHead::new(message.kind(), &body).unwrap().as_bytes());
            bytes.extend(body);
        }
        let mut channel = connect(&peer(bytes)).unwrap();
        assert_eq!(channel.receive("a", Some(STEP_MAX)).unwrap(), Message::RoundClosed(3));
        assert_eq!(channel.receive("b", Some(STEP_MAX)).unwrap(), Message::Go(AttemptId([1; 16])));
        assert!(matches!(channel.receive("c", Some(STEP_MAX)), Err(ControlError::Closed("c"))));
    }

    #[test]
    fn a_peer_of_another_version_is_refused_with_both_versions() {
        let mut other = greeting();
        (other[8], other[12]) = (77, 77);
        let error = connect(&peer(other)).unwrap_err();
        assert!(
            matches!(error, ControlError::Wire(WireError::Version { ours: PROTOCOL_VERSION, theirs: 77 })),
            "{error}"
        );
    }

    #[test]
    fn a_message_that_was_damaged_on_its_way_is_not_believed() {
        let mut bytes = greeting();
        let body = Message::Go(AttemptId([1; 16])).encode().unwrap();
        bytes.extend(FrameHead::new(Message::Go(AttemptId([1; 16])).kind(), &body).unwrap().as_bytes());
        bytes.extend(Message::Go(AttemptId([2; 16])).encode().unwrap());
        let mut channel = connect(&peer(bytes)).unwrap();
        let error = channel.receive("GO", Some(STEP_MAX)).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
    }

    #[test]
    fn a_length_past_the_bound_is_refused_before_the_body_comes() {
        let mut bytes = greeting();
        let mut head = FrameHead::new(Message::Go(AttemptId([0; 16])).kind(), &[]).unwrap();
        head.body_len = u32::MAX.into();
        bytes.extend(head.as_bytes());
        let mut channel = connect(&peer(bytes)).unwrap();
        let error = channel.receive("GO", Some(STEP_MAX)).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::TooLong { .. })), "{error}");
    }

    #[test]
    fn nobody_listening_and_an_unknown_host_are_told_apart() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        assert!(matches!(connect(&free), Err(ControlError::Connect { .. })));
        assert!(matches!(connect("no-such-host.invalid:1"), Err(ControlError::Resolve { .. })));
    }
}
