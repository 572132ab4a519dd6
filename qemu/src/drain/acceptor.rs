//! Accepts the channels of a multifd stream.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{RecvFlags, recv};

use super::listener::Listener;

/// A socket to which QEMU connects the channels.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) listener: Listener,
    /// QEMU's process: no other may connect.
    pub(super) process: i32,
    /// How many multifd channels there are, beside the main channel.
    pub(super) channels: usize,
}

impl Acceptor {
    /// Accepts all channels, and passes each on with the answer whether it is the main channel.
    pub(super) fn accept_all(self, connected: impl Fn(UnixStream, bool) -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + CONNECTS_MAX;
        for _ in 0..=self.channels {
            let stream = self.accept(deadline)?;
            let is_main = is_main(&stream, deadline)?;
            connected(stream, is_main)?;
        }
        Ok(())
    }

    fn accept(&self, deadline: Instant) -> io::Result<UnixStream> {
        loop {
            await_readable(self.listener.socket(), deadline)?;
            let (stream, _) = self.listener.socket().accept()?;
            if socket_peercred(&stream)?.pid.as_raw_nonzero().get() == self.process {
                return Ok(stream);
            }
        }
    }
}

/// Looks at the first bytes of a channel, which the reader still gets.
fn is_main(stream: &UnixStream, deadline: Instant) -> io::Result<bool> {
    let mut first = [0; MAIN_FIRST.len()];
    loop {
        await_readable(stream, deadline)?;
        let (_, seen) = recv(stream, &mut first, RecvFlags::PEEK)?;
        if seen == first.len() {
            return Ok(first == *MAIN_FIRST);
        }
        if seen == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn await_readable(socket: impl std::os::fd::AsFd, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(&socket, PollFlags::IN)];
    match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// The first bytes of a main channel.
const MAIN_FIRST: &[u8; 4] = b"QEVM";

/// How long QEMU may take to connect all channels.
const CONNECTS_MAX: Duration = Duration::from_secs(20);
