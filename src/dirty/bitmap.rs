//! Which pages of guest RAM are dirty.

use rayon::ThreadPool;
use rayon::prelude::*;

use super::error::DirtyError;
use super::log::DirtyLog;
use super::part::PART_STRIPES;
use super::region::DirtyRegion;
use crate::memory::RamLayout;

/// Which pages of guest RAM are dirty, region by region: the engine's only bitmap.
///
/// It is made once for a migration and reused every round.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    regions: Vec<DirtyRegion>,
}

impl DirtyBitmap {
    /// An empty bitmap for the layout.
    #[must_use]
    pub fn new(layout: &RamLayout) -> Self {
        Self { regions: layout.regions.iter().map(|region| DirtyRegion::new(region.pages())).collect() }
    }

    /// The bits of each region of guest RAM, in order.
    #[must_use]
    pub fn regions(&self) -> &[DirtyRegion] {
        &self.regions
    }

    /// The same, to be changed.
    pub fn regions_mut(&mut self) -> &mut [DirtyRegion] {
        &mut self.regions
    }

    /// Adds the pages written since the last harvest; returns how many are dirty then. For large RAM the
    /// workers of the current pool share the work.
    ///
    /// # Errors
    /// As for [`DirtyLog::harvest`].
    pub fn harvest(&mut self, log: &dyn DirtyLog) -> Result<u64, DirtyError> {
        let harvest = |(region, dirty)| log.harvest(region, dirty);
        if self.is_large() {
            self.regions.par_iter_mut().enumerate().try_for_each(harvest)?;
        } else {
            self.regions.iter_mut().enumerate().try_for_each(harvest)?;
        }
        Ok(self.count())
    }

    /// Runs `work` on the bitmap by the workers of a pool if it is large. For a small one, the workers would
    /// take longer to wake up.
    pub(crate) fn by<T: Send>(&mut self, pool: &ThreadPool, work: impl FnOnce(&mut Self) -> T + Send) -> T {
        if self.is_large() { pool.install(|| work(self)) } else { work(self) }
    }

    fn is_large(&self) -> bool {
        self.regions.iter().map(|region| region.nonzero.len()).sum::<usize>() > PART_STRIPES
    }

    /// Marks every page dirty, for the first round.
    pub fn fill(&mut self) {
        for region in &mut self.regions {
            region.mark(0..region.pages);
        }
    }

    /// Marks every page clean.
    pub fn clear(&mut self) {
        self.regions.iter_mut().for_each(DirtyRegion::clear);
    }

    /// Marks the pages dirty that are dirty in a bitmap of the same layout.
    pub(crate) fn join(&mut self, other: &Self) {
        self.regions.iter_mut().zip(&other.regions).for_each(|(region, other)| region.join(other));
    }

    /// Marks the pages clean that are dirty in a bitmap of the same layout.
    pub(crate) fn remove(&mut self, other: &Self) {
        self.regions.iter_mut().zip(&other.regions).for_each(|(region, other)| region.remove(other));
    }

    /// Marks the pages clean that are clean in a bitmap of the same layout.
    pub(crate) fn keep(&mut self, other: &Self) {
        self.regions.iter_mut().zip(&other.regions).for_each(|(region, other)| region.keep(other));
    }

    /// How many pages are dirty in both bitmaps, which have the same layout.
    pub(crate) fn common(&self, other: &Self) -> u64 {
        self.regions.iter().zip(&other.regions).map(|(region, other)| region.common(other)).sum()
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.regions.iter().map(DirtyRegion::count).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::super::stripe::STRIPE_WORDS;
    use super::*;
    use crate::memory::RegionLayout;

    #[test]
    fn a_full_bitmap_has_exactly_the_pages_of_the_regions() {
        let region = |guest_address, pages: u64| RegionLayout { guest_address, len_bytes: pages * 4096 };
        let layout = RamLayout { regions: vec![region(0, 64), region(1 << 32, 130), region(1 << 33, 1)] };
        let mut bitmap = DirtyBitmap::new(&layout);
        assert_eq!(bitmap.count(), 0);
        bitmap.fill();
        assert_eq!(bitmap.count(), 195);
        assert_eq!(bitmap.regions()[1].words(), [u64::MAX, u64::MAX, 3]);
        bitmap.clear();
        assert_eq!(bitmap.count(), 0);
        assert_eq!(bitmap.regions()[1].words(), [0; 3]);
    }

    #[derive(Clone, Debug)]
    enum Change {
        Mark(Range<u64>),
        Unmark(Range<u64>),
        MarkWords(usize, Vec<u64>),
        Clear,
    }

    fn change() -> impl Strategy<Value = Change> {
        let pages = || (0..6000u64, 0..3000u64).prop_map(|(first, count)| first..first + count);
        let word = prop_oneof![4 => Just(0), 1 => Just(u64::MAX), 1 => any::<u64>()];
        let words = (0..90usize, prop::collection::vec(word, 0..60));
        prop_oneof![
            4 => pages().prop_map(Change::Mark),
            4 => pages().prop_map(Change::Unmark),
            4 => words.prop_map(|(first, words)| Change::MarkWords(first, words)),
            1 => Just(Change::Clear),
        ]
    }

    proptest! {
        /// After any operations, a region has the bits and the count of a list of pages after the same
        /// operations.
        #[test]
        fn bits_and_count_are_those_of_a_list_of_pages(
            pages in 1..5000u64,
            changes in prop::collection::vec(change(), 0..12),
        ) {
            let mut region = DirtyRegion::new(pages);
            let mut list = vec![false; 12_000];
            for change in changes {
                match change {
                    Change::Mark(pages) => {
                        region.mark(pages.clone());
                        pages.for_each(|page| list[usize::try_from(page).unwrap()] = true);
                    }
                    Change::Unmark(pages) => {
                        region.unmark(pages.clone());
                        pages.for_each(|page| list[usize::try_from(page).unwrap()] = false);
                    }
                    Change::MarkWords(first_word, words) => {
                        region.mark_words(first_word, &words);
                        for bit in 0..words.len() * 64 {
                            list[first_word * 64 + bit] |= words[bit / 64] >> (bit % 64) & 1 == 1;
                        }
                    }
                    Change::Clear => {
                        region.clear();
                        list.fill(false);
                    }
                }
                list[usize::try_from(pages).unwrap()..].fill(false);
            }
            list.truncate(usize::try_from(pages).unwrap());
            let word = |pages: &[bool]| pages.iter().rev().fold(0, |word, &page| word << 1 | u64::from(page));
            prop_assert_eq!(region.words(), list.chunks(64).map(word).collect::<Vec<_>>());
            for (index, word) in region.words().iter().enumerate() {
                let bit = region.nonzero()[index / STRIPE_WORDS] >> (index % STRIPE_WORDS) & 1;
                prop_assert_eq!(bit == 1, *word != 0);
            }
            prop_assert_eq!(region.count(), list.iter().filter(|&&page| page).count() as u64);
        }
    }
}
