//! Connects to a unix socket, with a time limit.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// The process at the other end of a monitor's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its identity, as this process sees it.
    pub process: i32,
    /// Its user.
    pub user: u32,
}

/// Connects. If the queue of the socket is full, this waits for a place until the limit, and then fails as
/// `WouldBlock`.
pub(super) fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Which process listens at the other end.
pub(super) fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = socket_peercred(stream)?;
    Ok(Peer { process: credentials.pid.as_raw_nonzero().get(), user: credentials.uid.as_raw() })
}
