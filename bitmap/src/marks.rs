use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros;

/// Words of bits, and a summary with a bit for each word that may not be zero.
///
/// A marker sets the word before its summary bit; a taker clears the summary bit before it takes the word. So
/// a taker that finds the summary bit clear comes before the end of the mark, or after another taker that
/// took the word with the mark in it.
#[derive(Debug)]
pub(crate) struct Marks<W> {
    words: Box<[W]>,
    summary: Box<[W]>,
}

/// An atomic word: that of the standard library, or loom's.
pub(crate) trait Word: Debug + Sized {
    /// An array of `count` zero words.
    fn zeros(count: usize) -> Box<[Self]>;

    fn load(&self, order: Ordering) -> u64;
    fn swap(&self, value: u64, order: Ordering) -> u64;
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64;
}

impl<W: Word> Marks<W> {
    pub(crate) fn new(words: usize) -> Self {
        Self { words: W::zeros(words), summary: W::zeros(words.div_ceil(64)) }
    }

    /// # Panics
    /// If the index is out of range.
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// # Panics
    /// If the index is out of range.
    pub(crate) fn mark(&self, index: usize, bits: u64) {
        let (summary, bit) = (&self.summary[index / 64], 1 << (index % 64));
        // Release: a taker sees the writes before the mark. Acquire: after a taker's exchange of this word,
        // its earlier exchange of the summary is visible, so the next taker will find a summary bit that is
        // still set.
        self.words[index].fetch_or(bits, Ordering::AcqRel);
        if summary.load(Ordering::Relaxed) & bit == 0 {
            summary.fetch_or(bit, Ordering::Release);
        }
    }

    /// How many marks a taker would find, without taking any. Marks that are set or taken meanwhile count or
    /// do not.
    pub(crate) fn count(&self) -> u64 {
        let mut count = 0;
        for (index, summary) in self.summary.iter().enumerate() {
            let mut left = summary.load(Ordering::Relaxed);
            while left != 0 {
                let word = index * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                count += u64::from(self.words[word].load(Ordering::Relaxed).count_ones());
            }
        }
        count
    }

    pub(crate) fn take(&self, taken: impl FnMut(usize, u64)) {
        self.take_words(0..self.words.len(), taken);
    }

    /// Takes a range of the words, in whole summary words.
    pub(crate) fn take_words(&self, words: Range<usize>, mut taken: impl FnMut(usize, u64)) {
        let (first, end) = (words.start / 64, words.end.div_ceil(64));
        for (index, summary) in self.summary.iter().enumerate().take(end).skip(first) {
            // A load is enough while the word is zero: the cache line stays with the markers.
            if summary.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut left = summary.swap(0, Ordering::AcqRel);
            while left != 0 {
                let word = index * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                let bits = self.words[word].swap(0, Ordering::AcqRel);
                if bits != 0 {
                    taken(word, bits);
                }
            }
        }
    }
}

impl<W> Default for Marks<W> {
    fn default() -> Self {
        Self { words: Box::default(), summary: Box::default() }
    }
}

macro_rules! impl_word {
    ($atomic:ty, $zeros:expr) => {
        impl Word for $atomic {
            fn zeros(count: usize) -> Box<[Self]> {
                $zeros(count)
            }

            fn load(&self, order: Ordering) -> u64 {
                self.load(order)
            }

            fn swap(&self, value: u64, order: Ordering) -> u64 {
                self.swap(value, order)
            }

            fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
                self.fetch_or(bits, order)
            }
        }
    };
}

// The kernel zeroes the words page by page on the first mark: a machine need not wait for the bitmap of all
// its RAM.
impl_word!(AtomicU64, |count| <[Self]>::new_box_zeroed_with_elems(count).expect("memory for a bitmap"));
#[cfg(test)]
impl_word!(loom::sync::atomic::AtomicU64, |count| (0..count).map(|_| Self::default()).collect());

#[cfg(test)]
mod tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    use super::*;

    /// Two words, and memory that each marker writes before it marks.
    #[derive(Default)]
    struct Guest {
        marks: Marks<AtomicU64>,
        written: [AtomicU64; 2],
    }

    impl Guest {
        fn new() -> Arc<Self> {
            Arc::new(Self { marks: Marks::new(2), ..Self::default() })
        }

        fn write(&self, page: usize, word: usize) {
            self.written[page].store(1, Ordering::Relaxed);
            self.marks.mark(word, 1 << page);
        }

        /// Takes the marks; a taker that receives a page sees what was written to it.
        fn take(&self) -> u64 {
            let mut all = 0;
            self.marks.take(|_, bits| {
                assert_eq!(all & bits, 0);
                all |= bits;
            });
            for (page, written) in self.written.iter().enumerate() {
                if all >> page & 1 == 1 {
                    assert_eq!(written.load(Ordering::Relaxed), 1);
                }
            }
            all
        }
    }

    /// Two writers, of pages of the same word or of two, and a concurrent harvest.
    fn no_mark_is_lost(word_of_second: usize) {
        loom::model(move || {
            let guest = Guest::new();
            let other = thread::spawn({
                let guest = Arc::clone(&guest);
                move || guest.write(1, word_of_second)
            });
            let harvest = thread::spawn({
                let guest = Arc::clone(&guest);
                move || guest.take()
            });
            guest.write(0, 0);
            other.join().unwrap();
            let first = harvest.join().unwrap();
            let second = guest.take();
            assert_eq!((first | second, first & second), (0b11, 0), "each mark is given out once");
            assert_eq!(guest.take(), 0);
        });
    }

    #[test]
    fn no_mark_of_the_same_word_is_lost() {
        no_mark_is_lost(0);
    }

    #[test]
    fn no_mark_of_another_word_is_lost() {
        no_mark_is_lost(1);
    }

    #[test]
    fn what_is_marked_before_a_harvest_is_in_it_whoever_else_marks_the_word() {
        loom::model(|| {
            let guest = Guest::new();
            let other = thread::spawn({
                let guest = Arc::clone(&guest);
                move || guest.write(0, 0)
            });
            let earlier = thread::spawn({
                let guest = Arc::clone(&guest);
                move || guest.take()
            });
            guest.write(1, 0);
            let taken = earlier.join().unwrap() | guest.take();
            assert_eq!(taken & 0b10, 0b10, "the other writer may not have come to its summary bit yet");
            other.join().unwrap();
        });
    }
}
