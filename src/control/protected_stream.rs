//! A connection with TLS or without.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use sterna_trust::TlsStream;

/// A TCP connection, with TLS or without.
#[derive(Debug)]
pub enum ProtectedStream {
    /// Without.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream>),
}

impl ProtectedStream {
    /// The connection itself: for time limits, and to shut it down.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.socket(),
        }
    }
}

impl Read for ProtectedStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(into),
            Self::Tls(stream) => stream.read(into),
        }
    }
}

impl Write for ProtectedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
