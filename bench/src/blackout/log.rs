//! A dirty log like KVM's: slots of 64 GiB, with bitmaps that are copied one at a time.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use sterna::dirty::{CaughtUp, DirtyError, DirtyLog, DirtyRegion, InitiallyDirty, STRIPE_PAGES};
use sterna_bench::dirty::Random;

/// Words of the bitmap of a slot.
const SLOT_WORDS: usize = 1 << 18;

/// How often to look for the kernel's lock before sleeping: some milliseconds, in which a running owner
/// has copied a slot.
const SPINS: u32 = 100_000;

const SLOT_STRIPES: usize = 4096;
const _: () = assert!(SLOT_STRIPES as u64 * STRIPE_PAGES == SLOT_WORDS as u64 * 64);

/// Stands for the kernel's log of one region.
#[derive(Debug)]
pub(super) struct SlotLog {
    words: Vec<u64>,
    /// The kernel copies one slot of a VM at a time.
    kernel: Mutex<()>,
    free: Mutex<Vec<Vec<u64>>>,
}

impl SlotLog {
    /// A log with `dirty` of 10,000 pages dirty, in runs of `run_pages` pages.
    pub(super) fn new(pages: u64, dirty: u64, run_pages: u64) -> Self {
        // Written in any case: untouched memory is one page of zeros, which fits any cache.
        let mut words = vec![1; usize::try_from(pages / 64).expect("it fits a 64-bit machine")];
        words.fill(0);
        let mut random = Random::default();
        let runs = pages / run_pages;
        for _ in 0..pages * dirty / 10_000 / run_pages {
            let first = random.next() % runs * run_pages;
            for page in first..first + run_pages {
                words[usize::try_from(page / 64).expect("as above")] |= 1 << (page % 64);
            }
        }
        Self { words, kernel: Mutex::default(), free: Mutex::default() }
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Copies all slots, one after the other, to the same buffer.
    pub(super) fn copy(&self) {
        self.with_scratch(|scratch| {
            for slot in 0..self.words.len().div_ceil(SLOT_WORDS) {
                std::hint::black_box(self.copy_slot(slot, scratch));
            }
        });
    }

    fn copy_slot<'scratch>(&self, slot: usize, scratch: &'scratch mut [u64]) -> &'scratch [u64] {
        let words = &self.words[slot * SLOT_WORDS..];
        let words = &words[..words.len().min(SLOT_WORDS)];
        let copy = &mut scratch[..words.len()];
        let kernel = self.lock_kernel();
        copy.copy_from_slice(words);
        drop(kernel);
        copy
    }

    /// As Linux locks its mutexes: who waits does not sleep while the owner runs.
    fn lock_kernel(&self) -> MutexGuard<'_, ()> {
        for _ in 0..SPINS {
            match self.kernel.try_lock() {
                Ok(kernel) => return kernel,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_scratch<T>(&self, work: impl FnOnce(&mut [u64]) -> T) -> T {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let last = free().pop();
        let mut scratch = last.unwrap_or_else(|| vec![1; SLOT_WORDS]);
        let done = work(&mut scratch);
        free().push(scratch);
        done
    }
}

impl DirtyLog for SlotLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, _region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        dirty.mark_parts(std::iter::repeat(SLOT_STRIPES), |slot, part| {
            self.with_scratch(|scratch| {
                part.mark_many_words(slot * SLOT_WORDS, self.copy_slot(slot, scratch));
                Ok(())
            })
        })
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sterna::dirty::DirtyBitmap;
    use sterna::memory::{RamLayout, RegionLayout};

    use super::*;

    #[test]
    fn every_dirty_page_of_all_slots_is_harvested() {
        const PAGES: u64 = (SLOT_WORDS as u64 * 2 + 100) * 64;
        for run_pages in [1, 64] {
            let log = SlotLog::new(PAGES, 1, run_pages);
            let regions = vec![RegionLayout { guest_address: 0, len_bytes: PAGES * 4096 }];
            let mut dirty = DirtyBitmap::new(&RamLayout { regions });
            let harvested = dirty.harvest(&log).unwrap();
            assert_eq!(dirty.regions()[0].words(), log.words());
            let asked = PAGES / 10_000;
            assert!((asked * 9 / 10..=asked).contains(&harvested), "{harvested} of {asked}");
        }
    }
}
