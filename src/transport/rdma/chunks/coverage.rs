//! Registered pages and dirty chunks as bits, so that neither question needs a walk over all chunks.

use std::collections::VecDeque;
use std::ops::Range;

use super::chunking::Chunking;
use crate::dirty::{DirtyBitmap, STRIPE_PAGES};
use crate::memory::RamLayout;
use crate::transport::rdma::wire::ChunkRange;

/// Pages per bit: a word of the bitmap of dirty pages, 256 KiB of RAM. Every registered part consists of
/// these blocks, or ends with its region.
pub(in crate::transport::rdma) const BLOCK_PAGES: u64 = 64;

/// Blocks in a stripe, and so bits in a word.
const STRIPE_BLOCKS: u64 = STRIPE_PAGES / BLOCK_PAGES;

/// The registered part of RAM: one bit a block for each region, in the shape of the upper level of the bitmap
/// of dirty pages.
#[derive(Debug)]
pub(super) struct Coverage {
    regions: Vec<Vec<u64>>,
}

/// The blocks with dirty pages, in the same shape.
#[derive(Debug, Default)]
pub(super) struct DirtyBlocks {
    regions: Vec<Vec<u64>>,
}

impl DirtyBlocks {
    /// Copies the upper level of the bitmap.
    pub(super) fn copy(&mut self, dirty: &DirtyBitmap) {
        self.regions.resize(dirty.regions().len(), Vec::new());
        for (ours, region) in self.regions.iter_mut().zip(dirty.regions()) {
            ours.clear();
            ours.extend_from_slice(region.nonzero());
        }
    }

    /// Whether any block of a part has a dirty page.
    pub(super) fn any_in(&self, part: ChunkRange) -> bool {
        let Some(words) = self.regions.get(usize::from(part.region)) else { return false };
        masks(blocks_of(part)).any(|(word, mask)| words.get(word).is_some_and(|word| word & mask != 0))
    }
}

impl Coverage {
    /// Nothing is registered.
    pub(super) fn new(layout: &RamLayout) -> Self {
        let words = |pages: u64| usize::try_from(pages.div_ceil(STRIPE_PAGES)).unwrap_or(usize::MAX);
        Self { regions: layout.regions.iter().map(|region| vec![0; words(region.pages())]).collect() }
    }

    /// Records whether the blocks of a range are registered.
    pub(super) fn set(&mut self, range: ChunkRange, registered: bool) {
        let Some(words) = self.regions.get_mut(usize::from(range.region)) else { return };
        for (word, mask) in masks(blocks_of(range)) {
            if let Some(word) = words.get_mut(word) {
                *word = if registered { *word | mask } else { *word & !mask };
            }
        }
    }

    /// How many blocks have dirty pages, and how many of those are not registered.
    pub(super) fn count(&self, dirty: &DirtyBitmap) -> (u64, u64) {
        let (mut needed, mut missing) = (0, 0);
        for (dirty, covered) in dirty.regions().iter().zip(&self.regions) {
            for (dirty, covered) in dirty.nonzero().iter().zip(covered).filter(|(dirty, _)| **dirty != 0) {
                needed += u64::from(dirty.count_ones());
                missing += u64::from((dirty & !covered).count_ones());
            }
        }
        (needed, missing)
    }

    /// The chunks with dirty pages that are not fully registered, in the order of RAM. Reads one word for
    /// each stripe of RAM, and nothing else where all is registered.
    pub(super) fn missing(&self, dirty: &DirtyBitmap, chunking: &Chunking) -> VecDeque<ChunkRange> {
        let mut missing = Missing { chunks: VecDeque::new(), chunking };
        // The first chunks grow up to the largest size; the rest all have it.
        let growing = chunking.chunk_pages().div_ceil(STRIPE_PAGES);
        for (region, (dirty, covered)) in dirty.regions().iter().zip(&self.regions).enumerate() {
            let stripes = usize::try_from(growing).unwrap_or(usize::MAX).min(covered.len());
            let ((first, rest), (first_covered, rest_covered)) =
                (dirty.nonzero().split_at(stripes), covered.split_at(stripes));
            missing.add_chunks(region, 0, (first, first_covered));
            let (first_page, rest) = (growing * STRIPE_PAGES, (rest, rest_covered));
            match chunking.chunk_pages() / STRIPE_PAGES {
                4 => missing.add_largest::<4>(region, first_page, rest),
                2 => missing.add_largest::<2>(region, first_page, rest),
                1 => missing.add_largest::<1>(region, first_page, rest),
                _ => missing.add_chunks(region, first_page, rest),
            }
        }
        missing.chunks
    }
}

/// Chunks that need registration.
struct Missing<'chunking> {
    chunks: VecDeque<ChunkRange>,
    chunking: &'chunking Chunking,
}

impl Missing<'_> {
    /// Adds chunks of `STRIPES` whole stripes each. No branch depends on which chunks are dirty, because no
    /// processor predicts that.
    fn add_largest<const STRIPES: usize>(
        &mut self,
        region: usize,
        first_page: u64,
        (dirty, covered): (&[u64], &[u64]),
    ) {
        let (chunks, end) = dirty.as_chunks::<STRIPES>();
        let (covered_slices, covered_end) = covered.as_chunks::<STRIPES>();
        let groups = chunks.chunks(64).zip(covered_slices.chunks(64));
        for (group, (chunks, covered)) in (0..).zip(groups) {
            let mut missing = 0u64;
            for (index, (dirty, covered)) in chunks.iter().zip(covered).enumerate() {
                let uncovered =
                    dirty.iter().zip(covered).fold(0, |any, (dirty, covered)| any | dirty & !covered);
                missing |= u64::from(uncovered != 0) << index;
            }
            while missing != 0 {
                let chunk = group * 64 + u64::from(missing.trailing_zeros());
                let page = first_page + chunk * self.chunking.chunk_pages();
                self.chunks.extend(self.chunking.range_of(region, page));
                missing &= missing - 1;
            }
        }
        let end_page = first_page + (chunks.len() * STRIPES) as u64 * STRIPE_PAGES;
        self.add_chunks(region, end_page, (end, covered_end));
    }

    /// Adds chunks of any size, of these stripes from `first_page` on.
    fn add_chunks(&mut self, region: usize, first_page: u64, (dirty, covered): (&[u64], &[u64])) {
        for ((stripe, dirty), covered) in (0..).zip(dirty).zip(covered) {
            let uncovered = dirty & !covered;
            if uncovered == 0 {
                continue;
            }
            let first_page = first_page + stripe * STRIPE_PAGES;
            let (first_block, end) = (first_page / BLOCK_PAGES, first_page + STRIPE_PAGES);
            for range in self.chunking.ranges(region, first_page).take_while(|range| range.first_page < end) {
                let blocks = blocks_of(range);
                let in_stripe = blocks.start.max(first_block)..blocks.end.min(first_block + STRIPE_BLOCKS);
                let mask = masks(in_stripe).next().map_or(0, |(_, mask)| mask);
                if uncovered & mask != 0 && self.chunks.back() != Some(&range) {
                    self.chunks.push_back(range);
                }
            }
        }
    }
}

/// The blocks of a range, counted from the start of its region.
pub(super) fn blocks_of(range: ChunkRange) -> Range<u64> {
    range.first_page / BLOCK_PAGES..(range.first_page + range.pages).div_ceil(BLOCK_PAGES)
}

/// The words that contain the bits of some blocks, and a mask of those bits in each.
fn masks(blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        let first = Some(next).filter(|&first| first < blocks.end)?;
        let stop = blocks.end.min((first / STRIPE_BLOCKS + 1) * STRIPE_BLOCKS);
        next = stop;
        let mask = u64::MAX << (first % STRIPE_BLOCKS) & u64::MAX >> (63 - (stop - 1) % STRIPE_BLOCKS);
        Some((usize::try_from(first / STRIPE_BLOCKS).ok()?, mask))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{PAGE_BYTES, RegionLayout};

    /// A few pages of two regions: in the first small chunks, where chunks are larger than a stripe, and in
    /// the last.
    fn pages() -> impl Strategy<Value = Vec<(usize, u64)>> {
        let page = prop_oneof![0..9000u64, 16_000..17_000u64, 60_000..70_123u64];
        prop::collection::vec((0..2usize, page), 0..40)
    }

    proptest! {
        /// Under any budget a chunk is needed if it contains a dirty page, and its missing part is the blocks
        /// of such pages that are not registered.
        #[test]
        fn slices_are_missing_that_have_dirty_pages_which_are_not_registered(
            dirty in pages(),
            registered in pages(),
            gone in pages(),
            budget_mib in prop_oneof![Just(None), Just(Some(1u64)), Just(Some(40))],
        ) {
            let region = |(guest_address, pages): (u64, u64)| {
                RegionLayout { guest_address, len_bytes: pages * PAGE_BYTES }
            };
            let layout = RamLayout { regions: [(0, 70_123), (1 << 40, 9000)].map(region).to_vec() };
            let chunking = Chunking::new(layout.clone(), 1, budget_mib.map(|mib| mib << 20));
            let (mut bitmap, mut coverage) = (DirtyBitmap::new(&layout), Coverage::new(&layout));
            let is_in_ram = |&&(region, page): &&(usize, u64)| chunking.range_of(region, page).is_some();
            for &(region, page) in dirty.iter().filter(is_in_ram) {
                bitmap.regions_mut()[region].mark(page..page + 1);
            }
            for (pages, set) in [(&registered, true), (&gone, false)] {
                for &(region, page) in pages.iter().filter(is_in_ram) {
                    coverage.set(chunking.range_of(region, page).expect("it is in RAM"), set);
                }
            }
            let chunk_of = |&(region, page): &(usize, u64)| chunking.range_of(region, page);
            let here: Vec<_> = registered.iter().filter_map(chunk_of).collect();
            let gone: Vec<_> = gone.iter().filter_map(chunk_of).collect();
            let mut needed: Vec<_> = dirty.iter().filter_map(chunk_of).collect();
            needed.sort_unstable_by_key(|range| (range.region, range.first_page));
            needed.dedup();
            needed.retain(|range| !here.contains(range) || gone.contains(range));
            prop_assert_eq!(coverage.missing(&bitmap, &chunking), needed);
        }
    }
}
