use std::fmt;
use std::io::{self, BufRead, ErrorKind, Read};

use super::{CHUNK_MAX, SECTION_NAME_MAX, SectionError};

/// Reads the sections of a saved state in the order in which they were written.
///
/// A section must be read to its end, or [skipped](SectionReader::skip), before the next one is asked for:
/// unread bytes are a sign of another version.
pub struct StateReader<'state> {
    from: &'state mut dyn BufRead,
    read: u64,
    /// The section that is being read.
    section: Option<Section>,
    /// Whether the end mark was read.
    ended: bool,
}

#[derive(Debug)]
struct Section {
    name: String,
    /// Unread bytes of its current chunk.
    chunk_left: usize,
    /// Whether its last chunk was read.
    over: bool,
}

impl<'state> StateReader<'state> {
    /// Reads what a [`StateWriter`](super::StateWriter) wrote. The engine makes the reader of a migration.
    pub fn new(from: &'state mut dyn BufRead) -> Self {
        Self { from, read: 0, section: None, ended: false }
    }

    /// The next section, whatever its name; `None` after the last.
    ///
    /// # Errors
    /// [`SectionError`], also if the section before was not read to its end.
    pub fn next_section(&mut self) -> Result<Option<SectionReader<'_, 'state>>, SectionError> {
        self.leave_section()?;
        if self.ended {
            return Ok(None);
        }
        let len = usize::from(self.array::<1>()?[0]);
        if len == 0 {
            self.ended = true;
            return Ok(None);
        }
        if len > SECTION_NAME_MAX {
            return Err(SectionError::Malformed("a section's name is too long"));
        }
        let mut name = vec![0; len];
        self.fill(&mut name)?;
        let name =
            String::from_utf8(name).map_err(|_| SectionError::Malformed("a section's name is no UTF-8"))?;
        let section = self.section.insert(Section { name, chunk_left: 0, over: false });
        section.chunk_left = 0;
        Ok(Some(SectionReader(self)))
    }

    /// The next section, which must have this name.
    ///
    /// # Errors
    /// [`SectionError`]; [`SectionError::Missing`] names the section found instead.
    pub fn section(&mut self, wanted: &str) -> Result<SectionReader<'_, 'state>, SectionError> {
        let missing = |got: Option<&str>| SectionError::Missing {
            wanted: wanted.to_owned(),
            got: got.map(str::to_owned),
        };
        match self.next_section()? {
            Some(section) if section.name() == wanted => Ok(section),
            Some(section) => Err(missing(Some(section.name()))),
            None => Err(missing(None)),
        }
    }

    /// Checks that nothing is left. The engine does that after
    /// [`load`](crate::guest::DestinationGuest::load).
    ///
    /// # Errors
    /// [`SectionError`]; [`SectionError::Unread`] names the first section that is left.
    pub fn finish(mut self) -> Result<(), SectionError> {
        if let Some(section) = self.next_section()? {
            return Err(SectionError::Unread(section.name().to_owned()));
        }
        if self.from.fill_buf()?.is_empty() {
            return Ok(());
        }
        Err(SectionError::Malformed("bytes follow its end"))
    }

    /// How many bytes were read from the stream, including the names and lengths of sections.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.read
    }

    /// Checks that the section before was read to its end.
    fn leave_section(&mut self) -> Result<(), SectionError> {
        if !self.at_chunk()? {
            self.section = None;
        }
        match self.section.take() {
            Some(section) => Err(SectionError::Unread(section.name)),
            None => Ok(()),
        }
    }

    /// Goes to the next chunk if the current one is read; returns whether the section has bytes left.
    fn at_chunk(&mut self) -> Result<bool, SectionError> {
        let Some(Section { chunk_left, over, .. }) = &self.section else { return Ok(false) };
        if *over || *chunk_left > 0 {
            return Ok(!over);
        }
        let len = u32::from_le_bytes(self.array()?) as usize;
        if len > CHUNK_MAX {
            return Err(SectionError::Malformed("a chunk is too long"));
        }
        if let Some(section) = &mut self.section {
            (section.chunk_left, section.over) = (len, len == 0);
        }
        Ok(len > 0)
    }

    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], SectionError> {
        let mut bytes = [0; LEN];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), SectionError> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => SectionError::CutShort,
            _ => error.into(),
        })?;
        self.read += bytes.len() as u64;
        Ok(())
    }
}

impl fmt::Debug for StateReader<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read, section, ended, .. } = self;
        let mut shown = formatter.debug_struct("StateReader");
        shown.field("read", read).field("section", section).field("ended", ended).finish_non_exhaustive()
    }
}

/// Gives the bytes of one section, without copying them.
#[derive(Debug)]
pub struct SectionReader<'reader, 'state>(&'reader mut StateReader<'state>);

impl SectionReader<'_, '_> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.section.as_ref().map_or("", |section| &section.name)
    }

    /// Skips the rest of the section.
    ///
    /// # Errors
    /// [`SectionError`].
    pub fn skip(mut self) -> Result<(), SectionError> {
        while self.0.at_chunk()? {
            let len = self.fill_buf()?.len();
            self.consume(len);
        }
        Ok(())
    }

    /// The error of a VMM that does not know this section.
    #[must_use]
    pub fn unknown(&self) -> SectionError {
        SectionError::Unknown(self.name().to_owned())
    }
}

impl BufRead for SectionReader<'_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if !self.0.at_chunk()? {
            return Ok(&[]);
        }
        let left = self.0.section.as_ref().map_or(0, |section| section.chunk_left);
        let bytes = self.0.from.fill_buf()?;
        if bytes.is_empty() {
            return Err(SectionError::CutShort.into());
        }
        Ok(&bytes[..bytes.len().min(left)])
    }

    fn consume(&mut self, count: usize) {
        let Some(section) = &mut self.0.section else { return };
        let count = count.min(section.chunk_left);
        section.chunk_left -= count;
        self.0.from.consume(count);
        self.0.read += count as u64;
    }
}

impl Read for SectionReader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        self.consume(count);
        Ok(count)
    }
}
