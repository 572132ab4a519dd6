//! Where the bytes of a stream come from.

use std::io;

/// Bytes of one channel of a migration, in order.
pub trait Input {
    /// Fills the buffer. Fails with [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the channel ends
    /// before.
    fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()>;

    /// Reads at least one byte, and as many as have arrived and fit. Zero bytes mean the end of the channel.
    fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize>;

    /// Discards bytes: the contents of pages of shared RAM. Fails like [`read_exact`](Self::read_exact).
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

impl<I: Input + ?Sized> Input for &mut I {
    fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        (**self).read_exact(into)
    }

    fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (**self).read_some(into)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        (**self).skip(bytes)
    }
}

impl Input for &[u8] {
    fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        io::Read::read_exact(self, into)
    }

    fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        io::Read::read(self, into)
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = usize::try_from(bytes).ok().and_then(|bytes| self.split_at_checked(bytes));
        let (_, rest) = skipped.ok_or(io::ErrorKind::UnexpectedEof)?;
        *self = rest;
        Ok(())
    }
}
