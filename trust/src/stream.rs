//! A TLS connection with blocking reads and writes.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::TcpStream;

use crate::buffer::Buffer;
use crate::session::TlsSession;

/// A TCP connection whose bytes go through a [`TlsSession`], for one thread at a time.
///
/// A write goes to the socket at once, so write much at a time.
#[derive(Debug)]
pub struct TlsStream {
    stream: TcpStream,
    session: TlsSession,
    /// Records on their way to the socket; kept for its allocation.
    records: Buffer,
}

impl TlsStream {
    /// A connection whose handshake is complete.
    #[must_use]
    pub fn new(stream: TcpStream, session: TlsSession) -> Self {
        Self { stream, session, records: Buffer::default() }
    }

    /// The connection beneath, for time limits and to shut it down.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// The session, without the connection.
    #[must_use]
    pub fn into_parts(self) -> (TcpStream, TlsSession) {
        (self.stream, self.session)
    }
}

impl Read for TlsStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        self.fill_buf()?;
        Ok(self.session.read(into))
    }
}

impl BufRead for TlsStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.session.plain().is_empty() && !self.session.is_closed() {
            let count = match self.stream.read(self.session.space(READ_LEN)) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.session.fed(count)?;
        }
        Ok(self.session.plain())
    }

    fn consume(&mut self, count: usize) {
        self.session.consume(count);
    }
}

impl Write for TlsStream {
    fn write(&mut self, plain: &[u8]) -> io::Result<usize> {
        let plain = &plain[..plain.len().min(WRITE_MAX)];
        self.session.encrypt_into(plain, &mut self.records)?;
        let sent = self.stream.write_all(self.records.content());
        self.records.clear();
        sent?;
        Ok(plain.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is read from the socket at once: sixteen records.
const READ_LEN: usize = 16 * ((16 << 10) + 22);

/// What is encrypted before it goes to the socket: few enough bytes to stay in a processor's second-level
/// cache, and enough to make a system call cheap.
const WRITE_MAX: usize = 256 << 10;
