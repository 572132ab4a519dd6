//! The control channel: [`wire`](crate::wire) messages over one TCP connection.
//!
//! No wait for a lost peer is without end. Both ends send a keepalive every [`KEEPALIVE_INTERVAL`], whatever
//! else they do. A peer counts as lost when nothing at all arrived from it for [`KEEPALIVES_MISSED_MAX`]
//! keepalives. So a process that hangs or was stopped is noticed, although its kernel still answers and RDMA
//! would go on writing to its memory. Each awaited answer has its own time limit as well. `TCP_USER_TIMEOUT`
//! and TCP keepalive do the same for the lanes, which carry no keepalives.

mod connection;
mod error;
mod times;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use zerocopy::IntoBytes;

use self::connection::Connection;
pub use self::error::ControlError;
pub use self::times::{KEEPALIVE_INTERVAL, KEEPALIVES_MISSED_MAX, SILENCE_MAX, STEP_MAX};
use crate::wire::{FrameHead, Message, PREAMBLE_LEN, Preamble, Role, Token};

/// How long to try to connect.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// One end of a control connection.
#[derive(Debug)]
pub struct ControlChannel {
    connection: Arc<Connection>,
    peer: SocketAddr,
    local: SocketAddr,
    round_trip: Duration,
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
    /// [`ControlError`]: the host is unknown, no process listens, or the listener is not a peer of this
    /// version.
    pub fn connect(address: &str) -> Result<Self, ControlError> {
        Self::connect_within(address, CONNECT_MAX, STEP_MAX)
    }

    /// As [`connect`](Self::connect), with this time limit for each address and for the greeting.
    pub(crate) fn connect_within(
        address: &str,
        connect_max: Duration,
        greeting_max: Duration,
    ) -> Result<Self, ControlError> {
        let addresses = address
            .to_socket_addrs()
            .map_err(|error| ControlError::Resolve { host: address.to_owned(), error })?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for candidate in addresses {
            match TcpStream::connect_timeout(&candidate, connect_max) {
                Ok(stream) => return Self::open(stream, greeting_max),
                Err(error) => failure = error,
            }
        }
        Err(ControlError::Connect { address: address.to_owned(), error: failure })
    }

    fn open(mut stream: TcpStream, greeting_max: Duration) -> Result<Self, ControlError> {
        tune(&stream).map_err(ControlError::Io)?;
        let began = Instant::now();
        greet(&stream)?;
        read_preamble(&mut stream, greeting_max)?;
        let round_trip = began.elapsed();
        let mut channel = Self::over(stream, KEEPALIVE_INTERVAL)?;
        channel.round_trip = round_trip;
        Ok(channel)
    }

    /// Takes the destination's end of a connection after its preamble was read, and answers it.
    pub(crate) fn answer(stream: TcpStream) -> Result<Self, ControlError> {
        tune(&stream).map_err(ControlError::Io)?;
        greet(&stream)?;
        Self::over(stream, KEEPALIVE_INTERVAL)
    }

    fn over(stream: TcpStream, keepalive: Duration) -> Result<Self, ControlError> {
        let peer = stream.peer_addr().map_err(ControlError::Io)?;
        let local = stream.local_addr().map_err(ControlError::Io)?;
        let connection = Connection::start(stream, keepalive).map_err(ControlError::Io)?;
        Ok(Self { connection, peer, local, round_trip: Duration::ZERO })
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

/// Opens a connection, or answers its opening.
pub(crate) fn greet(mut stream: &TcpStream) -> Result<(), ControlError> {
    let preamble = Preamble { role: Role::Control, token: Token::NONE };
    stream.write_all(&preamble.encode()).map_err(ControlError::Io)
}

/// Reads the preamble of a connection that the peer opened.
pub(crate) fn read_preamble(stream: &mut TcpStream, limit: Duration) -> Result<Preamble, ControlError> {
    let awaited = "greeting";
    stream.set_read_timeout(Some(limit)).map_err(ControlError::Io)?;
    let mut bytes = [0; PREAMBLE_LEN];
    stream.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => ControlError::Closed(awaited),
        io::ErrorKind::WouldBlock => ControlError::Timeout { awaited, limit },
        _ => ControlError::Io(error),
    })?;
    Ok(Preamble::decode(bytes)?)
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
    use std::net::TcpListener;

    use super::*;
    use crate::wire::{AttemptId, PROTOCOL_VERSION, WireError};

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

    fn greeting() -> Vec<u8> {
        Preamble { role: Role::Control, token: Token::NONE }.encode().to_vec()
    }

    #[test]
    fn messages_arrive_in_order_and_a_closed_peer_is_said_so() {
        let mut bytes = greeting();
        for message in [Message::RoundClosed(3), Message::Go(AttemptId([1; 16]))] {
            let body = message.encode().unwrap();
            bytes.extend(FrameHead::new(message.kind(), &body).unwrap().as_bytes());
            bytes.extend(body);
        }
        let mut channel = ControlChannel::connect(&peer(bytes)).unwrap();
        assert_eq!(channel.receive("a", Some(STEP_MAX)).unwrap(), Message::RoundClosed(3));
        assert_eq!(channel.receive("b", Some(STEP_MAX)).unwrap(), Message::Go(AttemptId([1; 16])));
        assert!(matches!(channel.receive("c", Some(STEP_MAX)), Err(ControlError::Closed("c"))));
    }

    #[test]
    fn a_peer_of_another_version_is_refused_with_both_versions() {
        let mut other = greeting();
        other[8] = 77;
        let error = ControlChannel::connect(&peer(other)).unwrap_err();
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
        let mut channel = ControlChannel::connect(&peer(bytes)).unwrap();
        let error = channel.receive("GO", Some(STEP_MAX)).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::Damaged)), "{error}");
    }

    #[test]
    fn a_length_past_the_bound_is_refused_before_the_body_comes() {
        let mut bytes = greeting();
        let mut head = FrameHead::new(Message::Go(AttemptId([0; 16])).kind(), &[]).unwrap();
        head.body_len = u32::MAX.into();
        bytes.extend(head.as_bytes());
        let mut channel = ControlChannel::connect(&peer(bytes)).unwrap();
        let error = channel.receive("GO", Some(STEP_MAX)).unwrap_err();
        assert!(matches!(error, ControlError::Wire(WireError::TooLong { .. })), "{error}");
    }

    #[test]
    fn nobody_listening_and_an_unknown_host_are_told_apart() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        assert!(matches!(ControlChannel::connect(&free), Err(ControlError::Connect { .. })));
        assert!(matches!(
            ControlChannel::connect("no-such-host.invalid:1"),
            Err(ControlError::Resolve { .. })
        ));
    }
}
