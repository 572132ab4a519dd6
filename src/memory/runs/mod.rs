//! From the words of a bitmap to the runs of its set bits.

mod dense;
mod sparse;

use self::dense::DenseRuns;
use self::sparse::SparseRuns;

/// The runs of set bits in a bitmap, in order: joined across words, never a step per bit. Yields `(first, count)` in bits from the
/// start of the words.
#[derive(Clone, Debug)]
pub struct Runs<'bitmap>(Ways<'bitmap>);

/// What costs least depends on how many words have something in them.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "made on the stack, one at a time, and never moved")]
enum Ways<'bitmap> {
    Sparse(SparseRuns<'bitmap>),
    Dense(DenseRuns<'bitmap>),
}

impl<'bitmap> Runs<'bitmap> {
    /// The runs of `words`, bit 0 of word 0 being page 0 (the layout of `KVM_GET_DIRTY_LOG`).
    #[must_use]
    pub fn new(words: &'bitmap [u64]) -> Self {
        Self(Ways::Sparse(SparseRuns::new(words, nonzero(words))))
    }

    /// The runs of at most 64 words, of which those set in `nonzero` are not zero.
    pub(crate) fn of_block(words: &'bitmap [u64], nonzero: u64) -> Self {
        debug_assert!(words.len() <= 64);
        Self(if nonzero.count_ones() as usize * 2 > words.len() {
            Ways::Dense(DenseRuns::new(words))
        } else {
            Ways::Sparse(SparseRuns::new(words, nonzero))
        })
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        match &mut self.0 {
            Ways::Sparse(runs) => runs.next(),
            Ways::Dense(runs) => runs.next(),
        }
    }

    #[inline]
    fn fold<B, F: FnMut(B, (u64, u64)) -> B>(self, init: B, f: F) -> B {
        match self.0 {
            Ways::Sparse(runs) => runs.fold(init, f),
            Ways::Dense(runs) => runs.fold(init, f),
        }
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

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64u32).prop_map(|n| u64::MAX << n)]
    }

    proptest! {
        #[test]
        fn runs_are_those_of_a_bit_by_bit_walk(words in prop::collection::vec(word(), 0..150)) {
            prop_assert_eq!(Runs::new(&words).collect::<Vec<_>>(), naive(&words));
        }

        /// Whether few words have something in them or many.
        #[test]
        fn so_are_those_of_a_block(
            words in prop::collection::vec(word(), 0..=64),
            clear in prop_oneof![Just(0), any::<u64>()],
        ) {
            let words: Vec<_> =
                words.iter().enumerate().map(|(index, &word)| if clear >> index & 1 == 1 { 0 } else { word }).collect();
            let runs = Runs::of_block(&words, nonzero(&words));
            prop_assert_eq!(runs.clone().collect::<Vec<_>>(), naive(&words));
            prop_assert_eq!(runs.count(), naive(&words).len());
        }
    }
}
