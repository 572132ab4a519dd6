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
/// Yields `(first, count)` in bits from the start of `words`.
#[derive(Clone, Debug)]
pub struct Runs<'bitmap> {
    words: &'bitmap [u64],
    word: usize,
    /// The bits of `words[word]` that have not been looked at.
    rest: u64,
}

impl<'bitmap> Runs<'bitmap> {
    /// The runs of `words`, bit 0 of word 0 being page 0 (the layout of `KVM_GET_DIRTY_LOG`).
    #[must_use]
    pub fn new(words: &'bitmap [u64]) -> Self {
        Self { words, word: 0, rest: words.first().copied().unwrap_or(0) }
    }

    fn next_word(&mut self) -> Option<()> {
        self.word += 1;
        let next = self.words.get(self.word);
        self.rest = next.copied().unwrap_or(0);
        next.map(|_| ())
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.rest == 0 {
            self.next_word()?;
        }
        let skip = self.rest.trailing_zeros();
        let first = self.word as u64 * 64 + u64::from(skip);
        // Adding the run's lowest bit carries through it to the first clear bit behind it.
        let carry = self.rest.wrapping_add(1 << skip);
        if carry != 0 {
            self.rest &= carry;
            return Some((first, u64::from(carry.trailing_zeros() - skip)));
        }
        // It fills its word to the end, and may go on in the next ones.
        let mut count = u64::from(64 - skip);
        self.rest = 0;
        while self.next_word().is_some() {
            let ones = self.rest.trailing_ones();
            count += u64::from(ones);
            if ones < 64 {
                self.rest &= self.rest.wrapping_add(1);
                break;
            }
            self.rest = 0;
        }
        Some((first, count))
    }
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
        fn runs_are_those_of_a_bit_by_bit_walk(words in prop::collection::vec(word(), 0..20)) {
            prop_assert_eq!(Runs::new(&words).collect::<Vec<_>>(), naive(&words));
        }
    }
}
