//! The handshake on a TCP connection, within one time limit for all of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;

use crate::fingerprint::Fingerprint;
use crate::list::TrustedHosts;
use crate::peer::Peer;
use crate::session::{Next, TlsSession};
use crate::store::TrustStore;
use crate::tls_error::TlsError;
use crate::verifier::{client_config, server_config};

/// Opens TLS on a connection to a host that must be in the list, and if `expected` is given the host with
/// that key.
///
/// # Errors
/// [`TlsError`]; the connection is of no further use. The peer learns the reason, as far as TLS can say it.
pub fn connect(
    stream: &TcpStream,
    store: &TrustStore,
    expected: Option<Fingerprint>,
    limit: Duration,
) -> Result<(TlsSession, Peer), TlsError> {
    let (key, trusted) = (store.host_key()?, store.trusted()?);
    let own = key.fingerprint();
    let of = |error| TlsError::of(error, own);
    let config = client_config(&key, trusted.clone()).map_err(of)?;
    let name = ServerName::try_from("sterna").map_err(|error| TlsError::Protocol(error.to_string()))?;
    let connection = UnbufferedClientConnection::new(config, name).map_err(of)?;
    let (session, peer) = complete(TlsSession::client(connection, own), stream, &trusted, limit)?;
    match expected {
        Some(expected) if !trusted.same_host(expected, peer.fingerprint) => {
            Err(TlsError::OtherHost { name: peer.name, fingerprint: peer.fingerprint, expected })
        }
        _ => Ok((session, peer)),
    }
}

/// Answers the opening of TLS on a connection, by a host that must be in the list.
///
/// # Errors
/// [`TlsError`]; the connection is of no further use. The peer learns the reason, as far as TLS can say it.
pub fn accept(
    stream: &TcpStream,
    store: &TrustStore,
    limit: Duration,
) -> Result<(TlsSession, Peer), TlsError> {
    let (key, trusted) = (store.host_key()?, store.trusted()?);
    let own = key.fingerprint();
    let of = |error| TlsError::of(error, own);
    let config = server_config(&key, trusted.clone()).map_err(of)?;
    let connection = UnbufferedServerConnection::new(config).map_err(of)?;
    complete(TlsSession::server(connection, own), stream, &trusted, limit)
}

fn complete(
    mut session: TlsSession,
    stream: &TcpStream,
    trusted: &TrustedHosts,
    limit: Duration,
) -> Result<(TlsSession, Peer), TlsError> {
    let mut transfer = Transfer { stream, deadline: Instant::now() + limit, limit };
    let completed = transfer.run(&mut session);
    // An answer, or the alert after an error.
    let sent = transfer.send(&session.take_answers());
    completed?;
    sent?;
    let fingerprint = Fingerprint::of(session.peer_key().ok_or(TlsError::NoKey)?);
    let peer = trusted.with_key(fingerprint).ok_or(TlsError::NotTrusted { fingerprint })?;
    Ok((session, peer.clone()))
}

/// The connection during the handshake.
struct Transfer<'stream> {
    stream: &'stream TcpStream,
    deadline: Instant,
    limit: Duration,
}

impl Transfer<'_> {
    fn run(&mut self, session: &mut TlsSession) -> Result<(), TlsError> {
        let (mut next, mut came) = (session.advance()?, 0);
        loop {
            self.send(&session.take_answers())?;
            if next == Next::Traffic {
                return Ok(());
            }
            if came > HANDSHAKE_MAX {
                return Err(TlsError::NotTls);
            }
            self.stream.set_read_timeout(Some(self.left()?)).map_err(TlsError::Io)?;
            let count = match self.stream.read(session.space(READ_LEN)) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.error(error)),
            };
            came += count;
            next = session.fed(count)?;
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), TlsError> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.left()?)).map_err(TlsError::Io)?;
            match self.stream.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error(error)),
            }
        }
        Ok(())
    }

    fn left(&self) -> Result<Duration, TlsError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(TlsError::Timeout { limit: self.limit }) } else { Ok(left) }
    }

    fn error(&self, error: io::Error) -> TlsError {
        match error.kind() {
            ErrorKind::WouldBlock => TlsError::Timeout { limit: self.limit },
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => TlsError::Closed,
            _ => TlsError::Io(error),
        }
    }
}

/// The most bytes that a peer may send before the handshake is complete.
const HANDSHAKE_MAX: usize = 64 << 10;

const READ_LEN: usize = 4 << 10;
