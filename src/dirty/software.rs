use std::convert::Infallible;
use std::fmt::Debug;
use std::iter::repeat;

use sterna_bitmap::SoftwareBitmap;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::error::DirtyError;
use super::log::{CaughtUp, DirtyLog, InitiallyDirty};
use super::part::PART_STRIPES;
use super::region::DirtyRegion;

/// The log of the VMM's own threads, which write through `vm-memory`: its bitmap marks each page they touch.
///
/// That bitmap is always on; starting only clears its marks.
#[derive(Clone, Debug)]
pub struct SoftwareLog<B> {
    memory: GuestMemoryMmap<B>,
}

/// A bitmap of `vm-memory` that a [`SoftwareLog`] can empty while other threads mark pages.
///
/// [`SoftwareBitmap`] does that at almost no cost while it is clean. `AtomicBitmap` must allocate a second
/// bitmap and exchange every word: 1 ms for 64 GiB of RAM, every round and in the downtime.
pub trait WrittenPages: Bitmap {
    /// Moves the marks over to `dirty`, the bits of the same region.
    fn take(&self, dirty: &mut DirtyRegion);

    /// Forgets all marks.
    fn forget(&self);

    /// How many pages are marked, about, if that is quick to tell.
    fn marked(&self) -> Option<u64> {
        None
    }
}

impl WrittenPages for SoftwareBitmap {
    fn take(&self, dirty: &mut DirtyRegion) {
        let taken = dirty.mark_parts(repeat(PART_STRIPES), |_, part| {
            self.take_words(part.words(), |word, bits| part.mark_word(word, bits));
            Ok::<_, Infallible>(())
        });
        debug_assert_eq!(taken, Ok(()));
    }

    fn forget(&self) {
        self.reset();
    }

    fn marked(&self) -> Option<u64> {
        Some(self.count())
    }
}

impl WrittenPages for AtomicBitmap {
    fn take(&self, dirty: &mut DirtyRegion) {
        dirty.mark_words(0, &self.get_and_reset());
    }

    fn forget(&self) {
        self.reset();
    }
}

impl<B: WrittenPages> SoftwareLog<B> {
    /// The log of a guest with the regions of its [`GuestRam`](crate::memory::GuestRam), in the same
    /// order.
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap<B>) -> Self {
        Self { memory: memory.clone() }
    }
}

impl<B: WrittenPages + Debug + Send + Sync> DirtyLog for SoftwareLog<B> {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        for region in self.memory.iter() {
            (**region).bitmap().forget();
        }
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        let out_of_range = DirtyError::OutOfRange { region, first_page: 0, words: dirty.words().len() };
        let region = self.memory.iter().nth(region).ok_or(out_of_range)?;
        // Consumed now and not at `clear`: this is before any page is read, which is all that the discipline
        // asks.
        (**region).bitmap().take(dirty);
        Ok(())
    }

    fn clear(&self, _region: usize, _first_page: u64, _bits: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    /// A harvest takes the marks of pages that are to be sent, so none of these counts.
    fn peek(&self, _uncleared: u64) -> Result<Option<u64>, DirtyError> {
        Ok(self.memory.iter().map(|region| (**region).bitmap().marked()).sum())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Two logs of the same guest: a page is dirty if either log reports it.
#[derive(Debug)]
pub struct EitherLog<A, B>(pub A, pub B);

impl<A: DirtyLog, B: DirtyLog> DirtyLog for EitherLog<A, B> {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        match (self.0.start()?, self.1.start()?) {
            (InitiallyDirty::AsNamed, InitiallyDirty::AsNamed) => Ok(InitiallyDirty::AsNamed),
            _ => Ok(InitiallyDirty::All),
        }
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(match (self.0.catch_up()?, self.1.catch_up()?) {
            (CaughtUp::Paused { since: first }, CaughtUp::Paused { since: second }) => {
                CaughtUp::Paused { since: first.min(second) }
            }
            (CaughtUp::Partly, _) | (_, CaughtUp::Partly) => CaughtUp::Partly,
            (CaughtUp::Fully { unnamed_pages: first }, CaughtUp::Fully { unnamed_pages: second }) => {
                CaughtUp::Fully { unnamed_pages: first + second }
            }
            (paused @ CaughtUp::Paused { .. }, _) | (_, paused) => paused,
        })
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        self.0.harvest(region, dirty)?;
        self.1.harvest(region, dirty)
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        self.0.clear(region, first_page, bits)?;
        self.1.clear(region, first_page, bits)
    }

    fn warning(&self) -> Option<String> {
        self.0.warning().or_else(|| self.1.warning())
    }

    /// A page that both have counts twice.
    fn peek(&self, uncleared: u64) -> Result<Option<u64>, DirtyError> {
        Ok(self.0.peek(uncleared)?.zip(self.1.peek(uncleared)?).map(|(one, other)| one + other))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.0.stop().and(self.1.stop())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::NewBitmap;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::dirty::DirtyBitmap;
    use crate::memory::GuestRam;

    fn each_write_is_harvested_once_and_earlier_bits_stay<
        B: WrittenPages + NewBitmap + Send + Sync + Debug + 'static,
    >() {
        let memory: GuestMemoryMmap<B> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 100 * 4096)]).unwrap();
        let log = SoftwareLog::new(&memory);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        log.start().unwrap();
        memory.write_obj(1u8, GuestAddress(70 * 4096 - 1)).unwrap();
        memory.write_obj(1u8, GuestAddress(70 * 4096)).unwrap();
        let mut dirty = DirtyBitmap::new(&GuestRam::from_vm_memory(&memory).unwrap().layout());
        dirty.regions_mut()[0].mark(8..9);
        for _ in 0..2 {
            assert_eq!(dirty.harvest(&log).unwrap(), 3);
            assert_eq!(dirty.regions()[0].words(), [1 << 8, 0b11 << 5]);
        }
        dirty.clear();
        assert_eq!(dirty.harvest(&log).unwrap(), 0);
        let beyond = log.harvest(1, &mut dirty.regions_mut()[0]);
        assert!(matches!(beyond, Err(DirtyError::OutOfRange { .. })));
    }

    #[test]
    fn our_bitmap_is_harvested() {
        each_write_is_harvested_once_and_earlier_bits_stay::<SoftwareBitmap>();
    }

    #[test]
    fn to_peek_takes_nothing_and_counts_what_was_written_since_the_harvest() {
        let region = [(GuestAddress(0), 100 * 4096)];
        let ours: GuestMemoryMmap<SoftwareBitmap> = GuestMemoryMmap::from_ranges(&region).unwrap();
        let log = EitherLog(SoftwareLog::new(&ours), SoftwareLog::new(&ours));
        log.start().unwrap();
        ours.write_obj(1u8, GuestAddress(0)).unwrap();
        ours.write_obj(1u8, GuestAddress(70 * 4096)).unwrap();
        for _ in 0..2 {
            assert_eq!(log.0.peek(100).unwrap(), Some(2));
            assert_eq!(log.peek(100).unwrap(), Some(4), "both have it");
        }
        let mut dirty = DirtyBitmap::new(&GuestRam::from_vm_memory(&ours).unwrap().layout());
        assert_eq!(dirty.harvest(&log).unwrap(), 2);
        assert_eq!(log.peek(2).unwrap(), Some(0));
        let other: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&region).unwrap();
        assert_eq!(EitherLog(log, SoftwareLog::new(&other)).peek(0).unwrap(), None, "one cannot tell");
    }

    #[test]
    fn an_atomic_bitmap_is_harvested() {
        each_write_is_harvested_once_and_earlier_bits_stay::<AtomicBitmap>();
    }
}
