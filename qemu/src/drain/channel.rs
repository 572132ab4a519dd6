//! A channel of the stream: its records are read, the bytes of its pages discarded.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::discard::Discard;
use crate::input::Input;
use crate::tracker::Tracker;

/// The reading end of a channel. It waits while the tracker holds reading back.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    discard: Discard,
    tracker: Arc<Tracker>,
    /// How many bytes all channels have read or discarded.
    total_bytes: Arc<AtomicU64>,
}

impl Channel {
    pub(super) fn new(
        socket: UnixStream,
        tracker: Arc<Tracker>,
        total_bytes: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let discard = Discard::new()?;
        Ok(Self { socket, discard, tracker, total_bytes })
    }

    fn count(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Input for Channel {
    fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.tracker.wait_while_full();
        (&self.socket).read_exact(into)?;
        self.count(into.len() as u64);
        Ok(())
    }

    fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.tracker.wait_while_full();
        loop {
            match (&self.socket).read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => {
                    self.count(read as u64);
                    return Ok(read);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            match self.discard.some(&self.socket, left)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                discarded => left = left.saturating_sub(discarded),
            }
        }
        self.count(bytes);
        Ok(())
    }
}
