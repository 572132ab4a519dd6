use crate::memory::{RamLayout, RegionLayout};

/// Pages in a stripe: 4 MiB of guest RAM.
///
/// Small enough that a 16 MiB guest keeps four lanes busy and that the pages of a stripe are read soon after they are
/// rearmed, so few are written again in between; large enough that `KVM_CLEAR_DIRTY_LOG` is called rarely.
pub const STRIPE_PAGES: u64 = 1024;

/// A piece of guest RAM that always travels on the same lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Index of the region.
    pub region: usize,
    /// First page, counted from the region's start. A multiple of [`STRIPE_PAGES`].
    pub first_page: u64,
    /// How many pages: [`STRIPE_PAGES`], or fewer at the region's end.
    pub pages: u64,
}

impl Stripe {
    /// The stripe's words in the bitmap of its region.
    #[must_use]
    pub fn words<'bitmap>(&self, region: &'bitmap [u64]) -> &'bitmap [u64] {
        let first = usize::try_from(self.first_page / 64).unwrap_or(usize::MAX);
        let count = usize::try_from(self.pages.div_ceil(64)).unwrap_or(usize::MAX);
        &region[first..first + count]
    }
}

/// The stripes of all of guest RAM, dealt out to the lanes in turn.
///
/// Shard = lane: the worker that scans a stripe's bits is the one that sends its pages. A page therefore always travels on
/// one lane, whose order makes the latest write win.
#[derive(Clone, Debug)]
pub struct Stripes {
    regions: Vec<RegionLayout>,
    lanes: usize,
}

impl Stripes {
    /// Stripes for the layout over `lanes` lanes, at least one.
    #[must_use]
    pub fn new(layout: &RamLayout, lanes: usize) -> Self {
        Self { regions: layout.regions.clone(), lanes: lanes.max(1) }
    }

    /// The stripes of one lane, in ascending order.
    pub fn of_lane(&self, lane: usize) -> impl Iterator<Item = Stripe> {
        // How far the turn has gone before a region: its first stripe is the turn of that lane.
        let mut turn = 0;
        self.regions.iter().enumerate().flat_map(move |(region, layout)| {
            let pages = layout.pages();
            let stripes = pages.div_ceil(STRIPE_PAGES);
            let lanes = self.lanes as u64;
            let first = (lane as u64 + lanes - turn) % lanes;
            turn = (turn + stripes) % lanes;
            (first..stripes).step_by(self.lanes).map(move |stripe| {
                let first_page = stripe * STRIPE_PAGES;
                Stripe { region, first_page, pages: STRIPE_PAGES.min(pages - first_page) }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dirty::DirtyBitmap;
    use crate::memory::Runs;

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
                bitmap.words_mut(region)[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
            }
            let stripes = Stripes::new(&layout, lanes);
            let mut found = Vec::new();
            for lane in 0..lanes {
                for stripe in stripes.of_lane(lane) {
                    for (first, count) in Runs::new(stripe.words(bitmap.words(stripe.region))) {
                        found.extend((first..first + count).map(|page| (stripe.region, stripe.first_page + page)));
                    }
                }
            }
            found.sort_unstable();
            prop_assert_eq!(found, dirty.into_iter().collect::<Vec<_>>());
        }
    }
}
