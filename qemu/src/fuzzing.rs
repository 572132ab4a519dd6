//! What QEMU can send, as functions of bytes. None may panic, and what they accept must hold.
//!
//! `fuzz/` calls them from libFuzzer, the tests with damaged copies of good input. Not part of the API.

use std::time::Duration;

use crate::compat::Description;
use crate::multifd::{ChannelPages, Channels, ChannelsError, Dialect};
use crate::names::{Content, PageNames, SharedBlock};
use crate::page::Marks;
use crate::stream::{Blob, Expected, Stage, StreamError, Watch, read};

#[cfg(test)]
mod tests;

/// What the blocks that are not shared may have.
const UNSHARED_MAX: u64 = 1 << 20;
const STATE_MAX: u64 = 1 << 16;

/// The main channel of a stream.
pub fn qemu_stream(input: &[u8]) {
    let Ok(blob) = read_stream(input) else { return };
    let bytes = written(&blob);
    assert!(bytes.len() <= input.len(), "what passes on came in");
    let again = read_stream(&bytes).expect("QEMU must be able to read a blob");
    assert!(written(&again) == bytes, "a blob has nothing that is left out");
}

/// A multifd channel; the first byte says of which version, and how many marks the main channel had.
pub fn qemu_multifd(input: &[u8]) {
    let Some((&first, mut packets)) = input.split_first() else { return };
    let dialect = if first.is_multiple_of(2) { Dialect::Seven } else { Dialect::Nine };
    let shared = shared();
    let channels = Channels::new(1, dialect, &shared, UNSHARED_MAX);
    let read = channels.read(&mut packets, &InBlocks(&shared));
    assert_eq!(read.is_err(), channels.failure().is_some());
    let marks = Marks { sections: u64::from(first / 2), flushes: 0 };
    let finished = channels.finish(marks, Duration::ZERO);
    assert!(read.is_ok() || finished.is_err(), "a channel that failed fails the whole");
}

/// The description of the machine, which the source sends.
pub fn qemu_description(input: &[u8]) {
    let Ok(description) = Description::decode(input) else { return };
    let bytes = description.encode().expect("it is not longer than before");
    assert_eq!(Description::decode(&bytes).expect("it was read before"), description);
    assert!(description.differences(&description).is_empty(), "a machine is like itself");
}

fn read_stream(mut input: &[u8]) -> Result<Blob, StreamError> {
    let shared = shared();
    let expected = Expected {
        shared: &shared,
        machine: None,
        unshared_max_bytes: UNSHARED_MAX,
        state_max_bytes: STATE_MAX,
    };
    read(&mut input, &expected, &InBlocks(&shared), &mut AnyMarks)
}

fn written(blob: &Blob) -> Vec<u8> {
    let mut bytes = Vec::new();
    blob.write_to(&mut bytes).expect("memory takes all bytes");
    assert_eq!(bytes.len() as u64, blob.len_bytes());
    bytes
}

fn shared() -> [SharedBlock; 2] {
    [("mem0", 0x10_000), ("mem1", 0x3000)]
        .map(|(name, len_bytes)| SharedBlock { name: name.to_owned(), len_bytes })
}

/// Checks that the pages are in their blocks.
struct InBlocks<'a>(&'a [SharedBlock]);

impl PageNames for InBlocks<'_> {
    fn named(&self, block: usize, page: u64, _: Content) {
        assert!(page < self.0[block].len_bytes / 4096, "page {page} of block {block}");
    }
}

/// Takes flush marks without any channels.
struct AnyMarks;

impl Watch for AnyMarks {
    fn reached(&mut self, _: Stage, _: Marks) {}

    fn finish_channels(&mut self, _: Marks) -> Result<ChannelPages, ChannelsError> {
        Ok(ChannelPages::default())
    }
}
