//! The stripes of guest RAM, assigned to lanes.

use super::bitmap::DirtyBitmap;
use super::prefetch::{prefetch, prefetch_nonzero};
use super::region::DirtyRegion;
use super::stripe::{STRIPE_PAGES, STRIPE_WORDS, Stripe};

/// The stripes of all of guest RAM, assigned to the lanes in turn.
///
/// A shard is a lane: the worker that scans a stripe's bits also sends its pages. So a page always travels on
/// the same lane, and the order of the lane makes the latest write win.
#[derive(Clone, Copy, Debug)]
pub struct Stripes {
    lanes: usize,
}

impl Stripes {
    /// Stripes over `lanes` lanes, at least one.
    #[must_use]
    pub fn new(lanes: usize) -> Self {
        Self { lanes: lanes.max(1) }
    }

    /// The stripes of one lane that have dirty pages, in ascending order.
    pub fn of_lane<'bitmap>(
        &self,
        lane: usize,
        dirty: &'bitmap DirtyBitmap,
    ) -> impl Iterator<Item = Stripe<'bitmap>> {
        let lanes = self.lanes;
        // The lane of the next region's first stripe.
        let mut turn = 0;
        dirty.regions().iter().enumerate().flat_map(move |(region, dirty)| {
            let first = (lane + lanes - turn) % lanes;
            turn = (turn + dirty.nonzero().len()) % lanes;
            let stripe = move |(index, nonzero)| {
                let first_page = index as u64 * STRIPE_PAGES;
                Stripe { region, first_page, words: words_of(dirty.words(), index), nonzero }
            };
            DirtyStripes::new(dirty, first, lanes).map(stripe)
        })
    }
}

/// The words of a stripe.
fn words_of(words: &[u64], stripe: usize) -> &[u64] {
    let words = &words[stripe * STRIPE_WORDS..];
    &words[..words.len().min(STRIPE_WORDS)]
}

/// How many dirty stripes of its own a lane prefetches ahead: enough to cover the latency of memory, and few
/// enough to stay in the cache. A power of two.
const AHEAD: usize = 16;

/// The indices of a lane's dirty stripes in one region, with the words of each that are not zero.
struct DirtyStripes<'bitmap> {
    words: &'bitmap [u64],
    nonzero: &'bitmap [u64],
    lanes: usize,
    /// The next stripe to look at.
    next: usize,
    /// The dirty stripes that are on their way into the cache, each at its number modulo [`AHEAD`].
    coming: [usize; AHEAD],
    /// How many dirty stripes were found, and how many of them were returned.
    found: usize,
    returned: usize,
}

impl<'bitmap> DirtyStripes<'bitmap> {
    fn new(dirty: &'bitmap DirtyRegion, first: usize, lanes: usize) -> Self {
        let (words, nonzero) = (dirty.words(), dirty.nonzero());
        Self { words, nonzero, lanes, next: first, coming: [0; AHEAD], found: 0, returned: 0 }
    }

    /// Finds dirty stripes until enough are coming, and prefetches each.
    ///
    /// Dirty words are too irregular for the hardware prefetcher, and waiting for memory at each costs three
    /// times as much as the scan. The stripes of a single lane are adjacent, and reading all of their words
    /// in order keeps the hardware prefetcher going. With several lanes that would fetch the stripes of other
    /// lanes too, so each lane prefetches only the lines that it needs.
    fn look_ahead(&mut self) {
        while self.found - self.returned < AHEAD {
            let stripe = self.next;
            let Some(&nonzero) = self.nonzero.get(stripe) else { return };
            self.next += self.lanes;
            if nonzero != 0 {
                let words = words_of(self.words, stripe);
                if self.lanes == 1 {
                    prefetch(words);
                } else {
                    prefetch_nonzero(words, nonzero);
                }
                self.coming[self.found % AHEAD] = stripe;
                self.found += 1;
            }
        }
    }
}

impl Iterator for DirtyStripes<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<(usize, u64)> {
        self.look_ahead();
        if self.returned == self.found {
            return None;
        }
        let stripe = self.coming[self.returned % AHEAD];
        self.returned += 1;
        Some((stripe, self.nonzero[stripe]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{RamLayout, RegionLayout, RunEdges};

    fn layout(pages: &[u64]) -> RamLayout {
        let mut guest_address = 0;
        let mut regions = Vec::new();
        for &pages in pages {
            regions.push(RegionLayout { guest_address, len_bytes: pages * 4096 });
            guest_address += pages * 4096;
        }
        RamLayout { regions }
    }

    proptest! {
        /// Sharded over any number of lanes, the scan finds exactly the set bits, each once.
        #[test]
        fn the_lanes_together_find_exactly_the_dirty_pages(
            pages in prop::collection::vec(1..5000u64, 1..4),
            lanes in 1..9usize,
            dirty in prop::collection::btree_set((0..4usize, 0..5000u64), 0..200),
        ) {
            let layout = layout(&pages);
            let dirty: std::collections::BTreeSet<_> =
                dirty.into_iter().filter(|&(region, page)| pages.get(region).is_some_and(|&n| page < n)).collect();
            let mut bitmap = DirtyBitmap::new(&layout);
            for &(region, page) in &dirty {
                bitmap.regions_mut()[region].mark(page..page + 1);
            }
            let stripes = Stripes::new(lanes);
            let (mut found, mut edges) = (Vec::new(), RunEdges::default());
            for lane in 0..lanes {
                for stripe in stripes.of_lane(lane, &bitmap) {
                    let before: u64 = pages[..stripe.region].iter().map(|pages| pages.div_ceil(STRIPE_PAGES)).sum();
                    prop_assert_eq!((before + stripe.first_page / STRIPE_PAGES) % lanes as u64, lane as u64);
                    let len = (pages[stripe.region] - stripe.first_page).min(STRIPE_PAGES);
                    prop_assert_eq!(stripe.words.len() as u64, len.div_ceil(64));
                    for part in stripe.parts() {
                        let len = (pages[part.region] - part.first_page).min(part.words.len() as u64 * 64);
                        for (first, count) in part.runs(&mut edges) {
                            prop_assert!(count > 0 && first + count <= len);
                            found.extend((first..first + count).map(|page| (part.region, part.first_page + page)));
                        }
                    }
                }
            }
            found.sort_unstable();
            prop_assert_eq!(found, dirty.into_iter().collect::<Vec<_>>());
        }
    }
}
