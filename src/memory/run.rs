use super::PAGE_BYTES;

/// Consecutive pages of one RAM region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Index of the region.
    pub region: usize,
    /// First page, counted from the region's start.
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

impl PageRun {
    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    /// The same pages in parts of at most `pages_max` pages.
    pub fn split(self, pages_max: u64) -> impl Iterator<Item = PageRun> {
        let end = self.first_page + self.pages;
        (self.first_page..end)
            .step_by(usize::try_from(pages_max.max(1)).unwrap_or(usize::MAX))
            .map(move |first_page| PageRun { first_page, pages: pages_max.min(end - first_page), ..self })
    }
}

/// The runs of set bits in a bitmap, in order: joined across words, one step per run and per word rather than per bit.
///
/// Words are looked for 64 at a time and without a branch for each: which of them is dirty is what a processor guesses worst,
/// and a wrong guess costs more than the look. Yields `(first, count)` in bits from the start of `words`.
#[derive(Clone, Debug)]
pub struct Runs<'bitmap> {
    words: &'bitmap [u64],
    /// The first word of the 64 that are being gone through.
    block: usize,
    /// Which of them are not zero and come after `word`.
    to_come: u64,
    word: usize,
    /// The bits of `words[word]` that were not given out.
    rest: u64,
}

impl<'bitmap> Runs<'bitmap> {
    /// The runs of `words`, bit 0 of word 0 being page 0 (the layout of `KVM_GET_DIRTY_LOG`).
    #[must_use]
    pub fn new(words: &'bitmap [u64]) -> Self {
        Self::of_block(words, nonzero(words))
    }

    /// The runs of words of which those set in `nonzero` are the ones of the first 64 that are not zero.
    pub(crate) fn of_block(words: &'bitmap [u64], nonzero: u64) -> Self {
        Self { words, block: 0, to_come: nonzero, word: 0, rest: 0 }
    }

    /// Goes on to the next block; false if there is none.
    fn next_block(&mut self) -> bool {
        let rest = self.words.get(self.block + 64..).unwrap_or_default();
        if rest.is_empty() {
            return false;
        }
        self.block += 64;
        self.to_come = nonzero(rest);
        true
    }

    /// How far a run goes on that fills its word to the end.
    // Called seldom, and kept out of `next` so that its state fits into registers.
    #[cold]
    #[inline(never)]
    fn extend(&mut self) -> u64 {
        let next = self.words.get(self.word + 1..).unwrap_or_default();
        let full = next.iter().take_while(|&&word| word == u64::MAX).count();
        let last = next.get(full).copied().unwrap_or(0);
        self.word += 1 + full;
        self.rest = last & last.wrapping_add(1);
        while self.word >= self.block + 64 && self.next_block() {}
        let passed = u32::try_from(self.word - self.block).unwrap_or(u32::MAX);
        self.to_come &= (u64::MAX - 1).checked_shl(passed).unwrap_or(0);
        full as u64 * 64 + u64::from(last.trailing_ones())
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        if self.rest == 0 {
            while self.to_come == 0 {
                if !self.next_block() {
                    return None;
                }
            }
            self.word = self.block + self.to_come.trailing_zeros() as usize;
            self.to_come &= self.to_come - 1;
            self.rest = self.words[self.word];
        }
        // Adding the run's lowest bit carries through it to the first clear bit behind it.
        let carry = self.rest.wrapping_add(self.rest & self.rest.wrapping_neg());
        let (start, end) = (self.rest.trailing_zeros(), carry.trailing_zeros());
        let first = self.word as u64 * 64 + u64::from(start);
        self.rest &= carry;
        let more = if carry == 0 { self.extend() } else { 0 };
        Some((first, u64::from(end - start) + more))
    }
}

/// Which of the first 64 words are not zero.
fn nonzero(words: &[u64]) -> u64 {
    let bits = words.iter().take(64).enumerate();
    bits.fold(0, |bits, (index, &word)| bits | u64::from(word != 0) << index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(words: &[u64]) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for bit in 0..words.len() as u64 * 64 {
            if words[usize::try_from(bit / 64).unwrap()] & (1 << (bit % 64)) == 0 {
                continue;
            }
            match runs.last_mut() {
                Some((first, count)) if *first + *count == bit => *count += 1,
                _ => runs.push((bit, 1)),
            }
        }
        runs
    }

    #[test]
    fn runs_join_across_words() {
        let words = [1 << 63, u64::MAX, 0b1011, 0, u64::MAX];
        assert_eq!(Runs::new(&words).collect::<Vec<_>>(), [(63, 67), (131, 1), (256, 64)]);
        assert_eq!(Runs::new(&[]).count(), 0);
    }

    #[test]
    fn a_run_splits_into_parts_that_cover_it() {
        let run = PageRun { region: 3, first_page: 10, pages: 7 };
        let parts: Vec<_> = run.split(3).map(|part| (part.region, part.first_page, part.pages)).collect();
        assert_eq!(parts, [(3, 10, 3), (3, 13, 3), (3, 16, 1)]);
    }

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64u32).prop_map(|n| u64::MAX << n)]
    }

    proptest! {
        #[test]
        fn runs_are_those_of_a_bit_by_bit_walk(words in prop::collection::vec(word(), 0..150)) {
            prop_assert_eq!(Runs::new(&words).collect::<Vec<_>>(), naive(&words));
        }
    }
}
