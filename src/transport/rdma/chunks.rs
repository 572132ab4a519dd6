use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;
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

pub(super) use self::chunking::CHUNK_BYTES_MIN;
use self::chunking::Chunking;
pub(super) use self::coverage::BLOCK_PAGES;
use self::coverage::{Coverage, DirtyBlocks};
use self::eviction::Queue;
pub(super) use self::parts::{is_of_blocks, parts_max};
pub(super) use self::planned::Planned;

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
    /// How many bytes may be registered at once; `None`: all of RAM.
    budget_bytes: Option<u64>,
    /// How many parts may be registered at once.
    parts_max: usize,
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

#[derive(Debug)]
struct State<S> {
    /// Parts that are registered or about to be.
    slots: BTreeMap<ChunkRange, Slot<S>>,
    /// The pages that lanes wait for, by region, one entry a lane, in the order in which the waits began.
    wanted: Vec<(usize, u64)>,
    /// Bytes of the parts that are registered or about to be.
    registered_bytes: u64,
    /// Counts the uses of parts.
    uses: u64,
    /// Counts the plans: one a round.
    plans: u64,
    /// The blocks to send by the latest plan, if not all of RAM may be registered.
    dirty: DirtyBlocks,
    /// Parts in the order of their eviction.
    queue: Queue,
    /// For each lane, the region and page that it has reached in this round, and from which it continues.
    reached: Vec<(usize, u64)>,
    /// The lanes of the round have finished.
    over: bool,
    /// The registrar has failed.
    failed: bool,
}

/// The state of a part that is not absent.
#[derive(Debug)]
enum Slot<S> {
    /// Being registered.
    Coming,
    Here {
        chunk: Arc<S>,
        last_use: u64,
        /// The latest plan when it was registered.
        registered_in: u64,
        /// The latest plan when a lane used it.
        used_in: Option<u64>,
    },
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

/// Finds the blocks of a chunk to register, in ascending order.
pub(super) type FindBlocks<'find> = dyn FnMut(ChunkRange) -> Result<Vec<Range<u64>>, TransportError> + 'find;

impl<S> Chunks<S> {
    /// For this many lanes, with at most this many bytes registered at once.
    pub(super) fn new(layout: RamLayout, lanes: usize, budget_bytes: Option<u64>) -> Self {
        let state = State {
            slots: BTreeMap::new(),
            wanted: Vec::new(),
            registered_bytes: 0,
            uses: 0,
            plans: 0,
            dirty: DirtyBlocks::default(),
            queue: Queue::default(),
            reached: vec![(0, 0); lanes],
            over: false,
            failed: false,
        };
        let (patience, changed) = (STALL_MAX * 4, Condvar::new());
        let (covered, parts_max) = (Mutex::new(Coverage::new(&layout)), parts_max(&layout));
        let chunking = Chunking::new(layout, lanes, budget_bytes);
        let mut whole = Vec::new();
        if budget_bytes.is_none() {
            let unset = |count| (0..count).map(|_| OnceLock::new()).collect();
            whole.extend(chunking.counts().map(unset));
        }
        Self {
            chunking,
            budget_bytes,
            parts_max,
            patience,
            whole,
            state: Mutex::new(state),
            covered,
            changed,
        }
    }

    /// Whether less than all of RAM may be registered at once.
    pub(super) fn is_limited(&self) -> bool {
        self.budget_bytes.is_some()
    }

    /// Whether a page lies in RAM.
    pub(super) fn has(&self, region: usize, page: u64) -> bool {
        self.chunking.range_of(region, page).is_some()
    }

    /// How much of these pages is not registered, and how much exceeds the budget: in bytes of blocks.
    pub(super) fn missing_bytes(&self, dirty: &DirtyBitmap) -> (u64, u64) {
        let (needed, missing) = self.covered().count(dirty);
        let [needed, missing] = [needed, missing].map(|blocks| blocks * BLOCK_PAGES * PAGE_BYTES);
        (missing, self.budget_bytes.map_or(0, |budget_bytes| needed.saturating_sub(budget_bytes)))
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
        if !self.make_room(state, part, wanted.is_some(), evicted) {
            planned.put_back(part);
            return Ok(None);
        }
        state.slots.insert(part, Slot::Coming);
        self.covered().set(part, true);
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

impl<S> State<S> {
    fn reach(&mut self, lane: usize, place: (usize, u64)) {
        if let Some(reached) = self.reached.get_mut(lane) {
            *reached = place;
        }
    }

    /// The part that contains a page and is not absent.
    fn part_of(&self, (region, page): (usize, u64)) -> Option<ChunkRange> {
        let region = u16::try_from(region).ok()?;
        let last = ChunkRange { region, first_page: page, pages: u64::MAX };
        let (&part, _) = self.slots.range(..=last).next_back()?;
        contains(part, (region.into(), page)).then_some(part)
    }

    /// The parts of a chunk that are not absent, in order.
    fn parts_of(&self, chunk: ChunkRange) -> impl Iterator<Item = ChunkRange> {
        let end = ChunkRange { first_page: chunk.first_page + chunk.pages, pages: 0, ..chunk };
        self.slots.range(ChunkRange { pages: 0, ..chunk }..end).map(|(&part, _)| part)
    }

    fn acquire(&mut self, page: (usize, u64)) -> Option<(ChunkRange, Arc<S>)> {
        self.uses += 1;
        let (uses, plans) = (self.uses, self.plans);
        let part = self.part_of(page)?;
        match self.slots.get_mut(&part)? {
            Slot::Here { chunk, last_use, used_in, .. } => {
                (*last_use, *used_in) = (uses, Some(plans));
                Some((part, chunk.clone()))
            }
            Slot::Coming => None,
        }
    }
}

/// Whether a page, by its region, lies in a part.
pub(super) fn contains(part: ChunkRange, (region, page): (usize, u64)) -> bool {
    usize::from(part.region) == region && (part.first_page..part.first_page + part.pages).contains(&page)
}

fn bytes_of(range: ChunkRange) -> u64 {
    range.pages * PAGE_BYTES
}

#[cfg(test)]
mod tests;
