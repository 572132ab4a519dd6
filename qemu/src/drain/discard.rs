//! Discarding bytes of a socket in the kernel: they are never copied into this process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// `splice(2)` into `/dev/null` by way of a pipe: buffers move, bytes do not.
#[derive(Debug)]
pub(super) struct Discard {
    read: OwnedFd,
    write: OwnedFd,
    null: File,
}

impl Discard {
    pub(super) fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A larger pipe needs fewer calls; the default works too.
        let _ = fcntl_setpipe_size(&write, AT_ONCE_MAX);
        let null = File::options().write(true).open("/dev/null")?;
        Ok(Self { read, write, null })
    }

    /// Discards up to `most` bytes that the socket has or receives; 0 at its end.
    pub(super) fn some(&mut self, socket: impl AsFd, most: u64) -> io::Result<u64> {
        let Self { read, write, null } = self;
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(AT_ONCE_MAX);
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

/// How much one call discards at most: a packet of a multifd channel.
const AT_ONCE_MAX: usize = 512 << 10;
