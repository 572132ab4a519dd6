//! Lanes and regions without a device, for `sterna-bench blackout`: a round's work besides sending and
//! registering.

use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::chunks::{BLOCK_PAGES, BatchSize, Chunks, contains};
use super::wire::ChunkRange;
use crate::dirty::DirtyBitmap;
use crate::memory::{PageRun, RamLayout};
use crate::transport::error::TransportError;
use crate::transport::lane::Lane;

/// All of a guest's chunks, each without a region.
#[derive(Debug)]
pub(crate) struct NullRegions {
    chunks: Arc<Chunks<()>>,
}

impl NullRegions {
    /// For this many lanes, with nothing registered.
    pub(crate) fn new(layout: RamLayout, lanes: u8) -> Self {
        Self { chunks: Arc::new(Chunks::new(layout, lanes.into(), None)) }
    }

    /// Registers the chunks that a round of these pages needs; returns their number.
    pub(crate) fn register(&self, dirty: &DirtyBitmap) -> usize {
        let mut planned = self.chunks.plan(dirty);
        let mut all_of = |chunk: ChunkRange| -> Result<Vec<Range<u64>>, TransportError> {
            let end = (chunk.first_page + chunk.pages).div_ceil(BLOCK_PAGES);
            Ok(iter::once(chunk.first_page / BLOCK_PAGES..end).collect())
        };
        let size = BatchSize { parts: usize::MAX, pages: u64::MAX };
        // Cannot fail: it does not search memory for holes.
        let batch = self.chunks.next(&mut planned, &mut all_of, size, false);
        let ranges = batch.map(|batch| batch.ranges).unwrap_or_default();
        ranges.iter().for_each(|&range| self.chunks.set(range, ()));
        ranges.len()
    }

    /// A lane that acquires a chunk as a lane of queue pairs does, and writes nothing.
    pub(crate) fn lane(&self, index: usize) -> Box<dyn Lane> {
        Box::new(ChunkLane { index, chunks: self.chunks.clone(), current: None })
    }
}

#[derive(Debug)]
struct ChunkLane {
    index: usize,
    chunks: Arc<Chunks<()>>,
    current: Option<(ChunkRange, Option<Arc<()>>)>,
}

impl Lane for ChunkLane {
    fn write(&mut self, mut run: PageRun) -> Result<(), TransportError> {
        while run.pages > 0 {
            let page = (run.region, run.first_page);
            if self.current.as_ref().is_none_or(|(current, _)| !contains(*current, page)) {
                self.chunks.reached(self.index, run.region, run.first_page);
                let whole = self.chunks.whole(run.region, run.first_page).map(|(range, ())| (range, None));
                self.current = whole.or_else(|| {
                    self.chunks.acquire(run.region, run.first_page).map(|(range, chunk)| (range, Some(chunk)))
                });
            }
            let Some((range, _)) = &self.current else { break };
            let pages = run.pages.min(range.first_page + range.pages - run.first_page);
            run.first_page += pages;
            run.pages -= pages;
        }
        Ok(())
    }

    fn fence(&mut self, _round: u32) -> Result<(), TransportError> {
        self.current = None;
        self.chunks.reached_end(self.index);
        Ok(())
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}
