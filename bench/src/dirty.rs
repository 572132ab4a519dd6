//! Generated dirty bitmaps for the benchmarks: the same in every run.

use std::fmt;

use sterna::dirty::{DirtyBitmap, DirtyRegion};
use sterna::memory::{RamLayout, RegionLayout};

/// The number of dirty pages and their distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Dirty pages in a thousand.
    pub per_mille: u64,
    /// Whether they come in runs of 64 pages on average. Otherwise each page is dirty by itself.
    pub clustered: bool,
}

impl Pattern {
    /// Scattered pages.
    #[must_use]
    pub const fn random(per_mille: u64) -> Self {
        Self { per_mille, clustered: false }
    }

    /// Runs of pages.
    #[must_use]
    pub const fn clustered(per_mille: u64) -> Self {
        Self { per_mille, clustered: true }
    }

    /// A bitmap of this pattern for RAM of one region.
    #[must_use]
    pub fn bitmap(self, ram_bytes: u64) -> DirtyBitmap {
        let regions = vec![RegionLayout { guest_address: 0, len_bytes: ram_bytes }];
        let mut bitmap = DirtyBitmap::new(&RamLayout { regions });
        // Written in any case: untouched memory is one page of zeros, which fits any cache.
        bitmap.fill();
        if self.per_mille < 1000 {
            bitmap.clear();
        }
        match self.per_mille {
            0 | 1000.. => {}
            _ => self.fill(&mut bitmap.regions_mut()[0]),
        }
        bitmap
    }

    /// Walks through the pages and changes between clean and dirty with the probabilities that give the
    /// density and the mean length of a run.
    fn fill(self, region: &mut DirtyRegion) {
        const ONE: u64 = 1 << 32;
        let begins = if self.clustered {
            ONE * self.per_mille / (1000 - self.per_mille) / 64
        } else {
            ONE * self.per_mille / 1000
        };
        let goes_on = if self.clustered { ONE / 64 * 63 } else { begins };
        let mut random = Random::default();
        let mut dirty = false;
        for word in 0..region.words().len() {
            let bits = (0..64).fold(0, |bits, page| {
                dirty = random.next() >> 32 < if dirty { goes_on } else { begins };
                bits | u64::from(dirty) << page
            });
            region.mark_word(word, bits);
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lie = match (self.per_mille, self.clustered) {
            (0 | 1000.., _) => "",
            (_, true) => " clustered",
            (_, false) => " random",
        };
        match (self.per_mille / 10, self.per_mille % 10) {
            (percent, 0) => write!(formatter, "{percent} %{lie}"),
            (percent, tenth) => write!(formatter, "{percent}.{tenth} %{lie}"),
        }
    }
}

/// Marsaglia's xorshift64*, always from the same seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[cfg(test)]
mod tests {
    use sterna::memory::Runs;

    use super::*;

    #[test]
    fn a_bitmap_has_the_density_and_the_runs_that_its_pattern_says() {
        const PAGES: u64 = 1 << 20;
        for per_mille in [1, 10, 100, 500] {
            for pattern in [Pattern::random(per_mille), Pattern::clustered(per_mille)] {
                let bitmap = pattern.bitmap(PAGES * 4096);
                let (pages, runs) = (bitmap.count(), Runs::new(bitmap.regions()[0].words()).count() as u64);
                let expected = PAGES * per_mille / 1000;
                assert!((expected / 2..expected * 2).contains(&pages), "{pattern}: {pages} of {expected}");
                let mean = pages / runs;
                let bounds = if pattern.clustered { 32..128 } else { 1..3 };
                assert!(bounds.contains(&mean), "{pattern}: runs of {mean}");
            }
        }
        assert_eq!(Pattern::random(0).bitmap(PAGES * 4096).count(), 0);
        assert_eq!(Pattern::random(1000).bitmap(PAGES * 4096).count(), PAGES);
    }

    #[test]
    fn patterns_are_named_as_percentages() {
        assert_eq!(Pattern::random(1).to_string(), "0.1 % random");
        assert_eq!(Pattern::clustered(500).to_string(), "50 % clustered");
        assert_eq!(Pattern::random(1000).to_string(), "100 %");
    }
}
