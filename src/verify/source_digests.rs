use std::time::Duration;

use super::Verify;
use crate::digest::{self, BLOCK_PAGES, Digest};
use crate::dirty::{DirtyBitmap, STRIPE_PAGES};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES, PageRun, RamLayout};
use crate::wire::BlockDigest;

/// How often blocks are hashed while the guest runs, at most: each pass costs another round.
const PASSES_MAX: u32 = 3;

/// The blocks of which the destination has a current digest: according to the dirty log, they were not
/// written to since they were hashed.
///
/// Without comparing it has no blocks, and costs nothing.
#[derive(Debug)]
pub(crate) struct SourceDigests {
    blocks: Vec<PageRun>,
    /// For each region, the index of its first block and a byte for each stripe, with a bit for each block of
    /// the stripe.
    settled: Vec<(usize, Vec<u8>)>,
    passes: u32,
    /// Sum of all passes so far.
    hashed_bytes: u64,
    hashing: Duration,
}

/// Blocks in a stripe of RAM: each has eight words of the stripe's bitmap.
const STRIPE_BLOCKS: u64 = STRIPE_PAGES / BLOCK_PAGES;
const _: () = assert!(STRIPE_BLOCKS == 8 && BLOCK_PAGES == 8 * 64);

impl SourceDigests {
    pub(crate) fn new(layout: &RamLayout, verify: Verify) -> Self {
        let (mut blocks, mut settled) = (Vec::new(), Vec::new());
        if verify != Verify::Off {
            blocks = digest::blocks(layout);
            let mut first = 0;
            for region in &layout.regions {
                let count = usize::try_from(region.pages().div_ceil(BLOCK_PAGES)).unwrap_or(usize::MAX);
                settled.push((first, vec![0; count.div_ceil(8)]));
                first += count;
            }
        }
        Self { blocks, settled, passes: 0, hashed_bytes: 0, hashing: Duration::ZERO }
    }

    /// The number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks worth hashing while the guest runs: blocks that are not settled and have no `dirty` page.
    /// All pages of such a block are watched, so a later write is in the next harvest.
    ///
    /// Empty after enough passes: a further pass must at least halve what would be left for the pause.
    pub(crate) fn worth_hashing(&self, dirty: &DirtyBitmap) -> Vec<usize> {
        let unsettled = self.unsettled();
        let unsettled_count = unsettled.len();
        let clean: Vec<_> =
            unsettled.into_iter().filter(|&index| !is_dirty(dirty, self.blocks[index])).collect();
        let worth = self.passes == 0 || self.passes < PASSES_MAX && clean.len() * 2 >= unsettled_count;
        if worth { clean } else { Vec::new() }
    }

    /// The digests of some blocks, computed by all workers of the current pool.
    pub(crate) fn hash(&self, ram: &GuestRam, indices: &[usize]) -> Result<Vec<BlockDigest>, MemoryError> {
        let blocks: Vec<_> = indices.iter().map(|&index| self.blocks[index]).collect();
        let digests: Vec<Digest> = digest::digests(ram, &blocks)?;
        let block = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
        Ok(indices
            .iter()
            .zip(digests)
            .map(|(&index, digest)| BlockDigest { block: block(index), digest })
            .collect())
    }

    /// Marks blocks as settled: they were hashed after the last harvest, and the destination has their
    /// digests.
    pub(crate) fn settle(&mut self, indices: &[usize], took: Duration) {
        self.passes += 1;
        self.hashing += took;
        for &index in indices {
            let block = self.blocks[index];
            let (stripe, bit) = place_of(block);
            self.settled[block.region].1[stripe] |= bit;
            self.hashed_bytes += block.pages * PAGE_BYTES;
        }
    }

    /// Unsettles the blocks that a harvest found written to, at the cost of a word for each stripe of RAM;
    /// free before the first pass.
    pub(crate) fn harvested(&mut self, dirty: &DirtyBitmap) {
        if self.passes == 0 {
            return;
        }
        for ((_, settled), dirty) in self.settled.iter_mut().zip(dirty.regions()) {
            for (settled, &nonzero) in settled.iter_mut().zip(dirty.nonzero()) {
                if nonzero != 0 {
                    *settled &= !dirty_blocks(nonzero);
                }
            }
        }
    }

    /// The blocks that remain to be hashed.
    pub(crate) fn unsettled(&self) -> Vec<usize> {
        let mut unsettled = Vec::new();
        for (region, (first, settled)) in self.settled.iter().enumerate() {
            let end = self.settled.get(region + 1).map_or(self.blocks.len(), |&(next, _)| next);
            for (block, settled) in (*first..).step_by(8).zip(settled) {
                if *settled != u8::MAX {
                    let left =
                        (block..end.min(block + 8)).filter(|index| settled >> (index - block) & 1 == 0);
                    unsettled.extend(left);
                }
            }
        }
        unsettled
    }

    /// How long hashing the remaining blocks would take, at one end after the other; zero until a pass has
    /// measured the speed.
    pub(crate) fn rest_takes(&self) -> Duration {
        let rest = self.unsettled().iter().map(|&index| self.blocks[index].pages * PAGE_BYTES).sum::<u64>();
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let share = if self.hashed_bytes == 0 { 0.0 } else { rest as f64 / self.hashed_bytes as f64 };
        // In a pass both ends hash at the same time.
        Duration::try_from_secs_f64(2.0 * share * self.hashing.as_secs_f64()).unwrap_or(Duration::MAX)
    }
}

/// The stripe of a block, and its bit in the stripe.
fn place_of(block: PageRun) -> (usize, u8) {
    let stripe = usize::try_from(block.first_page / STRIPE_PAGES).unwrap_or(usize::MAX);
    (stripe, 1 << (block.first_page / BLOCK_PAGES % STRIPE_BLOCKS))
}

fn is_dirty(dirty: &DirtyBitmap, block: PageRun) -> bool {
    let (stripe, bit) = place_of(block);
    dirty.regions()[block.region]
        .nonzero()
        .get(stripe)
        .is_some_and(|&nonzero| dirty_blocks(nonzero) & bit != 0)
}

/// Which of a stripe's blocks have a dirty page, given which of its words are not zero.
fn dirty_blocks(nonzero: u64) -> u8 {
    (0..).zip(nonzero.to_le_bytes()).fold(0, |blocks, (block, words)| blocks | u8::from(words != 0) << block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::RegionLayout;

    fn layout(pages: &[u64]) -> RamLayout {
        let region = |(index, &pages): (usize, &u64)| RegionLayout {
            guest_address: (index as u64) << 40,
            len_bytes: pages * PAGE_BYTES,
        };
        RamLayout { regions: pages.iter().enumerate().map(region).collect() }
    }

    proptest! {
        /// The blocks left to hash are those that were never settled, or were written to since.
        #[test]
        fn a_block_stays_settled_until_one_of_its_pages_is_written(
            pages in prop::collection::vec(1..3 * STRIPE_PAGES, 1..4),
            settled in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
            written in prop::collection::vec(any::<[prop::sample::Index; 2]>(), 0..9),
        ) {
            let layout = layout(&pages);
            let mut source_digests = SourceDigests::new(&layout, Verify::Final);
            let mut left: Vec<_> = (0..source_digests.len()).collect();
            prop_assert_eq!(source_digests.unsettled(), &left[..]);
            let settled: Vec<_> = settled.iter().map(|index| index.index(source_digests.len())).collect();
            source_digests.settle(&settled, Duration::from_secs(1));
            left.retain(|index| !settled.contains(index));
            prop_assert_eq!(source_digests.unsettled(), &left[..]);
            let mut dirty = DirtyBitmap::new(&layout);
            for [region, page] in written {
                let region = region.index(pages.len());
                let page = page.index(usize::try_from(pages[region]).unwrap()) as u64;
                dirty.regions_mut()[region].mark(page..page + 1);
                let of = |block: &PageRun| block.region == region && block.first_page / 512 == page / 512;
                left.push(source_digests.blocks.iter().position(of).unwrap());
            }
            left.sort_unstable();
            left.dedup();
            source_digests.harvested(&dirty);
            prop_assert_eq!(source_digests.unsettled(), left);
        }
    }

    #[test]
    fn without_comparing_there_is_nothing_to_note() {
        let layout = layout(&[12 << 28]);
        let mut source_digests = SourceDigests::new(&layout, Verify::Off);
        assert_eq!((source_digests.len(), source_digests.unsettled()), (0, Vec::new()));
        source_digests.harvested(&DirtyBitmap::new(&RamLayout { regions: Vec::new() }));
        assert_eq!(source_digests.rest_takes(), Duration::ZERO);
    }
}
