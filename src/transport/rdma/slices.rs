use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use sterna_rdma::{MemoryRegion, RemoteKey};

use super::STALL_MAX;
use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Pages in a slice, the unit of registration, where there is no budget: 64 MiB. The first page leaves once the first
/// slice is ready, and many small ones are slow to make.
pub(super) const SLICE_PAGES: u64 = 16_384;

/// The smallest slice that a budget leads to: 4 MiB, what a lane rearms at once of a full stripe.
pub(super) const SLICE_BYTES_MIN: u64 = 4 << 20;

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
    layout: RamLayout,
    slice_pages: u64,
    /// How many bytes may be registered at once; `None`: all of RAM.
    budget_bytes: Option<u64>,
    state: Mutex<State<S>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<S> {
    /// Of each region, a slot for so many pages.
    slots: Vec<Vec<Slot<S>>>,
    slice_pages: u64,
    /// Slices that lanes wait for, one entry a lane, in the order in which they began to wait.
    wanted: Vec<SliceRange>,
    /// Bytes of the slices that are registered or about to be.
    registered_bytes: u64,
    /// Counts the uses of slices.
    uses: u64,
    /// The lanes of the round are done.
    over: bool,
    /// The registrar has failed.
    failed: bool,
}

/// What is known of one slice.
#[derive(Debug)]
enum Slot<S> {
    Absent,
    /// Being registered.
    Coming,
    Here {
        slice: Arc<S>,
        last_use: u64,
        /// The lanes have not come to it in this round, and will.
        ahead: bool,
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
        let slice_pages = slice_pages(lanes, budget_bytes);
        let slots = |pages: u64| (0..pages.div_ceil(slice_pages)).map(|_| Slot::Absent).collect();
        let state = State {
            slots: layout.regions.iter().map(|region| slots(region.pages())).collect(),
            slice_pages,
            wanted: Vec::new(),
            registered_bytes: 0,
            uses: 0,
            over: false,
            failed: false,
        };
        Self { layout, slice_pages, budget_bytes, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The slice in which a page lies.
    pub(super) fn range_of(&self, region: usize, page: u64) -> Option<SliceRange> {
        let pages = self.layout.regions.get(region)?.pages();
        let first_page = page - page % self.slice_pages;
        let pages = pages.checked_sub(first_page).filter(|&left| left > 0)?.min(self.slice_pages);
        Some(SliceRange { region: u16::try_from(region).ok()?, first_page, pages })
    }

    pub(super) fn registered_bytes(&self) -> u64 {
        self.state().registered_bytes
    }

    /// Begins a round.
    pub(super) fn begin(&self) {
        self.state().over = false;
    }

    /// The slices with dirty pages that are not registered, in the order in which the lanes will come to them. Those that are
    /// stay for this round.
    pub(super) fn plan(&self, dirty: &DirtyBitmap) -> VecDeque<SliceRange> {
        let words_per_slice = usize::try_from(self.slice_pages / 64).unwrap_or(usize::MAX);
        let mut needed = VecDeque::new();
        for (region, bits) in dirty.regions().iter().enumerate() {
            for (first_page, words) in
                (0..).step_by(words_per_slice * 64).zip(bits.words().chunks(words_per_slice))
            {
                if words.iter().any(|&word| word != 0) {
                    needed.extend(self.range_of(region, first_page));
                }
            }
        }
        let mut state = self.state();
        for slot in state.slots.iter_mut().flatten() {
            if let Slot::Here { ahead, .. } = slot {
                *ahead = false;
            }
        }
        needed.retain(|&range| match state.slot(range) {
            Some(Slot::Here { ahead, .. }) => {
                *ahead = true;
                false
            }
            _ => true,
        });
        needed
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
        *state.slot(range)? = Slot::Coming;
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
        let mut candidates = Vec::new();
        for (region, slots) in state.slots.iter().enumerate() {
            for (first_page, slot) in (0..).step_by(pages_step(self.slice_pages)).zip(slots) {
                if let Slot::Here { slice, last_use, ahead } = slot
                    && Arc::strong_count(slice) == 1
                    && (wanted || !ahead)
                    && let Some(candidate) = self.range_of(region, first_page)
                    && !state.wanted.contains(&candidate)
                {
                    candidates.push((*ahead, *last_use, candidate));
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
            if let Some(slot) = state.slot(candidate)
                && let Slot::Here { slice, .. } = mem::replace(slot, Slot::Absent)
            {
                evicted.push((candidate, slice));
            }
        }
        state.registered_bytes = left_bytes;
        true
    }

    /// Notes a slice as registered at both ends.
    pub(super) fn set(&self, range: SliceRange, slice: S) {
        let mut state = self.state();
        state.uses += 1;
        let last_use = state.uses;
        if let Some(slot) = state.slot(range) {
            *slot = Slot::Here { slice: Arc::new(slice), last_use, ahead: true };
        }
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
                self.changed.wait_timeout(state, STALL_MAX * 4).unwrap_or_else(PoisonError::into_inner);
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
}

/// Lanes that wait for memory must not wait for a registrar that is gone.
struct FailOnDrop<'slices, S>(&'slices Slices<S>);

impl<S> Drop for FailOnDrop<'_, S> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

impl<S> State<S> {
    fn slot(&mut self, range: SliceRange) -> Option<&mut Slot<S>> {
        let index = self.index(range)?;
        self.slots.get_mut(usize::from(range.region))?.get_mut(index)
    }

    fn is_absent(&self, range: SliceRange) -> bool {
        let slot = self.index(range).and_then(|index| self.slots.get(usize::from(range.region))?.get(index));
        matches!(slot, Some(Slot::Absent))
    }

    fn index(&self, range: SliceRange) -> Option<usize> {
        usize::try_from(range.first_page / self.slice_pages).ok()
    }

    fn acquire(&mut self, range: SliceRange) -> Option<Arc<S>> {
        self.uses += 1;
        let uses = self.uses;
        match self.slot(range)? {
            Slot::Here { slice, last_use, ahead } => {
                (*last_use, *ahead) = (uses, false);
                Some(slice.clone())
            }
            Slot::Absent | Slot::Coming => None,
        }
    }
}

/// Pages in a slice: with a budget so few that every lane can hold one while two more are made ready.
fn slice_pages(lanes: usize, budget_bytes: Option<u64>) -> u64 {
    let Some(budget_bytes) = budget_bytes else { return SLICE_PAGES };
    let share_pages = budget_bytes / (lanes as u64 + 2) / PAGE_BYTES;
    let power = share_pages.checked_ilog2().map_or(1, |log| 1 << log);
    power.clamp(SLICE_BYTES_MIN / PAGE_BYTES, SLICE_PAGES)
}

fn bytes_of(range: SliceRange) -> u64 {
    range.pages * PAGE_BYTES
}

fn pages_step(slice_pages: u64) -> usize {
    usize::try_from(slice_pages).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::RegionLayout;

    const MIB: u64 = 1 << 20;

    fn layout(regions_mib: &[u64]) -> RamLayout {
        let region = |(index, mib): (usize, &u64)| RegionLayout {
            guest_address: (index as u64) << 40,
            len_bytes: mib * MIB,
        };
        RamLayout { regions: regions_mib.iter().enumerate().map(region).collect() }
    }

    fn slice(region: u16, first_page: u64, pages: u64) -> SliceRange {
        SliceRange { region, first_page, pages }
    }

    #[test]
    fn slices_with_dirty_pages_are_planned_in_order_and_only_once() {
        let layout = RamLayout {
            regions: vec![
                RegionLayout { guest_address: 0, len_bytes: (SLICE_PAGES + 1) * PAGE_BYTES },
                RegionLayout { guest_address: 1 << 40, len_bytes: 5 * PAGE_BYTES },
            ],
        };
        let mut dirty = DirtyBitmap::new(&layout);
        let slices: Slices<()> = Slices::new(layout, 1, None);
        assert!(slices.plan(&dirty).is_empty());
        dirty.regions_mut()[0].mark(SLICE_PAGES..SLICE_PAGES + 1);
        let last = slice(0, SLICE_PAGES, 1);
        assert_eq!(slices.plan(&dirty), [last]);
        dirty.fill();
        assert_eq!(slices.plan(&dirty), [slice(0, 0, SLICE_PAGES), last, slice(1, 0, 5)]);
        slices.set(last, ());
        assert_eq!(slices.plan(&dirty), [slice(0, 0, SLICE_PAGES), slice(1, 0, 5)]);
    }

    #[test]
    fn pages_outside_of_ram_are_in_no_slice() {
        let slices: Slices<()> = Slices::new(layout(&[1]), 1, None);
        assert_eq!(slices.range_of(0, 255), Some(slice(0, 0, 256)));
        for (region, page) in [(0, SLICE_PAGES), (1, 0), (0, u64::MAX)] {
            assert_eq!(slices.range_of(region, page), None, "{region} {page}");
        }
    }

    #[test]
    fn a_small_budget_makes_small_slices_so_that_each_lane_can_hold_one() {
        assert_eq!(slice_pages(4, None), SLICE_PAGES);
        assert_eq!(slice_pages(4, Some(1 << 40)), SLICE_PAGES);
        assert_eq!(slice_pages(4, Some(100 * MIB)), 16 * MIB / PAGE_BYTES);
        assert_eq!(slice_pages(4, Some(5 * MIB)), SLICE_BYTES_MIN / PAGE_BYTES);
    }

    #[test]
    fn what_a_lane_waits_for_comes_before_the_plan_and_failure_wakes_it() {
        let slices: Slices<()> = Slices::new(layout(&[64, 1]), 1, None);
        thread::scope(|scope| {
            let lane = scope.spawn(|| slices.await_slice(slice(1, 0, 256)).map(|_| ()));
            while slices.state().wanted.is_empty() {
                thread::yield_now();
            }
            let mut planned = [slice(0, 0, SLICE_PAGES)].into();
            assert_eq!(slices.next(&mut planned, 1, true).ranges, [slice(1, 0, 256)]);
            assert_eq!(slices.next(&mut planned, 1, true).ranges, [slice(0, 0, SLICE_PAGES)]);
            slices.fail();
            let failed = lane.join().unwrap();
            assert!(
                matches!(failed, Err(TransportError::NotRegistered { .. })),
                "it is no fault of the peer's"
            );
            slices.end();
            assert!(slices.next(&mut planned, 1, true).ranges.is_empty());
        });
    }

    #[test]
    fn a_registrar_that_panics_leaves_no_lane_waiting() {
        let slices: Slices<()> = Slices::new(layout(&[64]), 1, None);
        thread::scope(|scope| {
            let lane = scope.spawn(|| slices.await_slice(slice(0, 0, SLICE_PAGES)).map(|_| ()));
            while slices.state().wanted.is_empty() {
                thread::yield_now();
            }
            let registrar =
                scope.spawn(|| slices.supply(|| -> Result<(), ()> { panic!("as a test wants it") }));
            assert!(registrar.join().is_err());
            let failed = slices.state().failed;
            slices.fail();
            assert!(failed, "the lane would wait until its patience ends");
            assert!(lane.join().unwrap().is_err());
        });
        assert_eq!(slices.supply(|| Ok::<_, ()>(7)), Ok(7));
    }

    #[test]
    fn room_is_made_of_what_no_lane_holds_least_recently_used_first() {
        let slices: Slices<u64> = Slices::new(layout(&[16]), 1, Some(12 * MIB));
        let four = |index: u64| slice(0, index * 1024, 1024);
        let register = |index: u64| {
            let mut planned = [four(index)].into();
            let batch = slices.next(&mut planned, 1, false);
            batch.ranges.iter().for_each(|&range| slices.set(range, index));
            (batch.ranges.len(), batch.evicted.into_iter().map(|(_, index)| *index).collect::<Vec<_>>())
        };
        for index in 0..3 {
            assert_eq!(register(index), (1, vec![]));
        }
        assert_eq!(register(3), (0, vec![]), "the lanes have yet to come to all that is here");
        let held = slices.acquire(four(1)).unwrap();
        drop(slices.acquire(four(2)));
        drop(slices.acquire(four(0)));
        assert_eq!(register(3), (1, vec![2]), "1 is held, and 0 was used later");
        drop(held);
        assert_eq!(register(2), (1, vec![1]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Lanes that go through RAM in any order, each holding one slice at a time, all come to their end, and never is more
        /// registered than the budget holds.
        #[test]
        fn under_any_budget_all_lanes_get_all_that_they_ask_for(
            budget_mib in 4u64..40,
            ways in prop::collection::vec(prop::collection::vec(0u64..16 * 1024, 1..40), 1..5),
            ahead in prop::bool::ANY,
        ) {
            let layout = layout(&[64]);
            let mut dirty = DirtyBitmap::new(&layout);
            if ahead {
                dirty.fill();
            }
            let slices: Slices<()> = Slices::new(layout, ways.len(), Some(budget_mib * MIB));
            let mut planned = slices.plan(&dirty);
            thread::scope(|scope| {
                let slices = &slices;
                let lanes: Vec<_> = ways.iter().map(|way| scope.spawn(move || {
                    for &page in way {
                        let range = slices.range_of(0, page).unwrap();
                        let slice = slices.acquire(range).map_or_else(|| slices.await_slice(range), Ok).unwrap();
                        drop(slice);
                        slices.released();
                    }
                })).collect();
                let registrar = scope.spawn(move || {
                    let mut most = 0;
                    loop {
                        let batch = slices.next(&mut planned, 2, true);
                        most = most.max(slices.state().registered_bytes);
                        if batch.ranges.is_empty() {
                            return most;
                        }
                        batch.ranges.into_iter().for_each(|range| slices.set(range, ()));
                    }
                });
                lanes.into_iter().for_each(|lane| lane.join().unwrap());
                slices.end();
                assert!(registrar.join().unwrap() <= budget_mib * MIB);
            });
        }
    }
}
