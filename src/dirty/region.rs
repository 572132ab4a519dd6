//! Which pages of a region are dirty.

use std::convert::Infallible;
use std::iter::repeat;
use std::ops::Range;

use super::part::{DirtyPart, PART_STRIPES};
use super::stripe::STRIPE_WORDS;
use super::words::Words;

/// One bit for each page of a region, in the layout of `KVM_GET_DIRTY_LOG`, and above it one bit for each
/// word.
///
/// The upper level makes a round with few dirty pages cheap: neither scanning nor clearing reads words that
/// are zero, which are most of the words. It takes a 64th of their size.
#[derive(Clone, Debug)]
pub struct DirtyRegion {
    pub(super) pages: u64,
    words: Words,
    /// For each stripe, which of its words are not zero.
    pub(super) nonzero: Vec<u64>,
    count: u64,
}

impl DirtyRegion {
    pub(super) fn new(pages: u64) -> Self {
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

    /// Marks the pages dirty that are dirty in another bitmap of the same region.
    pub(super) fn join(&mut self, other: &Self) {
        self.combine(other, |_, theirs| theirs, |ours, theirs| ours | theirs);
    }

    /// Marks the pages clean that are dirty in another bitmap of the same region.
    pub(super) fn remove(&mut self, other: &Self) {
        self.combine(other, |ours, theirs| ours & theirs, |ours, theirs| ours & !theirs);
    }

    /// Marks the pages clean that are clean in another bitmap of the same region.
    pub(super) fn keep(&mut self, other: &Self) {
        self.combine(other, |ours, _| ours, |ours, theirs| ours & theirs);
    }

    /// How many pages are dirty in both bitmaps.
    pub(super) fn common(&self, other: &Self) -> u64 {
        let mut pages = 0;
        for (stripe, (ours, theirs)) in self.nonzero.iter().zip(&other.nonzero).enumerate() {
            let mut both = ours & theirs;
            while both != 0 {
                let word = stripe * STRIPE_WORDS + both.trailing_zeros() as usize;
                pages += u64::from((self.words[word] & other.words[word]).count_ones());
                both &= both - 1;
            }
        }
        pages
    }

    fn combine(
        &mut self,
        other: &Self,
        which: impl Fn(u64, u64) -> u64 + Sync,
        change: impl Fn(u64, u64) -> u64 + Sync,
    ) {
        let all = DirtyPart::whole(self.pages, &mut self.words, &mut self.nonzero);
        let other = (other.words(), other.nonzero());
        let (added, combined) = all.each(repeat(PART_STRIPES), |_, part| {
            part.combine(other, &which, &change);
            Ok::<_, Infallible>(())
        });
        debug_assert_eq!(combined, Ok(()));
        self.count = self.count.wrapping_add(added);
    }

    pub(super) fn clear(&mut self) {
        let all = DirtyPart::whole(self.pages, &mut self.words, &mut self.nonzero);
        let cleared = all.each(repeat(PART_STRIPES), |_, part| {
            part.clear();
            Ok::<_, Infallible>(())
        });
        debug_assert_eq!(cleared, (0, Ok(())));
        self.count = 0;
    }
}
