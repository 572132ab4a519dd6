//! From the words of a bitmap to the runs of its set bits.

mod edges;
mod sparse;

use std::slice;

pub use self::edges::RunEdges;
use self::sparse::{SparseRuns, nonzero};

/// The runs of set bits in a bitmap, in order: joined across words, without a step for each bit. Yields
/// `(first, count)` in bits from the start of the words.
#[derive(Clone, Debug)]
pub struct Runs<'words>(Ways<'words>);

/// The cheapest way depends on how many words are not zero.
#[derive(Clone, Debug)]
enum Ways<'words> {
    Sparse(SparseRuns<'words>),
    Dense(slice::Iter<'words, [u16; 2]>),
}

impl<'words> Runs<'words> {
    /// The runs of `words`, bit 0 of word 0 being page 0 (the layout of `KVM_GET_DIRTY_LOG`).
    #[must_use]
    pub fn new(words: &'words [u64]) -> Self {
        Self(Ways::Sparse(SparseRuns::new(words, nonzero(words))))
    }

    /// The runs of a stripe's words; the words set in `nonzero` are not zero.
    pub(crate) fn of_stripe(words: &'words [u64], nonzero: u64, edges: &'words mut RunEdges) -> Self {
        Self(if nonzero.count_ones() as usize * 2 > words.len() {
            Ways::Dense(edges.find(words).iter())
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
            Ways::Dense(edges) => edges.next().map(run),
        }
    }

    #[inline]
    fn fold<B, F: FnMut(B, (u64, u64)) -> B>(self, init: B, f: F) -> B {
        match self.0 {
            Ways::Sparse(runs) => runs.fold(init, f),
            Ways::Dense(edges) => edges.map(run).fold(init, f),
        }
    }
}

/// Converts the begin and end of a run to its begin and length.
fn run(&[begin, end]: &[u16; 2]) -> (u64, u64) {
    (begin.into(), (end - begin).into())
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

    /// As many edges as bits.
    const EVERY_SECOND: u64 = u64::MAX / 3;

    #[test]
    fn every_second_page_is_a_run() {
        let words = [EVERY_SECOND << 1; 64];
        let runs: Vec<_> = Runs::of_stripe(&words, u64::MAX, &mut RunEdges::default()).collect();
        assert_eq!(runs, (0..2048).map(|run| (run * 2 + 1, 1)).collect::<Vec<_>>());
    }

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(u64::MAX),
            Just(EVERY_SECOND),
            any::<u64>(),
            // One bit in eight.
            any::<[u64; 3]>().prop_map(|[a, b, c]| a & b & c),
            (0..64u32).prop_map(|n| u64::MAX << n),
        ]
    }

    proptest! {
        #[test]
        fn runs_are_those_of_a_bit_by_bit_walk(words in prop::collection::vec(word(), 0..150)) {
            prop_assert_eq!(Runs::new(&words).collect::<Vec<_>>(), naive(&words));
        }

        /// The same runs, whether few words are zero or many.
        #[test]
        fn so_are_those_of_a_stripe(
            words in prop::collection::vec(word(), 0..=64),
            clear in prop_oneof![Just(0), any::<u64>()],
        ) {
            let words: Vec<_> =
                words.iter().enumerate().map(|(index, &word)| if clear >> index & 1 == 1 { 0 } else { word }).collect();
            let mut edges = RunEdges::default();
            // Old content of the buffer does not matter.
            edges.find(&[EVERY_SECOND; 64]);
            let runs = Runs::of_stripe(&words, nonzero(&words), &mut edges);
            prop_assert_eq!(runs.clone().collect::<Vec<_>>(), naive(&words));
            prop_assert_eq!(runs.count(), naive(&words).len());
        }
    }
}
