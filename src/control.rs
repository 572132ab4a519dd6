//! The control channel: [`wire`](crate::wire) messages over one TCP connection.
//!
//! Nothing here waits without end for a peer that has gone: the sockets carry keepalive and `TCP_USER_TIMEOUT`, so a cut
//! link becomes an error within [`SILENCE_MAX`], and each awaited answer has its own time limit besides.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::wire::{FRAME_HEAD_LEN, FrameHead, Message, PREAMBLE_LEN, Preamble, Role, Token, WireError};

/// How long a peer may be silent on a connection with unanswered data or keepalives before it counts as lost.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);

/// How long one step of the conversation may take where nothing bigger than a message is worked on.
pub const STEP_MAX: Duration = Duration::from_secs(20);

/// How long to try to connect.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// What can go wrong on the control channel.
#[derive(Debug, Error)]
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
    #[error("cannot connect to {address}: {error}; is `sterna receive` running there, and the port open?")]
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

/// One end of a control connection.
#[derive(Debug)]
pub struct ControlChannel {
    stream: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
    round_trip: Duration,
}

impl ControlChannel {
    /// Connects to a destination at `HOST:PORT`, trying each of its addresses.
    ///
    /// # Errors
    /// [`ControlError`]: the host is unknown, nobody listens, or the listener is not a peer of this version.
    pub fn connect(address: &str) -> Result<Self, ControlError> {
        let addresses = address
            .to_socket_addrs()
            .map_err(|error| ControlError::Resolve { host: address.to_owned(), error })?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for candidate in addresses {
            match TcpStream::connect_timeout(&candidate, CONNECT_MAX) {
                Ok(stream) => return Self::open(stream),
                Err(error) => failure = error,
            }
        }
        Err(ControlError::Connect { address: address.to_owned(), error: failure })
    }

    fn open(stream: TcpStream) -> Result<Self, ControlError> {
        let mut channel = Self::over(stream)?;
        let began = Instant::now();
        channel.send_preamble()?;
        read_preamble(&mut channel.stream, STEP_MAX)?;
        channel.round_trip = began.elapsed();
        Ok(channel)
    }

    /// Takes the destination's end of a connection whose preamble has been read, and answers it.
    pub(crate) fn answer(stream: TcpStream) -> Result<Self, ControlError> {
        let mut channel = Self::over(stream)?;
        channel.send_preamble()?;
        Ok(channel)
    }

    fn over(stream: TcpStream) -> Result<Self, ControlError> {
        tune(&stream).map_err(ControlError::Io)?;
        let peer = stream.peer_addr().map_err(ControlError::Io)?;
        let local = stream.local_addr().map_err(ControlError::Io)?;
        Ok(Self { stream, peer, local, round_trip: Duration::ZERO })
    }

    fn send_preamble(&mut self) -> Result<(), ControlError> {
        let preamble = Preamble { role: Role::Control, token: Token::NONE };
        self.stream.write_all(&preamble.encode()).map_err(ControlError::Io)
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
    /// [`ControlError::Io`] if the connection is broken. The message may have arrived all the same.
    pub fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        let body = message.encode()?;
        let body_len = u32::try_from(body.len()).map_err(|_| WireError::Malformed("message"))?;
        let mut frame = FrameHead::new(message.kind(), body_len).as_bytes().to_vec();
        frame.extend(body);
        self.stream.write_all(&frame).map_err(ControlError::Io)
    }

    /// Waits for the next message, for `limit` or without limit. `awaited` names it for the error.
    ///
    /// # Errors
    /// [`ControlError`]; the channel is of no further use, as part of a message may have been read.
    pub fn receive(
        &mut self,
        awaited: &'static str,
        limit: Option<Duration>,
    ) -> Result<Message, ControlError> {
        self.stream.set_read_timeout(limit).map_err(ControlError::Io)?;
        let explain = |error: io::Error| match (error.kind(), limit) {
            (io::ErrorKind::UnexpectedEof, _) => ControlError::Closed(awaited),
            (io::ErrorKind::WouldBlock, Some(limit)) => ControlError::Timeout { awaited, limit },
            _ => ControlError::Io(error),
        };
        let mut head = [0; FRAME_HEAD_LEN];
        self.stream.read_exact(&mut head).map_err(explain)?;
        let head = FrameHead::read_from_bytes(&head).map_err(|_| WireError::Malformed("frame"))?;
        let (len, max) = (head.body_len.get() as usize, Message::body_max(head.kind.get())?);
        if len > max {
            return Err(WireError::TooLong { what: "a message", len, max }.into());
        }
        let mut body = vec![0; len];
        self.stream.set_read_timeout(Some(SILENCE_MAX)).map_err(ControlError::Io)?;
        self.stream.read_exact(&mut body).map_err(explain)?;
        Ok(Message::decode(head.kind.get(), &body)?)
    }
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
    use std::thread;

    use super::*;
    use crate::wire::{Epoch, PROTOCOL_VERSION};

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
        for message in [Message::RoundClosed(3), Message::Go(Epoch([1; 16]))] {
            let body = message.encode().unwrap();
            bytes.extend(FrameHead::new(message.kind(), u32::try_from(body.len()).unwrap()).as_bytes());
            bytes.extend(body);
        }
        let mut channel = ControlChannel::connect(&peer(bytes)).unwrap();
        assert_eq!(channel.receive("a", Some(STEP_MAX)).unwrap(), Message::RoundClosed(3));
        assert_eq!(channel.receive("b", Some(STEP_MAX)).unwrap(), Message::Go(Epoch([1; 16])));
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
    fn a_length_past_the_bound_is_refused_before_the_body_comes() {
        let mut bytes = greeting();
        bytes.extend(FrameHead::new(Message::Go(Epoch([0; 16])).kind(), u32::MAX).as_bytes());
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
