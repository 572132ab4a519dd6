//! Registration of memory at both ends, ahead of the lanes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use sterna_rdma::{Access, MemoryRegion, ProtectionDomain};

use super::chunks::{BLOCK_PAGES, BatchSize, Chunk, Chunks};
use super::pinning::register;
use super::wire::{CHUNKS_MAX, ChunkKey, ChunkRange, Keys, Request};
use crate::control::{ControlChannel, STEP_MAX};
use crate::dirty::DirtyBitmap;
use crate::memory::{GuestRam, MappedSearch, PAGE_BYTES, PageRun, TouchedSearch};
use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;
use crate::transport::lane::Registration;
use crate::transport::requests::{await_answer, send_request};

/// The size of one request, registered in parallel at either end: four of the largest chunks, or many small
/// parts.
const BATCH: BatchSize = BatchSize { parts: 32, pages: 4 * 16_384 };

/// How many batches are requested ahead: the destination registers one while the source registers another.
const BATCHES_AHEAD: usize = 2;

/// Registers chunks at both ends ahead of the lanes that write from and to them.
///
/// Only memory with data is registered, and so pinned: a chunk with holes is registered in parts. If the
/// guest begins to use a hole meanwhile, a lane requests it.
#[derive(Debug)]
pub(super) struct Registrar {
    chunks: Arc<Chunks>,
    domain: Arc<ProtectionDomain>,
    ram: GuestRam,
    /// The number of rounds begun.
    rounds: AtomicU32,
    measured: Mutex<Measured>,
    mapped: MappedSearch,
}

/// The durations of registering.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    /// Of the latest round that had something to register.
    latest: Registered,
    /// Of the current round.
    round: Registered,
    /// How many bytes of the pages to send next were missing.
    missing_bytes: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Registered {
    bytes: u64,
    /// Without idle time.
    time: Duration,
}

impl Registrar {
    pub(super) fn new(chunks: Arc<Chunks>, domain: Arc<ProtectionDomain>, ram: GuestRam) -> Self {
        Self {
            chunks,
            domain,
            ram,
            rounds: AtomicU32::new(0),
            measured: Mutex::default(),
            mapped: MappedSearch::default(),
        }
    }

    /// Begins a round. Not part of `run`, which may start only after the round has ended.
    pub(super) fn begin(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        self.measured().round = Registered::default();
        self.chunks.begin();
    }

    /// How much had to be registered for the current round.
    pub(super) fn registered_in_round(&self) -> u64 {
        self.measured().round.bytes
    }

    /// How much of these pages, which are sent next, is not registered; how long registering takes for the
    /// part within the budget; and how much exceeds the budget.
    pub(super) fn expected(&self, dirty: &DirtyBitmap) -> (Duration, u64) {
        let (missing_bytes, surplus_bytes) = self.chunks.missing_bytes(dirty);
        let mut measured = self.measured();
        measured.missing_bytes = Some(missing_bytes);
        let Registered { bytes, time } = measured.latest;
        drop(measured);
        (share_of(time, missing_bytes.saturating_sub(surplus_bytes), bytes), surplus_bytes)
    }

    fn measured(&self) -> MutexGuard<'_, Measured> {
        self.measured.lock().ignore_poison()
    }

    /// The blocks of a chunk to register: those with data. In later rounds dirty blocks count as data,
    /// because they are sent whatever their content; and if not all of RAM may be registered, only dirty
    /// blocks count.
    fn blocks(
        &self,
        chunk: ChunkRange,
        dirty: &DirtyBitmap,
        search: &mut TouchedSearch,
    ) -> Result<Vec<Range<u64>>, TransportError> {
        let run = PageRun { region: chunk.region.into(), first_page: chunk.first_page, pages: chunk.pages };
        let region = &self.ram.regions()[run.region];
        let mut blocks = Vec::new();
        if self.rounds.load(Ordering::Relaxed) > 1 {
            blocks.extend(dirty_blocks(run, dirty));
            // By now lanes have had zero pages mapped in all anonymous memory.
            if self.chunks.is_limited() || region.is_anonymous() {
                return Ok(blocks);
            }
        }
        // One look serves a hole of many chunks: if the guest writes into it meanwhile, a lane requests it.
        let touched = match self.mapped.mapped(region, run) {
            Some(mapped) => mapped,
            None if search.expects_hole(run) => Vec::new(),
            None => search.touched(region, run)?,
        };
        for PageRun { first_page, pages, .. } in touched {
            blocks.push(first_page / BLOCK_PAGES..(first_page + pages).div_ceil(BLOCK_PAGES));
        }
        blocks.sort_unstable_by_key(|blocks| blocks.start);
        Ok(blocks)
    }

    /// Registers memory for sending: with `lanes`, until they have finished, otherwise as much as the budget
    /// allows.
    fn register(
        &self,
        dirty: &DirtyBitmap,
        control: &mut ControlChannel,
        lanes: bool,
    ) -> Result<Registered, TransportError> {
        let mut planned = self.chunks.plan(dirty);
        let mut search = TouchedSearch::default();
        let find = &mut |chunk| self.blocks(chunk, dirty, &mut search);
        let mut asked = VecDeque::with_capacity(BATCHES_AHEAD);
        let (mut done, mut last_done) = (Registered::default(), Instant::now());
        // The first part alone, so that the first page leaves soon.
        let mut size = BatchSize { parts: 1, ..BATCH };
        loop {
            while asked.len() < BATCHES_AHEAD {
                let batch = self.chunks.next(&mut planned, find, size, lanes && asked.is_empty())?;
                self.evict(batch.evicted, control)?;
                if batch.ranges.is_empty() {
                    break;
                }
                size = BATCH;
                send_request(Request::Register(batch.ranges.clone()).encode()?, control)?;
                asked.push_back((batch.ranges, Instant::now()));
            }
            // Even when the round is over: the answers to the requests are in flight.
            let Some((ranges, began)) = asked.pop_front() else { return Ok(done) };
            let register = |&range| register(&self.domain, &self.ram, range, Access::LocalRead);
            let local = ranges.par_iter().map(register).collect::<Result<Vec<_>, TransportError>>()?;
            let keys = await_keys(&ranges, control)?;
            let now = Instant::now();
            done.time += now - began.max(std::mem::replace(&mut last_done, now));
            done.bytes += ranges.iter().map(|range| range.pages * PAGE_BYTES).sum::<u64>();
            for ((range, local), ChunkKey { address, key }) in ranges.into_iter().zip(local).zip(keys) {
                self.chunks.set(range, Chunk { local, remote_address: address, remote_key: key });
            }
        }
    }

    /// Unpins chunks at both ends.
    fn evict(
        &self,
        evicted: Vec<(ChunkRange, Arc<Chunk>)>,
        control: &mut ControlChannel,
    ) -> Result<(), TransportError> {
        let mut ranges = Vec::with_capacity(evicted.len());
        for (range, chunk) in evicted {
            // No lane holds it, and its queue pair released it before the lane did.
            let chunk = Arc::into_inner(chunk).ok_or(sterna_rdma::Error::RegionInUse)?;
            MemoryRegion::deregister(chunk.local)?;
            ranges.push(range);
        }
        for ranges in ranges.chunks(CHUNKS_MAX) {
            send_request(Request::Release(ranges.to_vec()).encode()?, control)?;
        }
        Ok(())
    }
}

impl Registration for Registrar {
    fn run(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        let mut done = self.chunks.or_fail(|| self.register(dirty, control, true))?;
        let mut measured = self.measured();
        // Holes that are registered with the data around them are not part of the missing bytes.
        done.bytes = measured.missing_bytes.take().map_or(done.bytes, |missing| missing.min(done.bytes));
        measured.round = done;
        if done.bytes > 0 {
            measured.latest = done;
        }
        Ok(())
    }

    fn prepare(&self, dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        self.chunks.or_fail(|| self.register(dirty, control, false)).map(drop)
    }

    fn end(&self) {
        self.chunks.end();
    }
}

/// The time scaled from `bytes` to `part_bytes`.
pub(super) fn share_of(time: Duration, part_bytes: u64, bytes: u64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let share = if bytes == 0 { 0.0 } else { part_bytes as f64 / bytes as f64 };
    Duration::try_from_secs_f64(time.as_secs_f64() * share).unwrap_or(Duration::MAX)
}

/// The runs of blocks with dirty pages.
fn dirty_blocks(run: PageRun, dirty: &DirtyBitmap) -> impl Iterator<Item = Range<u64>> {
    let words = dirty.regions().get(run.region).map_or(&[][..], |region| region.words());
    let first = run.first_page / BLOCK_PAGES;
    let blocks = first..(run.first_page + run.pages).div_ceil(BLOCK_PAGES);
    let is_dirty = |&block: &u64| {
        usize::try_from(block).is_ok_and(|block| words.get(block).is_some_and(|&word| word != 0))
    };
    blocks.filter(is_dirty).map(|block| block..block + 1)
}

/// The destination's answer to a registration request.
pub(super) fn await_keys(
    ranges: &[ChunkRange],
    control: &mut ControlChannel,
) -> Result<Vec<ChunkKey>, TransportError> {
    let pages: u64 = ranges.iter().map(|range| range.pages).sum();
    // Fresh memory is zeroed as it is pinned; 16 MiB/s is slow for that.
    let limit = STEP_MAX + Duration::from_secs((pages * PAGE_BYTES) >> 24);
    let Keys(keys) = Keys::decode(&await_answer("keys", limit, control)?)?;
    if keys.len() == ranges.len() {
        Ok(keys)
    } else {
        Err(TransportError::Disagreement("another number of keys than was asked for".into()))
    }
}
