use std::fmt;
use std::io::{self, ErrorKind, Write};

use super::{CHUNK_MAX, SECTION_NAME_MAX};

/// Small writes are collected up to this many bytes.
const BUFFER_BYTES: usize = 16 << 10;

/// The length in front of a chunk.
const HEAD_BYTES: usize = size_of::<u32>();

/// Takes a saved state as named sections, one after the other.
pub struct StateWriter<'state> {
    to: &'state mut dyn Write,
    written: u64,
    /// Whether a section is open; the next one ends it.
    in_section: bool,
    /// The chunk being collected, after the space for its length.
    chunk: Vec<u8>,
}

impl<'state> StateWriter<'state> {
    /// Writes to a stream, such as a file or a buffer. The engine makes the writer of a migration.
    pub fn new(to: &'state mut dyn Write) -> Self {
        let mut chunk = Vec::with_capacity(HEAD_BYTES + BUFFER_BYTES);
        chunk.extend([0; HEAD_BYTES]);
        Self { to, written: 0, in_section: false, chunk }
    }

    /// Ends the section before, and begins one with this name: 1 to [`SECTION_NAME_MAX`] bytes. Names may
    /// repeat.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a name that is empty or too long; that of the stream.
    pub fn section(&mut self, name: &str) -> io::Result<SectionWriter<'_, 'state>> {
        let len = u8::try_from(name.len()).ok().filter(|&len| (1..=SECTION_NAME_MAX).contains(&len.into()));
        let Some(len) = len else {
            let what =
                format!("a section's name has 1 to {SECTION_NAME_MAX} bytes, {name:?} has {}", name.len());
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        };
        self.end_section()?;
        self.put(&[len])?;
        self.put(name.as_bytes())?;
        self.in_section = true;
        Ok(SectionWriter(self))
    }

    /// How many bytes went to the stream, including the names and lengths of sections. Bytes not yet sent as
    /// a chunk are left out.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.written
    }

    /// Ends the last section and the state; returns the state's length in bytes. The engine does that after
    /// [`save`](crate::guest::SourceGuest::save).
    ///
    /// # Errors
    /// That of the stream.
    pub fn finish(mut self) -> io::Result<u64> {
        self.end_section()?;
        self.put(&[0])?;
        self.to.flush()?;
        Ok(self.written)
    }

    fn end_section(&mut self) -> io::Result<()> {
        if self.in_section {
            self.send_chunk()?;
            self.put(&[0; HEAD_BYTES])?;
            self.in_section = false;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = HEAD_BYTES + BUFFER_BYTES - self.chunk.len();
        if bytes.len() < room {
            self.chunk.extend(bytes);
            return Ok(bytes.len());
        }
        self.send_chunk()?;
        if bytes.len() < BUFFER_BYTES {
            self.chunk.extend(bytes);
            return Ok(bytes.len());
        }
        let bytes = &bytes[..bytes.len().min(CHUNK_MAX)];
        self.put(&chunk_head(bytes.len()))?;
        self.put(bytes)?;
        Ok(bytes.len())
    }

    /// Sends the collected bytes as a chunk.
    fn send_chunk(&mut self) -> io::Result<()> {
        let len = self.chunk.len() - HEAD_BYTES;
        if len > 0 {
            self.chunk[..HEAD_BYTES].copy_from_slice(&chunk_head(len));
            self.to.write_all(&self.chunk)?;
            self.written += self.chunk.len() as u64;
            self.chunk.truncate(HEAD_BYTES);
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "no chunk is longer than 1 MiB")]
fn chunk_head(len: usize) -> [u8; HEAD_BYTES] {
    (len as u32).to_le_bytes()
}

impl fmt::Debug for StateWriter<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("StateWriter").field("written", &self.written).finish_non_exhaustive()
    }
}

/// Takes the bytes of one section, which ends when the next begins, or with the state.
#[derive(Debug)]
pub struct SectionWriter<'writer, 'state>(&'writer mut StateWriter<'state>);

impl Write for SectionWriter<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.send_chunk()?;
        self.0.to.flush()
    }
}
