//! What of guest RAM is registered at the source: chunks, and the parts that they are cut into.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use sterna_rdma::{MemoryRegion, RemoteKey};

use super::bounds::STALL_MAX;
use super::wire::ChunkRange;
use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::poison::IgnorePoison;
use crate::transport::error::TransportError;

mod chunking;
mod coverage;
mod eviction;
mod parts;
mod planned;
mod queue;
mod state;

pub(super) use self::chunking::CHUNK_BYTES_MIN;
use self::chunking::Chunking;
pub(super) use self::coverage::BLOCK_PAGES;
use self::coverage::Coverage;
use self::eviction::Capacity;
use self::parts::bytes_of;
pub(super) use self::parts::{contains, is_of_blocks, parts_max};
use self::planned::FindBlocks;
pub(super) use self::planned::Planned;
use self::queue::Queue;
use self::state::{Slot, State};

/// A part of a chunk that both ends have registered.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) local: Arc<MemoryRegion>,
    /// Address of its first byte at the destination.
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
}

/// The chunks of all of guest RAM at the source: which are registered, which lanes wait for, and which may be
/// evicted.
///
/// RAM is planned in chunks. A chunk is registered as a whole or, if it has holes, in [parts](parts::cut).
///
/// Lanes [`acquire`](Self::acquire) parts, and wait for a missing one once none of their writes is in flight.
/// The registrar adds parts, those that lanes wait for first, and never exceeds the budget. To make room it
/// evicts the least recently used part that no lane holds.
#[derive(Debug)]
pub(super) struct Chunks<S = Chunk> {
    chunking: Chunking,
    capacity: Capacity,
    /// How long a lane waits for a part.
    patience: Duration,
    /// By region and number, chunks that are registered whole and stay so: where all of RAM may be
    /// registered at once, lanes find them here, without a lock.
    whole: Vec<Vec<OnceLock<Arc<S>>>>,
    state: Mutex<State<S>>,
    /// The blocks that are registered or about to be. Apart from the state, so that lanes need not wait while
    /// a plan is made. Locked after the state.
    covered: Mutex<Coverage>,
    changed: Condvar,
}

/// The parts to register next, and the parts to deregister first to make room.
#[derive(Debug)]
pub(super) struct Batch<S = Chunk> {
    pub(super) ranges: Vec<ChunkRange>,
    pub(super) evicted: Vec<(ChunkRange, Arc<S>)>,
}

/// The size of a batch: a batch is complete with the part that reaches this number of parts or pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchSize {
    pub(super) parts: usize,
    pub(super) pages: u64,
}

impl<S> Chunks<S> {
    /// For this many lanes, with at most this many bytes registered at once.
    pub(super) fn new(layout: RamLayout, lanes: usize, budget_bytes: Option<u64>) -> Self {
        let (patience, changed) = (STALL_MAX * 4, Condvar::new());
        let covered = Mutex::new(Coverage::new(&layout));
        let capacity = Capacity { bytes: budget_bytes, parts: parts_max(&layout) };
        let chunking = Chunking::new(layout, lanes, budget_bytes);
        let mut whole = Vec::new();
        if budget_bytes.is_none() {
            let unset = |count| (0..count).map(|_| OnceLock::new()).collect();
            whole.extend(chunking.counts().map(unset));
        }
        Self { chunking, capacity, patience, whole, state: Mutex::new(State::new(lanes)), covered, changed }
    }

    /// Whether less than all of RAM may be registered at once.
    pub(super) fn is_limited(&self) -> bool {
        self.capacity.bytes.is_some()
    }

    /// Whether a page lies in RAM.
    pub(super) fn has(&self, region: usize, page: u64) -> bool {
        self.chunking.range_of(region, page).is_some()
    }

    /// How much of these pages is not registered, and how much exceeds the budget: in bytes of blocks.
    pub(super) fn missing_bytes(&self, dirty: &DirtyBitmap) -> (u64, u64) {
        let (needed, missing) = self.covered().count(dirty);
        let [needed, missing] = [needed, missing].map(|blocks| blocks * BLOCK_PAGES * PAGE_BYTES);
        (missing, self.capacity.bytes.map_or(0, |budget_bytes| needed.saturating_sub(budget_bytes)))
    }

    #[cfg(test)]
    pub(super) fn registered_bytes(&self) -> u64 {
        self.state().registered_bytes
    }

    /// Begins a round.
    pub(super) fn begin(&self) {
        let mut state = self.state();
        state.over = false;
        state.reached.fill((0, 0));
    }

    /// A lane has reached this page, and skipped the pages since the last: zero pages, in the first round.
    pub(super) fn reached(&self, lane: usize, region: usize, page: u64) {
        // Where there is room for all, nothing makes way for what lanes come to.
        if self.is_limited() {
            self.state().reach(lane, (region, page));
        }
    }

    /// A lane has reached the end of its round.
    pub(super) fn reached_end(&self, lane: usize) {
        self.state().reach(lane, (usize::MAX, u64::MAX));
        self.changed.notify_all();
    }

    /// The chunks with dirty pages that are not registered, in the order in which the lanes will reach them.
    /// Registered parts with dirty pages stay for this round.
    pub(super) fn plan(&self, dirty: &DirtyBitmap) -> Planned {
        let missing = self.covered().missing(dirty, &self.chunking);
        let mut state = self.state();
        state.plans += 1;
        state.queue = Queue::default();
        if self.is_limited() {
            state.dirty.copy(dirty);
        }
        Planned::new(missing)
    }

    /// The next parts to register: those that lanes wait for, then those `planned`, as far as `find` finds
    /// them needed. With `wait`, waits while the batch is empty; an empty batch then means that the round is
    /// over.
    pub(super) fn next(
        &self,
        planned: &mut Planned,
        find: &mut FindBlocks<'_>,
        size: BatchSize,
        wait: bool,
    ) -> Result<Batch<S>, TransportError> {
        let mut state = self.state();
        loop {
            let mut batch = Batch { ranges: Vec::new(), evicted: Vec::new() };
            let mut pages = 0;
            while !state.over && batch.ranges.len() < size.parts && pages < size.pages {
                let Some(part) = self.admit_one(&mut state, planned, find, &mut batch.evicted)? else {
                    break;
                };
                pages += part.pages;
                batch.ranges.push(part);
            }
            if state.over || !wait || !batch.ranges.is_empty() {
                return Ok(batch);
            }
            state = self.changed.wait(state).ignore_poison();
        }
    }

    /// Finds a part to register and room for it.
    fn admit_one(
        &self,
        state: &mut State<S>,
        planned: &mut Planned,
        find: &mut FindBlocks<'_>,
        evicted: &mut Vec<(ChunkRange, Arc<S>)>,
    ) -> Result<Option<ChunkRange>, TransportError> {
        let wanted = state.wanted.iter().copied().find(|&page| state.part_of(page).is_none());
        let next = match wanted {
            Some(page) => planned.take(page, &self.chunking, state, find)?,
            None => planned.next(state, find)?,
        };
        let Some(part) = next else { return Ok(None) };
        let Some(victims) = self.capacity.make_room(state, part, wanted.is_some()) else {
            planned.put_back(part);
            return Ok(None);
        };
        let mut covered = self.covered();
        victims.iter().for_each(|&(victim, _)| covered.set(victim, false));
        covered.set(part, true);
        drop(covered);
        evicted.extend(victims);
        state.slots.insert(part, Slot::Coming);
        state.registered_bytes += bytes_of(part);
        Ok(Some(part))
    }

    /// Records a part as registered at both ends.
    pub(super) fn set(&self, part: ChunkRange, chunk: S) {
        let chunk = Arc::new(chunk);
        let mut state = self.state();
        if self.chunking.range_of(part.region.into(), part.first_page) == Some(part)
            && let Some(whole) = self.whole_at(part.region.into(), part.first_page)
        {
            // Held here, it never makes way for another.
            let _ = whole.set(chunk.clone());
        }
        state.uses += 1;
        let (last_use, registered_in) = (state.uses, state.plans);
        let here = Slot::Here { chunk, last_use, registered_in, used_in: None };
        state.slots.insert(part, here);
        self.covered().set(part, true);
        drop(state);
        self.changed.notify_all();
    }

    /// The chunk that contains a page, if it is registered whole and stays so: a lane need not hold it.
    pub(super) fn whole(&self, region: usize, page: u64) -> Option<(ChunkRange, &S)> {
        let chunk = self.whole_at(region, page)?.get()?;
        Some((self.chunking.range_of(region, page)?, chunk))
    }

    fn whole_at(&self, region: usize, page: u64) -> Option<&OnceLock<Arc<S>>> {
        self.whole.get(region)?.get(self.chunking.number_of(page))
    }

    /// The part that contains a page, if it is registered.
    pub(super) fn acquire(&self, region: usize, page: u64) -> Option<(ChunkRange, Arc<S>)> {
        self.state().acquire((region, page))
    }

    /// Waits for the part that contains an unregistered page. The lane must have no writes in flight, because
    /// others may wait for what it holds.
    pub(super) fn await_part(
        &self,
        region: usize,
        page: u64,
    ) -> Result<(ChunkRange, Arc<S>), TransportError> {
        let mut state = self.state();
        state.wanted.push((region, page));
        self.changed.notify_all();
        let result = loop {
            if let Some(part) = state.acquire((region, page)) {
                break Ok(part);
            }
            // A round can only be over while a lane waits if another lane has failed.
            if state.failed || state.over {
                break Err("its registration failed");
            }
            let (next, timeout) = self.changed.wait_timeout(state, self.patience).ignore_poison();
            state = next;
            if timeout.timed_out() {
                break Err("its registration takes too long");
            }
        };
        if let Some(index) = state.wanted.iter().position(|&wanted| wanted == (region, page)) {
            state.wanted.remove(index);
        }
        result.map_err(|why| TransportError::NotRegistered { why })
    }

    /// A lane has released parts, which may make room.
    pub(super) fn released(&self) {
        if self.is_limited() {
            // Under the lock, so that the registrar is not between its look and its wait.
            drop(self.state());
            self.changed.notify_all();
        }
    }

    /// Ends a round: the registrar need not continue.
    pub(super) fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Registers in `work`. If that fails or panics, waiting lanes fail, because no more memory will be
    /// registered.
    pub(super) fn or_fail<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let fail = FailOnDrop(self);
        let done = work()?;
        mem::forget(fail);
        Ok(done)
    }

    fn fail(&self) {
        self.state().failed = true;
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().ignore_poison()
    }

    fn covered(&self) -> MutexGuard<'_, Coverage> {
        self.covered.lock().ignore_poison()
    }
}

/// Lanes must not wait for a registrar that is gone.
struct FailOnDrop<'chunks, S>(&'chunks Chunks<S>);

impl<S> Drop for FailOnDrop<'_, S> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

#[cfg(test)]
mod tests;
