//! Runs in words that are mostly zero.

/// Goes from one word that is not zero to the next, and from run to run in the word.
///
/// Tests 64 words at a time for zero, without a branch for each: dirty words are the hardest for a processor
/// to predict, and a misprediction costs more than the test.
#[derive(Clone, Debug)]
pub(super) struct SparseRuns<'bitmap> {
    words: &'bitmap [u64],
    /// The first word of the current 64.
    block: usize,
    /// Which of those are not zero and come after `word`.
    to_come: u64,
    word: usize,
    /// The bits of `words[word]` not yet returned.
    rest: u64,
}

impl<'bitmap> SparseRuns<'bitmap> {
    /// `nonzero` has a bit for each of the first 64 words.
    pub(super) fn new(words: &'bitmap [u64], nonzero: u64) -> Self {
        Self { words, block: 0, to_come: nonzero, word: 0, rest: 0 }
    }

    /// Goes on to the next block; false at the end.
    fn next_block(&mut self) -> bool {
        let rest = self.words.get(self.block + 64..).unwrap_or_default();
        if rest.is_empty() {
            return false;
        }
        self.block += 64;
        self.to_come = nonzero(rest);
        true
    }

    /// How far a run continues that fills its word to the end.
    // Called rarely, and kept out of `next` so that the state of `next` fits into registers.
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

impl Iterator for SparseRuns<'_> {
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
        // Adding the run's lowest bit carries through it to the first clear bit after it.
        let carry = self.rest.wrapping_add(self.rest & self.rest.wrapping_neg());
        let (start, end) = (self.rest.trailing_zeros(), carry.trailing_zeros());
        let first = self.word as u64 * 64 + u64::from(start);
        self.rest &= carry;
        let more = if carry == 0 { self.extend() } else { 0 };
        Some((first, u64::from(end - start) + more))
    }
}

/// Which of the first 64 words are not zero.
pub(super) fn nonzero(words: &[u64]) -> u64 {
    let bits = words.iter().take(64).enumerate();
    bits.fold(0, |bits, (index, &word)| bits | u64::from(word != 0) << index)
}
