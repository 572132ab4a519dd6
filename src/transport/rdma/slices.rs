use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use sterna_rdma::{MemoryRegion, RemoteKey};

use super::STALL_MAX;
use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Pages in a slice, the unit of registration: 256 MiB. One memory region past 4 GiB is slow on some hardware, and many
/// small ones are slow to make.
pub const SLICE_PAGES: u64 = 65_536;

/// A slice that both ends have registered.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) local: Arc<MemoryRegion>,
    /// Address of its first byte at the destination.
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
}

/// The slices of all of guest RAM at the source, filled in as they are registered.
///
/// Lanes take slices from here and wait for one that is missing; the registrar puts them here, those that lanes wait for first.
#[derive(Debug)]
pub(super) struct Slices {
    layout: RamLayout,
    regions: Vec<Vec<OnceLock<Slice>>>,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// What lanes and registrar tell each other.
#[derive(Debug, Default)]
struct Waiting {
    /// Slices that a lane waits for.
    wanted: VecDeque<SliceRange>,
    /// The lanes of the round are done.
    over: bool,
    /// The registrar has failed.
    failed: bool,
}

impl Slices {
    pub(super) fn new(layout: RamLayout) -> Self {
        let slots = |pages: u64| (0..pages.div_ceil(SLICE_PAGES)).map(|_| OnceLock::new()).collect();
        Self {
            regions: layout.regions.iter().map(|region| slots(region.pages())).collect(),
            layout,
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The slices with dirty pages that are not registered yet, in the order in which the lanes will come to them.
    pub(super) fn missing(&self, dirty: &DirtyBitmap) -> VecDeque<SliceRange> {
        let words_per_slice = usize::try_from(SLICE_PAGES / 64).unwrap_or(usize::MAX);
        let mut missing = VecDeque::new();
        for (region, slots) in self.regions.iter().enumerate() {
            for (index, words) in dirty.words(region).chunks(words_per_slice).enumerate() {
                if slots[index].get().is_none() && words.iter().any(|&word| word != 0) {
                    missing.extend(range_of(&self.layout, region, index as u64 * SLICE_PAGES));
                }
            }
        }
        missing
    }

    /// Notes a slice as registered at both ends.
    pub(super) fn set(&self, range: SliceRange, slice: Slice) {
        if let Some(slot) = self.slot(range.region.into(), range.first_page) {
            // It is asked for only while unset, so nothing is ever replaced.
            let _ = slot.set(slice);
        }
        // Under the lock, so that no lane is between its look at the slot and its wait.
        drop(self.waiting());
        self.changed.notify_all();
    }

    /// The slice of a page, once it is registered, and the byte in it at which the page begins.
    pub(super) fn of_page(&self, region: usize, page: u64) -> Result<(&Slice, u64), TransportError> {
        let outside = || {
            TransportError::Disagreement(format!(
                "page {page} of region {region} is in no slice of guest RAM"
            ))
        };
        let slot = self.slot(region, page).ok_or_else(outside)?;
        let slice = match slot.get() {
            Some(slice) => slice,
            None => {
                let range = range_of(&self.layout, region, page - page % SLICE_PAGES).ok_or_else(outside)?;
                self.await_slice(slot, range)?
            }
        };
        Ok((slice, page % SLICE_PAGES * PAGE_BYTES))
    }

    /// Which slice to register next: one that a lane waits for, else one that is `planned`. Waits while there is none.
    /// `None` once the round is over.
    pub(super) fn next(&self, planned: &mut VecDeque<SliceRange>) -> Option<SliceRange> {
        let mut waiting = self.waiting();
        loop {
            if waiting.over {
                return None;
            }
            match waiting.wanted.pop_front().or_else(|| planned.pop_front()) {
                Some(range) if self.is_set(range) => {}
                Some(range) => return Some(range),
                None => waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// The same without waiting; `None` also if there is nothing to register now.
    pub(super) fn next_at_once(&self, planned: &mut VecDeque<SliceRange>) -> Option<SliceRange> {
        let mut waiting = self.waiting();
        if waiting.over {
            return None;
        }
        loop {
            let range = waiting.wanted.pop_front().or_else(|| planned.pop_front())?;
            if !self.is_set(range) {
                return Some(range);
            }
        }
    }

    /// Begins a round.
    pub(super) fn begin(&self) {
        self.waiting().over = false;
    }

    /// Ends a round: the registrar need not go on.
    pub(super) fn end(&self) {
        self.waiting().over = true;
        self.changed.notify_all();
    }

    /// Tells the lanes that nothing will be registered any more.
    pub(super) fn fail(&self) {
        self.waiting().failed = true;
        self.changed.notify_all();
    }

    fn await_slice<'slice>(
        &'slice self,
        slot: &'slice OnceLock<Slice>,
        range: SliceRange,
    ) -> Result<&'slice Slice, TransportError> {
        let mut waiting = self.waiting();
        waiting.wanted.push_back(range);
        self.changed.notify_all();
        loop {
            if let Some(slice) = slot.get() {
                return Ok(slice);
            }
            if waiting.failed {
                return Err(TransportError::Disagreement(
                    "memory that is to be sent was not registered".into(),
                ));
            }
            let (next, timeout) =
                self.changed.wait_timeout(waiting, STALL_MAX * 4).unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return Err(TransportError::Disagreement("the registration of memory takes too long".into()));
            }
            waiting = next;
        }
    }

    fn is_set(&self, range: SliceRange) -> bool {
        self.slot(range.region.into(), range.first_page).is_some_and(|slot| slot.get().is_some())
    }

    fn slot(&self, region: usize, page: u64) -> Option<&OnceLock<Slice>> {
        self.regions.get(region)?.get(usize::try_from(page / SLICE_PAGES).ok()?)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slice of a region that begins at a page, if there is one that does.
pub(super) fn range_of(layout: &RamLayout, region: usize, first_page: u64) -> Option<SliceRange> {
    let pages = layout.regions.get(region)?.pages();
    if !first_page.is_multiple_of(SLICE_PAGES) || first_page >= pages {
        return None;
    }
    let pages = SLICE_PAGES.min(pages - first_page);
    Some(SliceRange { region: u16::try_from(region).ok()?, first_page, pages })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::memory::RegionLayout;

    fn layout() -> RamLayout {
        let region =
            |guest_address, pages: u64| RegionLayout { guest_address, len_bytes: pages * PAGE_BYTES };
        RamLayout { regions: vec![region(0, SLICE_PAGES + 1), region(1 << 40, 5)] }
    }

    #[test]
    fn slices_with_dirty_pages_are_planned_in_order() {
        let (layout, mut dirty) = (layout(), DirtyBitmap::new(&layout()));
        let slices = Slices::new(layout);
        assert!(slices.missing(&dirty).is_empty());
        dirty.words_mut(0)[1024] = 1;
        let last = SliceRange { region: 0, first_page: SLICE_PAGES, pages: 1 };
        assert_eq!(slices.missing(&dirty), [last]);
        dirty.fill();
        let first = SliceRange { region: 0, first_page: 0, pages: SLICE_PAGES };
        assert_eq!(slices.missing(&dirty), [first, last, SliceRange { region: 1, first_page: 0, pages: 5 }]);
    }

    #[test]
    fn only_slices_that_are_there_can_be_named() {
        let layout = layout();
        assert!(range_of(&layout, 0, SLICE_PAGES).is_some());
        for (region, first_page) in
            [(0, 1), (0, 2 * SLICE_PAGES), (1, SLICE_PAGES), (2, 0), (0, u64::MAX - 65_535)]
        {
            assert_eq!(range_of(&layout, region, first_page), None, "{region} {first_page}");
        }
    }

    #[test]
    fn what_a_lane_waits_for_comes_before_the_plan_and_failure_wakes_it() {
        let slices = Slices::new(layout());
        let planned = [SliceRange { region: 0, first_page: 0, pages: SLICE_PAGES }];
        thread::scope(|scope| {
            let lane = scope.spawn(|| slices.of_page(1, 3).map(|_| ()));
            while slices.waiting().wanted.is_empty() {
                thread::yield_now();
            }
            let mut planned = planned.into();
            assert_eq!(slices.next(&mut planned).map(|range| range.region), Some(1));
            assert_eq!(slices.next(&mut planned).map(|range| range.region), Some(0));
            slices.fail();
            assert!(lane.join().unwrap().is_err());
            slices.end();
            assert_eq!(slices.next(&mut planned), None);
        });
    }
}
