//! Reads a channel with a little look-ahead, and counts its bytes.

use std::io;

use crate::input::Input;
use crate::stream::error::StreamFault;

/// The look-ahead at most: some 450 records of zero pages.
const AHEAD_MAX: usize = 4096;
/// A record of a zero page, whose block is that of the record before.
const ZERO_RECORD_LEN: usize = 9;

/// The next bytes of a channel.
pub(crate) struct Cursor<'input> {
    input: &'input mut dyn Input,
    /// How many bytes were used.
    offset: u64,
    /// Where the item began that is being read.
    item: u64,
    ahead: Box<[u8]>,
    /// What in `ahead` was read and not yet used.
    start: usize,
    end: usize,
    /// How many bytes a read may ask for beyond what is needed.
    more: usize,
}

impl<'input> Cursor<'input> {
    pub(crate) fn new(input: &'input mut dyn Input) -> Self {
        let ahead = vec![0; AHEAD_MAX + usize::from(u8::MAX)].into();
        Self { input, offset: 0, item: 0, ahead, start: 0, end: 0, more: 0 }
    }

    /// Begins an item: an error about it has this offset.
    pub(crate) fn begin_item(&mut self) {
        self.item = self.offset;
    }

    /// Where an error belongs.
    pub(crate) fn place_of(&self, fault: &StreamFault) -> u64 {
        if matches!(fault, StreamFault::Input(_) | StreamFault::Ends) { self.offset } else { self.item }
    }

    /// The last record was of a zero page: more of the kind are likely to follow, so a read may take several.
    /// The look-ahead grows from record to record, so that few bytes of pages get into it.
    pub(crate) fn expect_zero_pages(&mut self) {
        self.more = (self.more * 2).clamp(ZERO_RECORD_LEN, AHEAD_MAX);
    }

    /// The bytes of a page follow, which shall not be read.
    pub(crate) fn expect_page_bytes(&mut self) {
        self.more = 0;
    }

    pub(crate) fn u8(&mut self) -> Result<u8, StreamFault> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, StreamFault> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, StreamFault> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, StreamFault> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamFault> {
        let mut array = [0; N];
        array.copy_from_slice(self.short(N)?);
        Ok(array)
    }

    /// A length in one byte, and as many bytes.
    pub(crate) fn counted(&mut self) -> Result<&[u8], StreamFault> {
        let len = self.u8()?;
        self.short(len.into())
    }

    /// Up to 255 bytes.
    fn short(&mut self, len: usize) -> Result<&[u8], StreamFault> {
        if self.end - self.start < len {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let room = len + self.more;
            while self.end < len {
                match self.input.read_some(&mut self.ahead[self.end..room]).map_err(fault)? {
                    0 => return Err(StreamFault::Ends),
                    read => self.end += read,
                }
            }
        }
        let from = self.start;
        self.used(len);
        Ok(&self.ahead[from..from + len])
    }

    pub(crate) fn fill(&mut self, into: &mut [u8]) -> Result<(), StreamFault> {
        let held = into.len().min(self.end - self.start);
        let (from_ahead, rest) = into.split_at_mut(held);
        from_ahead.copy_from_slice(&self.ahead[self.start..self.start + held]);
        self.used(held);
        if !rest.is_empty() {
            self.input.read_exact(rest).map_err(fault)?;
            self.offset += rest.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn skip(&mut self, bytes: u64) -> Result<(), StreamFault> {
        let held = (self.end - self.start).min(usize::try_from(bytes).unwrap_or(usize::MAX));
        self.used(held);
        let rest = bytes - held as u64;
        if rest > 0 {
            self.input.skip(rest).map_err(fault)?;
            self.offset += rest;
        }
        Ok(())
    }

    /// What has arrived, zero bytes at the end of the channel.
    pub(crate) fn some(&mut self, into: &mut [u8]) -> Result<usize, StreamFault> {
        let held = into.len().min(self.end - self.start);
        if held > 0 {
            into[..held].copy_from_slice(&self.ahead[self.start..self.start + held]);
            self.used(held);
            return Ok(held);
        }
        let read = self.input.read_some(into).map_err(fault)?;
        self.offset += read as u64;
        Ok(read)
    }

    fn used(&mut self, len: usize) {
        self.start += len;
        self.offset += len as u64;
    }
}

fn fault(error: io::Error) -> StreamFault {
    if error.kind() == io::ErrorKind::UnexpectedEof { StreamFault::Ends } else { StreamFault::Input(error) }
}
