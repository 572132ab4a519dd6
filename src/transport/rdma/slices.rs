use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sterna_rdma::{MemoryRegion, RemoteKey};

use super::STALL_MAX;
use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::transport::TransportError;
use crate::wire::SliceRange;

mod coverage;
mod slicing;

use self::coverage::{Coverage, Needs, Numbers};
pub(super) use self::slicing::SLICE_BYTES_MIN;
use self::slicing::Slicing;

/// A slice that both ends have registered.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) local: Arc<MemoryRegion>,
    /// Address of its first byte at the destination.
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
}

/// The slices of all of guest RAM at the source: which are registered, which lanes wait for, which may go.
///
/// Lanes [`acquire`](Self::acquire) slices here and wait for one that is missing, once nothing of theirs is on its way.
/// The registrar puts slices here, those that lanes wait for first, and never more than the budget holds. What goes when
/// there is no room is what no lane holds, and of that the least recently used.
#[derive(Debug)]
pub(super) struct Slices<S = Slice> {
    slicing: Slicing,
    /// How many bytes may be registered at once; `None`: all of RAM.
    budget_bytes: Option<u64>,
    /// How long a lane waits for a slice.
    patience: Duration,
    state: Mutex<State<S>>,
    /// Which blocks are registered or about to be. Apart from the state, which lanes must not wait for while a plan is made.
    /// Locked after it.
    covered: Mutex<Coverage>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<S> {
    /// Those that are registered or about to be.
    slots: BTreeMap<SliceRange, Slot<S>>,
    /// Slices that lanes wait for, one entry a lane, in the order in which they began to wait.
    wanted: Vec<SliceRange>,
    /// Bytes of the slices that are registered or about to be.
    registered_bytes: u64,
    /// Counts the uses of slices.
    uses: u64,
    /// Counts the plans: one a round.
    plans: u64,
    /// Slices with pages to be sent by the latest plan.
    dirty: Numbers,
    /// For each lane, the region and page that it has come to in this round: it goes on from there.
    reached: Vec<(usize, u64)>,
    /// The lanes of the round are done.
    over: bool,
    /// The registrar has failed.
    failed: bool,
}

/// What is known of one slice that is not absent.
#[derive(Debug)]
enum Slot<S> {
    /// Being registered.
    Coming,
    Here {
        slice: Arc<S>,
        last_use: u64,
        /// The latest plan when it was registered.
        registered_in: u64,
        /// The latest plan when a lane used it.
        used_in: Option<u64>,
    },
}

/// What to register next, and what to deregister first to make room.
#[derive(Debug)]
pub(super) struct Batch<S = Slice> {
    pub(super) ranges: Vec<SliceRange>,
    pub(super) evicted: Vec<(SliceRange, Arc<S>)>,
}

impl<S> Slices<S> {
    /// For so many lanes, with at most so many bytes registered at once.
    pub(super) fn new(layout: RamLayout, lanes: usize, budget_bytes: Option<u64>) -> Self {
        let state = State {
            slots: BTreeMap::new(),
            wanted: Vec::new(),
            registered_bytes: 0,
            uses: 0,
            plans: 0,
            dirty: Numbers::default(),
            reached: vec![(0, 0); lanes],
            over: false,
            failed: false,
        };
        let slicing = Slicing::new(layout.clone(), lanes, budget_bytes);
        let (patience, changed) = (STALL_MAX * 4, Condvar::new());
        let covered = Mutex::new(Coverage::new(&layout));
        Self { slicing, budget_bytes, patience, state: Mutex::new(state), covered, changed }
    }

    /// The slice in which a page lies.
    pub(super) fn range_of(&self, region: usize, page: u64) -> Option<SliceRange> {
        self.slicing.range_of(region, page)
    }

    pub(super) fn registered_bytes(&self) -> u64 {
        self.state().registered_bytes
    }

    /// Begins a round.
    pub(super) fn begin(&self) {
        let mut state = self.state();
        state.over = false;
        state.reached.fill((0, 0));
    }

    /// A lane has come to this slice, and left out what it passed over since the last: pages of zeros, in the first round.
    pub(super) fn reached(&self, lane: usize, range: SliceRange) {
        self.state().reach(lane, (range.region.into(), range.first_page));
    }

    /// A lane has come to the end of its round.
    pub(super) fn reached_end(&self, lane: usize) {
        self.state().reach(lane, (usize::MAX, u64::MAX));
        self.changed.notify_all();
    }

    /// The slices with dirty pages that are not registered, in the order in which the lanes will come to them. Those that are
    /// stay for this round.
    pub(super) fn plan(&self, dirty: &DirtyBitmap) -> VecDeque<SliceRange> {
        let Needs { dirty, missing } = self.covered().needs(dirty, &self.slicing);
        let mut state = self.state();
        state.plans += 1;
        state.dirty = dirty;
        missing
    }

    /// What to register next, at most so many slices: those that lanes wait for, then those that are `planned`. With `wait`,
    /// waits while there is none; nothing at all then means that the round is over.
    pub(super) fn next(&self, planned: &mut VecDeque<SliceRange>, slices_max: usize, wait: bool) -> Batch<S> {
        let mut state = self.state();
        loop {
            let mut batch = Batch { ranges: Vec::new(), evicted: Vec::new() };
            while !state.over && batch.ranges.len() < slices_max {
                let Some(range) = self.admit_one(&mut state, planned, &mut batch.evicted) else { break };
                batch.ranges.push(range);
            }
            if state.over || !wait || !batch.ranges.is_empty() {
                return batch;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Finds a slice to register and room for it.
    fn admit_one(
        &self,
        state: &mut State<S>,
        planned: &mut VecDeque<SliceRange>,
        evicted: &mut Vec<(SliceRange, Arc<S>)>,
    ) -> Option<SliceRange> {
        let wanted = state.wanted.iter().copied().find(|&range| state.is_absent(range));
        let range = match wanted {
            Some(range) => range,
            None => loop {
                let range = *planned.front()?;
                if state.is_absent(range) {
                    break range;
                }
                planned.pop_front();
            },
        };
        if !self.make_room(state, range, wanted.is_some(), evicted) {
            return None;
        }
        if wanted.is_none() {
            planned.pop_front();
        }
        state.slots.insert(range, Slot::Coming);
        self.covered().set(range, true);
        state.registered_bytes += bytes_of(range);
        Some(range)
    }

    /// Takes slices out that no lane holds or waits for until `range` fits the budget. Slices that the lanes have yet to come to
    /// go only for one that a lane waits for.
    fn make_room(
        &self,
        state: &mut State<S>,
        range: SliceRange,
        wanted: bool,
        evicted: &mut Vec<(SliceRange, Arc<S>)>,
    ) -> bool {
        let Some(budget_bytes) = self.budget_bytes else { return true };
        let fits = |registered_bytes: u64| registered_bytes + bytes_of(range) <= budget_bytes;
        if fits(state.registered_bytes) {
            return true;
        }
        let passed = state.reached.iter().min().copied().unwrap_or_default();
        let mut candidates = Vec::new();
        for (&candidate, slot) in &state.slots {
            if let Slot::Here { slice, last_use, .. } = slot
                && Arc::strong_count(slice) == 1
                && !state.wanted.contains(&candidate)
            {
                // What all lanes have passed over, they will not come to in this round.
                let end = (usize::from(candidate.region), candidate.first_page + candidate.pages);
                let ahead = end > passed && self.is_ahead(state, candidate, slot);
                if wanted || !ahead {
                    candidates.push((ahead, *last_use, candidate));
                }
            }
        }
        candidates.sort_unstable_by_key(|&(ahead, last_use, _)| (ahead, last_use));
        let mut left_bytes = state.registered_bytes;
        let mut enough = 0;
        while !fits(left_bytes) {
            let Some((_, _, candidate)) = candidates.get(enough) else { return false };
            left_bytes -= bytes_of(*candidate);
            enough += 1;
        }
        for &(_, _, candidate) in &candidates[..enough] {
            if let Some(Slot::Here { slice, .. }) = state.slots.remove(&candidate) {
                self.covered().set(candidate, false);
                evicted.push((candidate, slice));
            }
        }
        state.registered_bytes = left_bytes;
        true
    }

    /// Whether lanes have yet to come to a slice that was planned or registered for this round.
    fn is_ahead(&self, state: &State<S>, range: SliceRange, slot: &Slot<S>) -> bool {
        let Slot::Here { registered_in, used_in, .. } = slot else { return false };
        let number = self.slicing.number_of(range.region.into(), range.first_page);
        *used_in != Some(state.plans) && (*registered_in == state.plans || state.dirty.contains(number))
    }

    /// Notes a slice as registered at both ends.
    pub(super) fn set(&self, range: SliceRange, slice: S) {
        let mut state = self.state();
        state.uses += 1;
        let last_use = state.uses;
        let registered_in = state.plans;
        let here = Slot::Here { slice: Arc::new(slice), last_use, registered_in, used_in: None };
        state.slots.insert(range, here);
        self.covered().set(range, true);
        drop(state);
        self.changed.notify_all();
    }

    /// A slice, if it is registered.
    pub(super) fn acquire(&self, range: SliceRange) -> Option<Arc<S>> {
        self.state().acquire(range)
    }

    /// Waits for a slice that is not registered. The lane must have nothing on its way: others may wait for what it holds.
    pub(super) fn await_slice(&self, range: SliceRange) -> Result<Arc<S>, TransportError> {
        let mut state = self.state();
        state.wanted.push(range);
        self.changed.notify_all();
        let result = loop {
            if let Some(slice) = state.acquire(range) {
                break Ok(slice);
            }
            // A round is over while a lane waits only if another lane has failed.
            if state.failed || state.over {
                break Err("its registration failed");
            }
            let (next, timeout) =
                self.changed.wait_timeout(state, self.patience).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if timeout.timed_out() {
                break Err("its registration takes too long");
            }
        };
        if let Some(index) = state.wanted.iter().position(|&wanted| wanted == range) {
            state.wanted.remove(index);
        }
        result.map_err(|why| TransportError::NotRegistered { why })
    }

    /// A lane has let go of slices: there may be room now.
    pub(super) fn released(&self) {
        if self.budget_bytes.is_some() {
            // Under the lock, so that the registrar is not between its look and its wait.
            drop(self.state());
            self.changed.notify_all();
        }
    }

    /// Ends a round: the registrar need not go on.
    pub(super) fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Registers in `work`. If that fails or panics, the lanes are told that nothing will be registered any more.
    pub(super) fn supply<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn covered(&self) -> MutexGuard<'_, Coverage> {
        self.covered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lanes that wait for memory must not wait for a registrar that is gone.
struct FailOnDrop<'slices, S>(&'slices Slices<S>);

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

    fn is_absent(&self, range: SliceRange) -> bool {
        !self.slots.contains_key(&range)
    }

    fn acquire(&mut self, range: SliceRange) -> Option<Arc<S>> {
        self.uses += 1;
        let (uses, plans) = (self.uses, self.plans);
        match self.slots.get_mut(&range)? {
            Slot::Here { slice, last_use, used_in, .. } => {
                (*last_use, *used_in) = (uses, Some(plans));
                Some(slice.clone())
            }
            Slot::Coming => None,
        }
    }
}

fn bytes_of(range: SliceRange) -> u64 {
    range.pages * PAGE_BYTES
}

#[cfg(test)]
mod tests;
