//! One end of a TLS connection, without a socket.

use std::fmt;
use std::io;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError};
use rustls::{Error, pki_types::CertificateDer};

use crate::buffer::Buffer;
use crate::fingerprint::Fingerprint;
use crate::tls_error::TlsError;

/// One end of a TLS connection. The caller carries the bytes: it [feeds](Self::feed) what the socket gave,
/// [reads](Self::read) the plain text, and sends what [`encrypt`](Self::encrypt) makes.
///
/// The end of the stream is the end of the socket's: what a peer says has its own end, so a truncated
/// connection is no more than a broken one.
pub struct TlsSession {
    side: Side,
    own: Fingerprint,
    /// Bytes from the socket that are not decrypted yet.
    incoming: Buffer,
    /// Bytes that were decrypted and not read yet.
    plain: Buffer,
    /// Bytes that TLS itself has to send.
    answers: Vec<u8>,
    /// The peer has ended its side of TLS.
    closed: bool,
    /// An error has ended the session.
    failed: bool,
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What a session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// More bytes of the peer, to complete the handshake.
    Handshake,
    /// The handshake is complete, and all whole records are decrypted.
    Traffic,
}

impl TlsSession {
    pub(crate) fn client(connection: UnbufferedClientConnection, own: Fingerprint) -> Self {
        Self::new(Side::Client(connection), own)
    }

    pub(crate) fn server(connection: UnbufferedServerConnection, own: Fingerprint) -> Self {
        Self::new(Side::Server(connection), own)
    }

    fn new(side: Side, own: Fingerprint) -> Self {
        let (incoming, plain) = (Buffer::default(), Buffer::default());
        Self { side, own, incoming, plain, answers: Vec::new(), closed: false, failed: false }
    }

    /// The peer's key, once the handshake is complete.
    pub(crate) fn peer_key(&self) -> Option<&CertificateDer<'static>> {
        let keys = match &self.side {
            Side::Client(connection) => connection.peer_certificates(),
            Side::Server(connection) => connection.peer_certificates(),
        };
        keys.and_then(<[_]>::first)
    }

    /// Takes bytes from the socket, and decrypts all whole records.
    ///
    /// # Errors
    /// [`TlsError`]; the session is over.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), TlsError> {
        self.incoming.push(bytes);
        self.advance().map(drop)
    }

    /// Space for bytes from the socket, at least `len`; [`fed`](Self::fed) says how many came.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        self.incoming.space(len)
    }

    /// As [`feed`](Self::feed), for bytes that are in the space.
    pub(crate) fn fed(&mut self, len: usize) -> Result<Next, TlsError> {
        self.incoming.filled(len);
        self.advance()
    }

    /// Moves plain text out; returns how many bytes, which may be none.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        self.plain.pop_into(into)
    }

    /// The plain text that is not read yet.
    pub(crate) fn plain(&self) -> &[u8] {
        self.plain.content()
    }

    /// Drops the first bytes of the plain text.
    pub(crate) fn consume(&mut self, count: usize) {
        self.plain.discard(count);
    }

    /// Whether the peer has ended its side, and all that came before is read.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed && self.plain.is_empty()
    }

    /// The records of a plain text, after what TLS itself has to send.
    ///
    /// # Errors
    /// [`TlsError`]; the session is over.
    pub fn encrypt(&mut self, plain: &[u8]) -> Result<Vec<u8>, TlsError> {
        let mut out = Buffer::default();
        self.encrypt_into(plain, &mut out)?;
        Ok(out.content().to_vec())
    }

    /// The same, behind the content of a buffer.
    pub(crate) fn encrypt_into(&mut self, plain: &[u8], out: &mut Buffer) -> Result<(), TlsError> {
        // Decrypts what is whole, until TLS is ready to send.
        self.advance()?;
        out.push(&self.answers);
        self.answers.clear();
        let mut len = plain.len() + plain.len().div_ceil(RECORD_MAX).max(1) * RECORD_OVERHEAD;
        loop {
            let Self { side, incoming, .. } = self;
            let space = out.space(len);
            // The incoming bytes are part of a record, and stay.
            let encrypted = match side {
                Side::Client(connection) => {
                    encrypt(connection.process_tls_records(incoming.content_mut()).state, plain, space)
                }
                Side::Server(connection) => {
                    encrypt(connection.process_tls_records(incoming.content_mut()).state, plain, space)
                }
            };
            match encrypted {
                Ok(Ok(count)) => {
                    out.filled(count);
                    return Ok(());
                }
                Ok(Err(InsufficientSizeError { required_size })) => len = required_size,
                Err(error) => {
                    self.failed = true;
                    return Err(TlsError::of(error, self.own));
                }
            }
        }
    }

    /// Bytes that TLS itself has to send, such as the handshake's.
    pub(crate) fn take_answers(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.answers)
    }

    /// Decrypts all whole records, and makes the answers of TLS.
    pub(crate) fn advance(&mut self) -> Result<Next, TlsError> {
        if self.failed {
            return Err(TlsError::Over);
        }
        loop {
            match self.step() {
                Ok(Act::Again) => {}
                Ok(Act::Wait(next)) => return Ok(next),
                Ok(Act::Closed) => {
                    self.closed = true;
                    return Ok(Next::Traffic);
                }
                Err(error) => {
                    self.failed = true;
                    self.alert();
                    return Err(TlsError::of(error, self.own));
                }
            }
        }
    }

    /// After an error: the alert that explains it to the peer is an answer, too.
    fn alert(&mut self) {
        // Once: TLS must not see the bytes again that it has refused.
        let _ = self.step();
    }

    fn step(&mut self) -> Result<Act, Error> {
        let Self { side, incoming, plain, answers, .. } = self;
        // Always all of the bytes: TLS remembers where in them a message of several records begins.
        let (discard, next) = match side {
            Side::Client(connection) => {
                let status = connection.process_tls_records(incoming.content_mut());
                (status.discard, act(status.state, plain, answers))
            }
            Side::Server(connection) => {
                let status = connection.process_tls_records(incoming.content_mut());
                (status.discard, act(status.state, plain, answers))
            }
        };
        incoming.discard(discard);
        next
    }
}

enum Act {
    Again,
    Wait(Next),
    Closed,
}

/// Carries out what TLS asks for.
fn act<D>(
    state: Result<ConnectionState<'_, '_, D>, Error>,
    plain: &mut Buffer,
    answers: &mut Vec<u8>,
) -> Result<Act, Error> {
    match state? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                plain.push(record?.payload);
            }
            Ok(Act::Again)
        }
        ConnectionState::EncodeTlsData(mut encode) => {
            let before = answers.len();
            loop {
                match encode.encode(&mut answers[before..]) {
                    Ok(len) => {
                        answers.truncate(before + len);
                        return Ok(Act::Again);
                    }
                    Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
                        answers.resize(before + required_size, 0);
                    }
                    Err(EncodeError::AlreadyEncoded) => return Ok(Act::Again),
                }
            }
        }
        // The caller sends the answers.
        ConnectionState::TransmitTlsData(transmit) => {
            transmit.done();
            Ok(Act::Again)
        }
        ConnectionState::BlockedHandshake => Ok(Act::Wait(Next::Handshake)),
        ConnectionState::WriteTraffic(_) => Ok(Act::Wait(Next::Traffic)),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Act::Closed),
        other => Err(Error::General(format!("unexpected state {other:?}"))),
    }
}

/// Encrypts, if TLS is ready to send; else the space is too small.
fn encrypt<D>(
    state: Result<ConnectionState<'_, '_, D>, Error>,
    plain: &[u8],
    space: &mut [u8],
) -> Result<Result<usize, InsufficientSizeError>, Error> {
    match state? {
        ConnectionState::WriteTraffic(mut traffic) => match traffic.encrypt(plain, space) {
            Ok(len) => Ok(Ok(len)),
            Err(EncryptError::InsufficientSize(size)) => Ok(Err(size)),
            Err(EncryptError::EncryptExhausted) => Err(Error::EncryptError),
        },
        other => Err(Error::General(format!("not ready to send: {other:?}"))),
    }
}

/// The most plain text in a record.
const RECORD_MAX: usize = 16 << 10;

/// Head, kind and tag of a record.
const RECORD_OVERHEAD: usize = 5 + 1 + 16;

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Io(error) => error,
            error => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("TlsSession").finish_non_exhaustive()
    }
}
