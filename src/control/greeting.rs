//! The first bytes of a connection: preambles, and the TLS handshake.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use sterna_trust::{Fingerprint, Peer, TlsError, TlsStream, TrustStore, accept, connect};

use super::error::ControlError;
use super::protected_stream::ProtectedStream;
use super::security::Security;
use crate::wire::{LANE_OPENING_LEN, LaneOpening, PREAMBLE_LEN, Preamble, Protection, Role};

/// A connection whose greeting is complete.
#[derive(Debug)]
pub(crate) struct Greeted {
    pub(crate) stream: ProtectedStream,
    /// The other host and the files by which it is trusted, if the connection has TLS.
    pub(crate) host: Option<(Peer, TrustStore)>,
}

impl Greeted {
    /// A connection without TLS.
    pub(crate) fn plain(stream: TcpStream) -> Self {
        Self { stream: ProtectedStream::Plain(stream), host: None }
    }

    /// The key that the other host has proved.
    pub(crate) fn identity(&self) -> Option<Fingerprint> {
        self.host.as_ref().map(|(host, _)| host.fingerprint)
    }
}

/// Greets the destination as a control channel; returns also how long its answer took.
pub(super) fn open_control(
    mut stream: TcpStream,
    store: Option<&TrustStore>,
    expected: Option<Fingerprint>,
    limit: Duration,
) -> Result<(Greeted, Duration), ControlError> {
    let own = preamble(Role::Control, store);
    let began = Instant::now();
    stream.write_all(&own.encode()).map_err(ControlError::Io)?;
    let answer = read_preamble(&mut stream, limit)?;
    let round_trip = began.elapsed();
    match (own.protection, answer.protection) {
        (Protection::Plain, Protection::Tls) => return Err(ControlError::TlsRequired),
        (Protection::Tls, Protection::Plain) => return Err(ControlError::TlsMissing),
        _ => {}
    }
    let Some(store) = store else { return Ok((Greeted::plain(stream), round_trip)) };
    let (session, host) = connect(&stream, store, expected, limit)?;
    let mut stream = TlsStream::new(stream, session);
    // In this order: a host that closes because it does not trust this one must have nothing left to read, or
    // its reason would be lost.
    hear_again(&mut stream, answer, limit)?;
    say_again(&mut stream, own, limit)?;
    let stream = ProtectedStream::Tls(Box::new(stream));
    Ok((Greeted { stream, host: Some((host, store.clone())) }, round_trip))
}

/// Opens a lane to the host that has proved this key.
pub(crate) fn open_lane(
    mut stream: TcpStream,
    host: Option<(&TrustStore, Fingerprint)>,
    limit: Duration,
) -> Result<ProtectedStream, ControlError> {
    let own = preamble(Role::Lane, host.map(|(store, _)| store));
    stream.write_all(&own.encode()).map_err(ControlError::Io)?;
    let Some((store, expected)) = host else { return Ok(ProtectedStream::Plain(stream)) };
    let (session, _) = connect(&stream, store, Some(expected), limit)?;
    Ok(ProtectedStream::Tls(Box::new(TlsStream::new(stream, session))))
}

/// Greets a host that has opened a connection. One that is refused learns what this side asks for.
pub(crate) fn greet(
    stream: TcpStream,
    opened: Preamble,
    security: &Security,
    limit: Duration,
) -> Result<Greeted, ControlError> {
    let peer = stream.peer_addr().map_err(ControlError::Io)?;
    let store = match security.to_accept(peer, opened.protection) {
        Ok(store) => store,
        Err(error) => {
            let protection = match opened.protection {
                Protection::Plain => Protection::Tls,
                Protection::Tls => Protection::Plain,
            };
            let _ = (&stream).write_all(&Preamble { protection, ..opened }.encode());
            return Err(error);
        }
    };
    if opened.role == Role::Control {
        (&stream).write_all(&opened.encode()).map_err(ControlError::Io)?;
    }
    let Some(store) = store else { return Ok(Greeted::plain(stream)) };
    let (session, host) = accept(&stream, store, limit.max(HANDSHAKE_MAX))?;
    let mut stream = TlsStream::new(stream, session);
    if opened.role == Role::Control {
        say_again(&mut stream, opened, limit)?;
        hear_again(&mut stream, opened, limit)?;
    }
    let stream = ProtectedStream::Tls(Box::new(stream));
    Ok(Greeted { stream, host: Some((host, store.clone())) })
}

/// Answers a peer whose preamble is invalid: with this side's version, so that both ends can name both.
pub(crate) fn answer_stranger(mut stream: &TcpStream) {
    let preamble = Preamble { role: Role::Control, protection: Protection::Plain };
    let _ = stream.write_all(&preamble.encode());
}

/// Repeats a preamble within TLS.
fn say_again(stream: &mut TlsStream, preamble: Preamble, limit: Duration) -> Result<(), ControlError> {
    stream.socket().set_write_timeout(Some(limit)).map_err(ControlError::Io)?;
    stream.write_all(&preamble.encode()).map_err(|error| of_greeting(error, limit))
}

/// Hears the other side's preamble again within TLS: nothing has changed it on its way, and the other side
/// trusts this host.
fn hear_again(stream: &mut TlsStream, preamble: Preamble, limit: Duration) -> Result<(), ControlError> {
    stream.socket().set_read_timeout(Some(limit)).map_err(ControlError::Io)?;
    let mut again = [0; PREAMBLE_LEN];
    stream.read_exact(&mut again).map_err(|error| of_greeting(error, limit))?;
    if Preamble::decode(again)? == preamble { Ok(()) } else { Err(TlsError::Changed.into()) }
}

/// Reads the preamble of the other side, all of it within `limit`.
pub(crate) fn read_preamble(stream: &mut TcpStream, limit: Duration) -> Result<Preamble, ControlError> {
    let mut bytes = [0; PREAMBLE_LEN];
    let socket = &*stream;
    read_within(&mut &*socket, socket, &mut bytes, limit)?;
    Ok(Preamble::decode(bytes)?)
}

/// Reads what a lane says first, all of it within `limit`.
pub(crate) fn read_lane_opening(
    stream: &mut ProtectedStream,
    limit: Duration,
) -> Result<LaneOpening, ControlError> {
    let mut bytes = [0; LANE_OPENING_LEN];
    let socket = stream.socket().try_clone().map_err(ControlError::Io)?;
    read_within(stream, &socket, &mut bytes, limit)?;
    Ok(zerocopy::transmute!(bytes))
}

fn read_within(
    stream: &mut impl Read,
    socket: &TcpStream,
    mut bytes: &mut [u8],
    limit: Duration,
) -> Result<(), ControlError> {
    let deadline = Instant::now() + limit;
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ControlError::Timeout { awaited: GREETING, limit });
        }
        socket.set_read_timeout(Some(left)).map_err(ControlError::Io)?;
        match stream.read(bytes) {
            Ok(0) => return Err(ControlError::Closed(GREETING)),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(of_greeting(error, limit)),
        }
    }
    Ok(())
}

/// The meaning of an error while a greeting is awaited.
fn of_greeting(error: io::Error, limit: Duration) -> ControlError {
    match error.kind() {
        ErrorKind::UnexpectedEof => ControlError::Closed(GREETING),
        ErrorKind::WouldBlock => ControlError::Timeout { awaited: GREETING, limit },
        _ => match error.downcast::<TlsError>() {
            Ok(error) => error.into(),
            Err(error) => ControlError::Io(error),
        },
    }
}

fn preamble(role: Role, store: Option<&TrustStore>) -> Preamble {
    let protection = if store.is_some() { Protection::Tls } else { Protection::Plain };
    Preamble { role, protection }
}

const GREETING: &str = "greeting";

/// How long a peer may take for a handshake: several messages, which a host that is busy answers late.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
