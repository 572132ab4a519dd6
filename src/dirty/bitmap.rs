use std::convert::Infallible;
use std::iter::repeat;
use std::ops::Range;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::part::{DirtyPart, PART_STRIPES};
use super::stripes::STRIPE_WORDS;
use super::words::Words;
use super::{DirtyError, DirtyLog};
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

    /// How many pages are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.regions.iter().map(DirtyRegion::count).sum()
    }
}

/// One bit for each page of a region, in the layout of `KVM_GET_DIRTY_LOG`, and above it one bit for each
/// word.
///
/// The upper level makes a round with few dirty pages cheap: neither scanning nor clearing reads words that
/// are zero, which are most of the words. It takes a 64th of their size.
#[derive(Clone, Debug)]
pub struct DirtyRegion {
    pages: u64,
    words: Words,
    /// For each stripe, which of its words are not zero.
    nonzero: Vec<u64>,
    count: u64,
}

impl DirtyRegion {
    fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("RAM that is mapped here fits usize");
        let stripes = words.div_ceil(STRIPE_WORDS);
        Self { pages, words: Words::zeroed(words), nonzero: vec![0; stripes], count: 0 }
    }

    /// How many pages the region has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits, bit 0 of word 0 being the region's first page. Bits past the last page are never set.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// For each stripe, which of its words are not zero.
    pub(crate) fn nonzero(&self) -> &[u64] {
        &self.nonzero
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Marks pages dirty. Pages past the region's end are ignored.
    pub fn mark(&mut self, pages: Range<u64>) {
        self.whole(|all| all.edit(pages, |word, bits| word | bits));
    }

    /// Marks pages clean.
    pub fn unmark(&mut self, pages: Range<u64>) {
        self.whole(|all| all.edit(pages, |word, bits| word & !bits));
    }

    /// Marks the pages dirty that are set in `bits`, the region's word `word`. Pages past the region's end
    /// are ignored.
    pub fn mark_word(&mut self, word: usize, bits: u64) {
        self.whole(|all| all.mark_word(word, bits));
    }

    /// Marks the pages dirty that are set in consecutive words, of which the first is the region's word
    /// `first_word`.
    pub fn mark_words(&mut self, first_word: usize, words: &[u64]) {
        self.whole(|all| all.mark_words(first_word, words));
    }

    /// Has the workers of the current pool mark the region's parts, each of this many
    /// [stripes](super::Stripe); the last part takes the remainder too. The caller's thread marks a region of
    /// a single part.
    ///
    /// # Errors
    /// That of the first part that fails. Marks made before stay.
    pub fn mark_parts<E: Send>(
        &mut self,
        stripes: impl IntoIterator<Item = usize>,
        mark: impl Fn(usize, &mut DirtyPart<'_>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let all = DirtyPart::whole(self.pages, &mut self.words, &mut self.nonzero);
        let (added, result) = all.each(stripes, mark);
        self.count = self.count.wrapping_add(added);
        result
    }

    fn whole(&mut self, mark: impl FnOnce(&mut DirtyPart<'_>)) {
        let mut all = DirtyPart::whole(self.pages, &mut self.words, &mut self.nonzero);
        mark(&mut all);
        self.count = self.count.wrapping_add(all.added());
    }

    fn clear(&mut self) {
        let all = DirtyPart::whole(self.pages, &mut self.words, &mut self.nonzero);
        let cleared = all.each(repeat(PART_STRIPES), |_, part| {
            part.clear();
            Ok::<_, Infallible>(())
        });
        debug_assert_eq!(cleared, (0, Ok(())));
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        RecordKind(Range<u64>),
        Unmark(Range<u64>),
        MarkWords(usize, Vec<u64>),
        Clear,
    }

    fn change() -> impl Strategy<Value = Change> {
        let pages = || (0..6000u64, 0..3000u64).prop_map(|(first, count)| first..first + count);
        let word = prop_oneof![4 => Just(0), 1 => Just(u64::MAX), 1 => any::<u64>()];
        let words = (0..90usize, prop::collection::vec(word, 0..60));
        prop_oneof![
            4 => pages().prop_map(Change::RecordKind),
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
                    Change::RecordKind(pages) => {
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
