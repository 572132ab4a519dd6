//! Marking dirty pages: in a whole region, or in its parts by several workers at once.

use std::convert::Infallible;
use std::iter::repeat;
use std::ops::Range;
use std::slice;

use rayon::prelude::*;

use super::prefetch::prefetch;
use super::stripe::STRIPE_WORDS;

/// Stripes of RAM that justify a worker of their own: 64 GiB, with a bitmap of 2 MiB.
pub(super) const PART_STRIPES: usize = 4096;

/// The bits of consecutive stripes of a region, for one worker to mark.
///
/// Words are counted from the region's start. Pages outside of the part are ignored.
#[derive(Debug)]
pub struct DirtyPart<'region> {
    first_word: usize,
    /// The pages of the region.
    pages: u64,
    words: &'region mut [u64],
    nonzero: &'region mut [u64],
    /// How many more pages are dirty than at first, modulo 2^64.
    added: u64,
}

impl<'region> DirtyPart<'region> {
    /// All of a region with this many pages.
    pub(super) fn whole(pages: u64, words: &'region mut [u64], nonzero: &'region mut [u64]) -> Self {
        Self { first_word: 0, pages, words, nonzero, added: 0 }
    }

    /// The range of the region's words in this part.
    #[must_use]
    pub fn words(&self) -> Range<usize> {
        self.first_word..self.first_word + self.words.len()
    }

    /// Marks the pages dirty that are set in `bits`, the region's word `word`.
    pub fn mark_word(&mut self, word: usize, bits: u64) {
        let Some(index) = word.checked_sub(self.first_word) else { return };
        if let Some(ours) = self.words.get(index) {
            let pages_left = self.pages - word as u64 * 64;
            self.set(index, ours | bits & u64::MAX >> 64u64.saturating_sub(pages_left));
        }
    }

    /// Marks the pages dirty that are set in consecutive words, of which the first is the region's word
    /// `first_word`.
    pub fn mark_words(&mut self, first_word: usize, words: &[u64]) {
        let (blocks, rest) = words.as_chunks::<BLOCK_WORDS>();
        let first_word_of = |block: usize| first_word + block * BLOCK_WORDS;
        for (batch, blocks) in blocks.chunks(BLOCKS_AHEAD).enumerate() {
            // Which have something in them is noted without a branch: no processor foresees it.
            let (mut found, mut count) = ([0; BLOCKS_AHEAD], 0);
            for (index, block) in (batch * BLOCKS_AHEAD..).zip(blocks) {
                found[count] = index;
                // One test for 16 words, of which a processor reads several at once, and most are zero.
                count += usize::from(block.iter().fold(0, |any, word| any | word) != 0);
            }
            let found = &found[..count];
            // Ours of little that is dirty are in no cache, and to wait for each by itself takes longer
            // than all else.
            for &block in found.iter().filter(|_| count < blocks.len()) {
                let (first, second) = blocks[block - batch * BLOCKS_AHEAD].split_at(BLOCK_WORDS / 2);
                for (half, words) in [first, second].into_iter().enumerate() {
                    if words.iter().fold(0, |any, word| any | word) != 0 {
                        self.prefetch(first_word_of(block) + half * words.len());
                    }
                }
            }
            for &block in found {
                self.mark_some(first_word_of(block), &blocks[block - batch * BLOCKS_AHEAD]);
            }
        }
        self.mark_some(first_word_of(blocks.len()), rest);
    }

    /// The same for so many words that the workers of the current pool share them.
    pub fn mark_many_words(&mut self, first_word: usize, words: &[u64]) {
        let mine = DirtyPart {
            first_word: self.first_word,
            pages: self.pages,
            words: &mut *self.words,
            nonzero: &mut *self.nonzero,
            added: 0,
        };
        let (added, marked) = mine.each(repeat(PART_STRIPES), |_, part| {
            let Range { start, end } = part.words();
            let from = start.saturating_sub(first_word).min(words.len());
            let to = end.saturating_sub(first_word).clamp(from, words.len());
            part.mark_words(first_word + from, &words[from..to]);
            Ok::<_, Infallible>(())
        });
        debug_assert_eq!(marked, Ok(()));
        self.added = self.added.wrapping_add(added);
    }

    /// Changes the bits of pages of a part that is the whole region. Pages past the region's end are ignored.
    pub(super) fn edit(&mut self, pages: Range<u64>, change: impl Fn(u64, u64) -> u64) {
        let (mut first, end) = (pages.start, pages.end.min(self.pages));
        while first < end {
            let stop = end.min((first / 64 + 1) * 64);
            let word = usize::try_from(first / 64).expect("it is less than the number of words");
            let bits = u64::MAX << (first % 64) & u64::MAX >> (63 - (stop - 1) % 64);
            self.set(word, change(self.words[word], bits));
            first = stop;
        }
    }

    /// Marks all pages clean.
    pub(super) fn clear(&mut self) {
        for (words, nonzero) in self.words.chunks_mut(STRIPE_WORDS).zip(&mut *self.nonzero) {
            // Most stripes are clean, and most others have few dirty words.
            if nonzero.count_ones() > SPARSE_WORDS {
                words.fill(0);
                *nonzero = 0;
            }
            while *nonzero != 0 {
                words[nonzero.trailing_zeros() as usize] = 0;
                *nonzero &= *nonzero - 1;
            }
        }
    }

    /// Changes words by those of another bitmap of the same region. `which` tells from the summaries of a
    /// stripe, its own and the other's, which words may change.
    pub(super) fn combine(
        &mut self,
        (words, nonzero): (&[u64], &[u64]),
        which: impl Fn(u64, u64) -> u64,
        change: impl Fn(u64, u64) -> u64,
    ) {
        let first_stripe = self.first_word / STRIPE_WORDS;
        for (stripe, &theirs) in nonzero[first_stripe..][..self.nonzero.len()].iter().enumerate() {
            let mut which = which(self.nonzero[stripe], theirs);
            while which != 0 {
                let index = stripe * STRIPE_WORDS + which.trailing_zeros() as usize;
                self.set(index, change(self.words[index], words[self.first_word + index]));
                which &= which - 1;
            }
        }
    }

    /// How many more pages are dirty than at first, modulo 2^64.
    pub(super) fn added(&self) -> u64 {
        self.added
    }

    /// Has the line of the cache fetched in which a word of the region lies.
    fn prefetch(&self, word: usize) {
        let index = word.checked_sub(self.first_word);
        if let Some(word) = index.and_then(|index| self.words.get(index)) {
            prefetch(slice::from_ref(word));
        }
    }

    fn mark_some(&mut self, first_word: usize, words: &[u64]) {
        for (index, &word) in (first_word..).zip(words) {
            if word != 0 {
                self.mark_word(index, word);
            }
        }
    }

    fn set(&mut self, index: usize, bits: u64) {
        let (stripe, bit) = (&mut self.nonzero[index / STRIPE_WORDS], 1 << (index % STRIPE_WORDS));
        *stripe = if bits == 0 { *stripe & !bit } else { *stripe | bit };
        let before = std::mem::replace(&mut self.words[index], bits);
        let added = u64::from(bits.count_ones()).wrapping_sub(before.count_ones().into());
        self.added = self.added.wrapping_add(added);
    }

    /// Cuts a region into parts of this many stripes each; the last takes the remainder.
    fn split(self, stripes: impl IntoIterator<Item = usize>) -> Vec<Self> {
        let mut parts = Vec::new();
        let mut rest = self;
        for stripes in stripes {
            let stripes = stripes.max(1);
            if stripes >= rest.nonzero.len() {
                break;
            }
            let Self { first_word, pages, words, nonzero, .. } = rest;
            let (words, words_left) = words.split_at_mut(stripes * STRIPE_WORDS);
            let (nonzero, nonzero_left) = nonzero.split_at_mut(stripes);
            rest = Self {
                first_word: first_word + words.len(),
                pages,
                words: words_left,
                nonzero: nonzero_left,
                added: 0,
            };
            parts.push(Self { first_word, pages, words, nonzero, added: 0 });
        }
        parts.push(rest);
        parts
    }

    /// Has the workers of the current pool process the parts of a region; the caller processes a single part
    /// itself. Returns how many more pages are dirty then, modulo 2^64, even after an error.
    pub(super) fn each<E: Send>(
        self,
        stripes: impl IntoIterator<Item = usize>,
        work: impl Fn(usize, &mut DirtyPart<'_>) -> Result<(), E> + Sync,
    ) -> (u64, Result<(), E>) {
        let work = |(index, mut part): (usize, Self)| {
            let result = work(index, &mut part);
            (part.added, result)
        };
        let mut parts = self.split(stripes);
        match parts.pop() {
            Some(part) if parts.is_empty() => work((0, part)),
            last => {
                parts.extend(last);
                let none = || (0, Ok(()));
                let both = |(added, result): (u64, Result<(), E>), (more, next): (u64, Result<(), E>)| {
                    (added.wrapping_add(more), result.and(next))
                };
                parts.into_par_iter().enumerate().with_max_len(1).map(work).reduce(none, both)
            }
        }
    }
}

/// Words that are tested together: two cache lines.
const BLOCK_WORDS: usize = 16;

/// Blocks of which the non-zero ones are found before this bitmap is changed: 16 KiB of bits.
const BLOCKS_AHEAD: usize = 128;

/// With more dirty words in a stripe than this, it is faster to clear all words.
const SPARSE_WORDS: u32 = 8;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::dirty::{DirtyBitmap, STRIPE_PAGES};
    use crate::memory::{RamLayout, RegionLayout};

    fn bitmap(pages: u64) -> DirtyBitmap {
        DirtyBitmap::new(&RamLayout {
            regions: vec![RegionLayout { guest_address: 0, len_bytes: pages * 4096 }],
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// Marked in parts by several workers, whatever the sizes, a region equals one marked at once.
        #[test]
        fn parts_together_are_the_region(
            pages in 1..40 * STRIPE_PAGES,
            stripes in prop::collection::vec(0..9usize, 0..9),
            marked in prop::collection::vec((0..3000usize, any::<u64>()), 0..200),
        ) {
            let mut words = vec![0; 3000];
            marked.iter().for_each(|&(word, bits)| words[word] |= bits);
            let [mut whole, mut parts] = [bitmap(pages), bitmap(pages)];
            whole.regions_mut()[0].mark_words(0, &words);
            let result = parts.regions_mut()[0].mark_parts(stripes, |index, part| {
                // Pages outside of the part are ignored.
                part.mark_words(0, &words);
                part.mark_word(usize::MAX, 1);
                if index == 1 { Err("the second") } else { Ok(()) }
            });
            prop_assert!(matches!(result, Ok(()) | Err("the second")));
            prop_assert_eq!(parts.regions()[0].words(), whole.regions()[0].words());
            prop_assert_eq!(parts.regions()[0].nonzero(), whole.regions()[0].nonzero());
            prop_assert_eq!(parts.count(), whole.count());
            parts.clear();
            prop_assert_eq!(parts.count(), 0);
            let cleared = &parts.regions()[0];
            prop_assert!(cleared.words().iter().chain(cleared.nonzero()).all(|&word| word == 0));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// Joined, removed or kept, a bitmap has the pages of the sets after the same operation.
        #[test]
        fn bitmaps_are_combined_as_sets_are(
            pages in 1..3 * STRIPE_PAGES,
            ours in prop::collection::btree_set(0..3 * STRIPE_PAGES, 0..300),
            theirs in prop::collection::btree_set(0..3 * STRIPE_PAGES, 0..300),
        ) {
            let within = |set: &BTreeSet<u64>| {
                set.iter().copied().filter(|&page| page < pages).collect::<BTreeSet<_>>()
            };
            let (ours, theirs) = (within(&ours), within(&theirs));
            let of = |set: &BTreeSet<u64>| {
                let mut bitmap = bitmap(pages);
                set.iter().for_each(|&page| bitmap.regions_mut()[0].mark(page..page + 1));
                bitmap
            };
            let same = |combined: &DirtyBitmap, set: &BTreeSet<u64>| {
                let (found, expected) = (&combined.regions()[0], of(set));
                found.words() == expected.regions()[0].words()
                    && found.nonzero() == expected.regions()[0].nonzero()
                    && found.count() == set.len() as u64
            };
            let other = of(&theirs);
            prop_assert_eq!(of(&ours).common(&other), ours.intersection(&theirs).count() as u64);
            let [mut joined, mut removed, mut kept] = [of(&ours), of(&ours), of(&ours)];
            joined.join(&other);
            removed.remove(&other);
            kept.keep(&other);
            prop_assert!(same(&joined, &ours.union(&theirs).copied().collect()));
            prop_assert!(same(&removed, &ours.difference(&theirs).copied().collect()));
            prop_assert!(same(&kept, &ours.intersection(&theirs).copied().collect()));
        }
    }

    #[test]
    fn many_words_are_shared_by_the_workers_and_all_marked() {
        const WORDS: usize = 3 * PART_STRIPES * STRIPE_WORDS + 70;
        let mut words = vec![0; WORDS];
        for word in
            [0, PART_STRIPES * STRIPE_WORDS - 1, PART_STRIPES * STRIPE_WORDS, 2 * WORDS / 3, WORDS - 1]
        {
            words[word] = 5;
        }
        let mut bitmap = bitmap((WORDS as u64 + 9) * 64);
        for first_word in [9, 0] {
            bitmap.clear();
            let all = &mut bitmap.regions_mut()[0];
            let marked = all.mark_parts([], |_, part| {
                part.mark_many_words(first_word, &words);
                Ok::<_, Infallible>(())
            });
            assert_eq!(marked, Ok(()));
            assert!(bitmap.regions()[0].words()[first_word..first_word + WORDS] == words);
            assert_eq!(bitmap.count(), 10);
        }
        bitmap.clear();
        assert!(bitmap.regions()[0].words().iter().all(|&word| word == 0));
    }
}
