//! The control channel: [`wire`](crate::wire) messages over one TCP connection.
//!
//! Nothing here waits without end for a peer that has gone. Both ends send a keepalive every [`KEEPALIVE_INTERVAL`], whatever else they do, and count as lost
//! when nothing at all was heard of them for [`KEEPALIVES_MISSED_MAX`] keepalives: so a process that hangs or was stopped is noticed, whose
//! kernel answers for it, and to whose memory RDMA would go on writing. Each awaited answer has its own time limit besides.
//! `TCP_USER_TIMEOUT` and keepalive say the same of connections without keepalives, the lanes.

mod connection;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;
use zerocopy::IntoBytes;

use self::connection::Connection;
use crate::error_code::coded;
use crate::wire::{FrameHead, Message, PREAMBLE_LEN, Preamble, Role, Token, WireError};

/// How often either end of a control channel says that it is alive.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// After how many of this side's own keepalives without any sign of the other side it counts as lost. Many, because a process on an
/// overloaded host may not come to run for seconds.
pub const KEEPALIVES_MISSED_MAX: u32 = 10;

/// How long a peer's kernel may leave data or keepalives unanswered before a connection breaks.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);

/// How long one step of the conversation may take where nothing bigger than a message is worked on.
pub const STEP_MAX: Duration = Duration::from_secs(20);

/// How long to try to connect.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// What can go wrong on the control channel.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(ControlErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum ControlError {
    /// The host's name has no address.
    #[error("cannot find the host {host}: {error}; is the name right?")]
    Resolve {
        /// What was to be resolved.
        host: String,
        /// The resolver's answer.
        error: io::Error,
    },
    /// Nobody answered at any of the host's addresses.
    #[error("cannot connect to {address}: {error}")]
    Connect {
        /// The last address tried.
        address: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The peer closed the connection.
    #[error("the other side closed the connection while {0} was awaited")]
    Closed(&'static str),
    /// The peer did not answer in time.
    #[error("no {awaited} from the other side within {} s", limit.as_secs())]
    Timeout {
        /// What was awaited.
        awaited: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// Nothing at all came from the peer, which sends keepalives if it lives.
    #[error(
        "nothing was heard from the other side for {} s: its process hangs or was stopped, its host is down, or the link is cut",
        silence.as_secs()
    )]
    Silent {
        /// For how long.
        silence: Duration,
    },
    /// The peer lives and does not read.
    #[error("the other side has not taken {message} within {} s", limit.as_secs())]
    NotTaken {
        /// What was to be sent.
        message: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// This side waits no more.
    #[error("this side has ended its wait for the other side")]
    Interrupted,
    /// The connection broke.
    #[error("the control connection broke: {0}")]
    Io(#[source] io::Error),
    /// The peer sent what this version does not understand.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer sent a message out of turn.
    #[error("the other side sent {got} where {expected} was due")]
    Unexpected {
        /// What was due.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
}

coded!(ControlError, ControlErrorKind, "connection", via Wire);

/// One end of a control connection.
#[derive(Debug)]
pub struct ControlChannel {
    connection: Arc<Connection>,
    peer: SocketAddr,
    local: SocketAddr,
    round_trip: Duration,
}

/// Asks after the other end of a control channel, from anywhere.
#[derive(Clone, Debug)]
pub(crate) struct PeerLiveness(Arc<Connection>);

impl PeerLiveness {
    /// Whether the other end was heard of lately.
    ///
    /// # Errors
    /// [`ControlError`] if nothing more will come from it, and why.
    pub(crate) fn check(&self) -> Result<(), ControlError> {
        self.0.check()
    }

    /// The same, where it fell silent.
    ///
    /// # Errors
    /// [`ControlError::Silent`].
    pub(crate) fn check_heard(&self) -> Result<(), ControlError> {
        match self.check() {
            Err(error @ ControlError::Silent { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Ends every wait for the other end, of whoever receives and of the lanes that are [shut with](Self::shut_with) it. What is short
    /// can be sent still.
    pub(crate) fn interrupt(&self) {
        self.0.interrupt();
    }

    /// Whether that has happened: for who waits on neither.
    ///
    /// # Errors
    /// [`ControlError::Interrupted`].
    pub(crate) fn check_not_interrupted(&self) -> Result<(), ControlError> {
        self.0.check_not_interrupted()
    }

    /// Has a lane shut down when nothing more comes from the other end, so that nobody waits there.
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
    /// Sends a whole frame. `name` names it for the error.
    ///
    /// # Errors
    /// As for [`ControlChannel::send`].
    pub(crate) fn send(&self, frame: &[u8], name: &'static str) -> Result<(), ControlError> {
        // What is short may be said after an interrupt; a frame is not.
        self.0.check_not_interrupted()?;
        self.0.send(frame, name)
    }
}

impl ControlChannel {
    /// Connects to a destination at `HOST:PORT`, trying each of its addresses.
    ///
    /// # Errors
    /// [`ControlError`]: the host is unknown, nobody listens, or the listener is not a peer of this version.
    pub fn connect(address: &str) -> Result<Self, ControlError> {
        Self::connect_within(address, CONNECT_MAX, STEP_MAX)
    }

    /// The same, with as much time for each address, and for the greeting.
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

    /// Takes the destination's end of a connection whose preamble has been read, and answers it.
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

    /// Asks after the other end, from anywhere.
    pub(crate) fn liveness(&self) -> PeerLiveness {
        PeerLiveness(self.connection.clone())
    }

    /// Makes memory ready for so many bytes of saved state, beside everything else: while the state arrives the guest stands still,
    /// and to have memory for it takes longer than a fast link does. Without a thread for that it is made as the state arrives.
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

    /// Sends frames beside this channel's own.
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

    /// How long the other side took to answer the greeting; zero at the side that was greeted.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`ControlError::Io`] if the connection is broken, [`ControlError::NotTaken`] if the peer does not read. The message may
    /// have arrived all the same.
    pub fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        let body = message.encode()?;
        let mut frame = FrameHead::new(message.kind(), &body)?.as_bytes().to_vec();
        frame.extend(body);
        self.connection.send(&frame, message.name())
    }

    /// Waits for the next message, for `limit`, or for as long as the peer lives. `awaited` names it for the error.
    ///
    /// # Errors
    /// [`ControlError`]; after [`ControlError::Timeout`] the message may still come.
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

/// Reads the preamble of a connection that was opened to us.
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

/// Sets a connection up so that a dead peer is noticed and small messages leave at once.
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
    use crate::wire::{AttemptId, PROTOCOL_VERSION};

    /// A peer that answers whoever connects with `reply`, and then closes.
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
