//! Discarding bytes of a socket in the kernel: they are never copied into this process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::socket::Socket;

/// A way to discard bytes.
#[derive(Debug)]
pub(super) enum Discard {
    /// `MSG_TRUNC`, which TCP has: the kernel drops bytes from its buffers. It writes nothing to the memory,
    /// whose length is the number of bytes to drop.
    Truncate { unwritten: Box<[u8]> },
    /// `splice(2)` into `/dev/null` by way of a pipe: buffers move, bytes do not.
    Splice { read: OwnedFd, write: OwnedFd, null: File },
}

impl Discard {
    /// The way for this socket.
    pub(super) fn of(socket: &Socket) -> io::Result<Self> {
        if let Socket::Tcp(_) = socket {
            return Ok(Self::Truncate { unwritten: vec![0; AT_ONCE_MAX].into() });
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A larger pipe needs fewer calls; the default works too.
        let _ = fcntl_setpipe_size(&write, AT_ONCE_MAX);
        let null = File::options().write(true).open("/dev/null")?;
        Ok(Self::Splice { read, write, null })
    }

    /// Discards up to `most` bytes that the socket has or receives; 0 at its end.
    pub(super) fn some(&mut self, socket: impl AsFd, most: u64) -> io::Result<u64> {
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(AT_ONCE_MAX);
        match self {
            Self::Truncate { unwritten } => {
                let flags = RecvFlags::TRUNC | RecvFlags::WAITALL;
                let (_, discarded) = retry_on_intr(|| recv(&socket, &mut unwritten[..most], flags))?;
                Ok(discarded as u64)
            }
            Self::Splice { read, write, null } => {
                let flags = SpliceFlags::MOVE;
                let taken = retry_on_intr(|| splice(&socket, None, &*write, None, most, flags))?;
                let mut left = taken;
                while left > 0 {
                    let dropped = retry_on_intr(|| splice(&*read, None, &*null, None, left, flags))?;
                    if dropped == 0 {
                        return Err(io::Error::new(io::ErrorKind::WriteZero, "/dev/null takes no bytes"));
                    }
                    left -= dropped;
                }
                Ok(taken as u64)
            }
        }
    }
}

/// How much one call discards at most: a packet of a multifd channel.
const AT_ONCE_MAX: usize = 512 << 10;
