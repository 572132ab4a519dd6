use crate::memory::{PAGE_BYTES, RamLayout, RegionLayout};
use crate::transport::rdma::wire::ChunkRange;

/// Pages in the largest chunks, without a budget: 64 MiB. Many small ones are slow to register.
pub(super) const CHUNK_PAGES: u64 = 16_384;

/// The smallest chunk under any budget, and the first of each region: 4 MiB, which a lane clears at once in a
/// full stripe.
pub(in crate::transport::rdma) const CHUNK_BYTES_MIN: u64 = 4 << 20;

const CHUNK_PAGES_MIN: u64 = CHUNK_BYTES_MIN / PAGE_BYTES;

/// The division of guest RAM into chunks.
///
/// The first chunk of a region has the smallest size, so that it is soon ready and the first page leaves.
/// Each later one is as large as all before it together, up to the largest size: 4, 4, 8, 16, 32, and then 64
/// MiB each.
#[derive(Debug)]
pub(super) struct Chunking {
    layout: RamLayout,
    /// Of the largest: a power of two.
    chunk_pages: u64,
}

impl Chunking {
    /// For this many lanes: if the budget is small, chunks are so small that every lane can hold one while
    /// two more are registered.
    pub(super) fn new(layout: RamLayout, lanes: usize, budget_bytes: Option<u64>) -> Self {
        Self { layout, chunk_pages: chunk_pages(lanes, budget_bytes) }
    }

    /// Pages in the largest chunks.
    pub(super) fn chunk_pages(&self) -> u64 {
        self.chunk_pages
    }

    /// The chunk that contains a page; `None` outside of RAM.
    pub(super) fn range_of(&self, region: usize, page: u64) -> Option<ChunkRange> {
        let pages = self.layout.regions.get(region)?.pages();
        let (first_page, len) = if page >= self.chunk_pages {
            (page - page % self.chunk_pages, self.chunk_pages)
        } else if page < CHUNK_PAGES_MIN {
            (0, CHUNK_PAGES_MIN)
        } else {
            let power = 1 << page.ilog2();
            (power, power)
        };
        let pages = pages.checked_sub(page).filter(|&left| left > 0).map(|_| len.min(pages - first_page))?;
        Some(ChunkRange { region: u16::try_from(region).ok()?, first_page, pages })
    }

    /// Which chunk of its region has a page, counted from 0: also of a page behind the region's end.
    pub(super) fn number_of(&self, page: u64) -> usize {
        let first = CHUNK_PAGES_MIN.ilog2();
        let number = if page < CHUNK_PAGES_MIN {
            0
        } else if page < self.chunk_pages {
            (page.ilog2() - first + 1).into()
        } else {
            u64::from(self.chunk_pages.ilog2() - first) + page / self.chunk_pages
        };
        usize::try_from(number).unwrap_or(usize::MAX)
    }

    /// How many chunks each region has.
    pub(super) fn counts(&self) -> impl Iterator<Item = usize> {
        let last_page = |region: &RegionLayout| region.pages().checked_sub(1);
        self.layout
            .regions
            .iter()
            .map(move |region| last_page(region).map_or(0, |page| self.number_of(page) + 1))
    }

    /// The chunks of a region from the one on in which a page lies, in order.
    pub(super) fn ranges(&self, region: usize, page: u64) -> impl Iterator<Item = ChunkRange> {
        let next = move |range: &ChunkRange| self.range_of(region, range.first_page + range.pages);
        std::iter::successors(self.range_of(region, page), next)
    }
}

fn chunk_pages(lanes: usize, budget_bytes: Option<u64>) -> u64 {
    let Some(budget_bytes) = budget_bytes else { return CHUNK_PAGES };
    let share_pages = budget_bytes / (lanes as u64 + 2) / PAGE_BYTES;
    let power = share_pages.checked_ilog2().map_or(1, |log| 1 << log);
    power.clamp(CHUNK_PAGES_MIN, CHUNK_PAGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn chunking(region_pages: u64, budget_bytes: Option<u64>) -> Chunking {
        let region = RegionLayout { guest_address: 0, len_bytes: region_pages * PAGE_BYTES };
        Chunking::new(RamLayout { regions: vec![region] }, 1, budget_bytes)
    }

    #[test]
    fn slices_grow_up_to_the_largest() {
        let mib = |range: ChunkRange| range.pages * PAGE_BYTES / MIB;
        let sizes = |budget_bytes| {
            chunking(160 * MIB / PAGE_BYTES, budget_bytes).ranges(0, 0).map(mib).collect::<Vec<_>>()
        };
        assert_eq!(sizes(None), [4, 4, 8, 16, 32, 64, 32]);
        assert_eq!(sizes(Some(48 * MIB)), [4, 4, 8, 16, 16, 16, 16, 16, 16, 16, 16, 16]);
        assert_eq!(sizes(Some(5 * MIB)), [4; 40]);
    }

    #[test]
    fn slices_lie_side_by_side_and_are_found_by_any_of_their_pages() {
        for region_pages in [1, 1023, 1024, 1025, 5000, CHUNK_PAGES, CHUNK_PAGES + 1, 5 * CHUNK_PAGES + 7] {
            for budget_bytes in [None, Some(40 * MIB), Some(4 * MIB)] {
                let chunking = chunking(region_pages, budget_bytes);
                let mut next_page = 0;
                assert_eq!(chunking.counts().collect::<Vec<_>>(), [chunking.ranges(0, 0).count()]);
                for (number, range) in chunking.ranges(0, 0).enumerate() {
                    assert_eq!(range.first_page, next_page);
                    next_page += range.pages;
                    for page in [range.first_page, range.first_page + range.pages / 2, next_page - 1] {
                        assert_eq!(chunking.range_of(0, page), Some(range), "{page}");
                        assert_eq!(chunking.number_of(page), number, "{page}");
                    }
                    let ends = next_page == region_pages;
                    assert!(ends || range.pages >= CHUNK_PAGES_MIN, "a destination grants no smaller one");
                }
                assert_eq!(next_page, region_pages);
            }
        }
    }

    #[test]
    fn pages_outside_of_ram_are_in_no_slice() {
        let chunking = chunking(256, None);
        assert_eq!(chunking.range_of(0, 255), Some(ChunkRange { region: 0, first_page: 0, pages: 256 }));
        for (region, page) in [(0, 256), (0, CHUNK_PAGES), (1, 0), (0, u64::MAX)] {
            assert_eq!(chunking.range_of(region, page), None, "{region} {page}");
        }
    }

    #[test]
    fn a_small_budget_makes_small_slices_so_that_each_lane_can_hold_one() {
        assert_eq!(chunk_pages(4, None), CHUNK_PAGES);
        assert_eq!(chunk_pages(4, Some(1 << 40)), CHUNK_PAGES);
        assert_eq!(chunk_pages(4, Some(100 * MIB)), 16 * MIB / PAGE_BYTES);
        assert_eq!(chunk_pages(4, Some(5 * MIB)), CHUNK_PAGES_MIN);
    }
}
