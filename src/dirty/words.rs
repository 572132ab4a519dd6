use std::fmt;
use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut, MmapOptions};
use zerocopy::FromBytes;

/// The words of a bitmap, zero at first.
///
/// A large bitmap lies in huge pages where the kernel has some. The bitmap of 1 TiB of RAM takes 8,192 pages,
/// and a scan that reads a few words of each page waits longer for address translation than for the words.
/// Its pages are allocated at once: the first round marks all of them, and a page fault for each takes
/// longer.
pub(super) enum Words {
    Few(Vec<u64>),
    Many(MmapMut),
}

/// The number of words that fill 16 pages.
const MANY: usize = (64 << 10) / size_of::<u64>();

impl Words {
    pub(super) fn zeroed(len: usize) -> Self {
        if len < MANY {
            return Self::Few(vec![0; len]);
        }
        // The kernel aligns a mapping of this length to huge pages.
        let bytes = len * size_of::<u64>();
        let mapping = MmapOptions::new().len(bytes).map_anon().inspect(|mapping| {
            // Without these, the bitmap is only slower; the second needs Linux 5.14.
            let _ = mapping.advise(Advice::HugePage);
            let _ = mapping.advise(Advice::PopulateWrite);
        });
        mapping.map_or_else(|_| Self::Few(vec![0; len]), Self::Many)
    }
}

impl Deref for Words {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        match self {
            Self::Few(words) => words,
            Self::Many(mapping) => <[u64]>::ref_from_bytes(mapping).unwrap_or_default(),
        }
    }
}

impl DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u64] {
        match self {
            Self::Few(words) => words,
            Self::Many(mapping) => <[u64]>::mut_from_bytes(mapping).unwrap_or_default(),
        }
    }
}

impl Clone for Words {
    fn clone(&self) -> Self {
        let mut words = Self::zeroed(self.len());
        words.copy_from_slice(self);
        words
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_words_are_zero_at_first_and_can_be_written_and_copied() {
        for len in [0, 1, MANY - 1, MANY, MANY + 1] {
            let mut words = Words::zeroed(len);
            assert_eq!(matches!(words, Words::Many(_)), len >= MANY);
            assert_eq!(words.len(), len);
            assert!(words.iter().all(|&word| word == 0));
            if let Some(last) = words.last_mut() {
                *last = 7;
                let copy = words.clone();
                words[len - 1] = 8;
                assert_eq!((copy.last(), words.last()), (Some(&7), Some(&8)));
            }
        }
    }
}
