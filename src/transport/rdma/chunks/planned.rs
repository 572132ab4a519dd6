//! The parts that the registrar has yet to register in a round.

use std::collections::VecDeque;
use std::ops::Range;

use super::chunking::Chunking;
use super::coverage::BLOCK_PAGES;
use super::parts::{contains, cut};
use super::state::State;
use crate::transport::error::TransportError;
use crate::transport::rdma::wire::ChunkRange;

/// Finds the blocks of a chunk to register, in ascending order.
pub(super) type FindBlocks<'find> = dyn FnMut(ChunkRange) -> Result<Vec<Range<u64>>, TransportError> + 'find;

/// Chunks that need registration, in the order in which lanes reach them. A chunk is examined, and cut, when
/// its turn comes.
#[derive(Debug)]
pub(in crate::transport::rdma) struct Planned {
    chunks: VecDeque<ChunkRange>,
    /// Parts of chunks that were cut, which come first.
    parts: VecDeque<ChunkRange>,
}

impl Planned {
    pub(super) fn new(chunks: VecDeque<ChunkRange>) -> Self {
        Self { chunks, parts: VecDeque::new() }
    }

    /// The next part, in order.
    pub(super) fn next<S>(
        &mut self,
        state: &State<S>,
        find: &mut FindBlocks<'_>,
    ) -> Result<Option<ChunkRange>, TransportError> {
        loop {
            while let Some(part) = self.parts.pop_front() {
                if state.is_free(part) {
                    return Ok(Some(part));
                }
            }
            let Some(chunk) = self.chunks.pop_front() else { return Ok(None) };
            let registered: Vec<_> = state.parts_of(chunk).collect();
            self.parts = cut(chunk, &registered, find(chunk)?).into();
        }
    }

    /// The part to register for a page that a lane waits for and that no part contains. The rest of its chunk
    /// comes next.
    pub(super) fn take<S>(
        &mut self,
        page: (usize, u64),
        chunking: &Chunking,
        state: &State<S>,
        find: &mut FindBlocks<'_>,
    ) -> Result<Option<ChunkRange>, TransportError> {
        let has_page = |&part: &ChunkRange| contains(part, page) && state.is_free(part);
        if let Some(index) = self.parts.iter().position(has_page) {
            return Ok(self.parts.remove(index));
        }
        let Some(chunk) = chunking.range_of(page.0, page.1) else { return Ok(None) };
        let registered: Vec<_> = state.parts_of(chunk).collect();
        let mut needed = find(chunk)?;
        // Whether the block has data or not.
        let block = page.1 / BLOCK_PAGES;
        needed.push(block..block + 1);
        needed.sort_unstable_by_key(|blocks| blocks.start);
        let mut wanted = None;
        for part in cut(chunk, &registered, needed).into_iter().rev() {
            if contains(part, page) {
                wanted = Some(part);
            } else {
                self.parts.push_front(part);
            }
        }
        Ok(wanted)
    }

    /// Puts back a part that found no room.
    pub(super) fn put_back(&mut self, part: ChunkRange) {
        self.parts.push_front(part);
    }
}
