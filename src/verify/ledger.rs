use std::time::Duration;

use crate::digest::{self, Digest};
use crate::dirty::DirtyBitmap;
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES, PageRun, RamLayout};
use crate::wire::BlockDigest;

/// How often blocks are hashed while the guest runs, at most: each time costs another round.
const PASSES_MAX: u32 = 3;

/// Which blocks the destination has digests of, and nothing was written to them since, as far as the dirty log tells.
#[derive(Debug)]
pub(crate) struct Ledger {
    blocks: Vec<PageRun>,
    settled: Vec<bool>,
    passes: u32,
    /// Of passes so far.
    hashed_bytes: u64,
    hashing: Duration,
}

impl Ledger {
    pub(crate) fn new(layout: &RamLayout) -> Self {
        let blocks = digest::blocks(layout);
        let settled = vec![false; blocks.len()];
        Self { blocks, settled, passes: 0, hashed_bytes: 0, hashing: Duration::ZERO }
    }

    /// How many blocks there are.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// What is worth hashing while the guest runs: blocks that are not settled and have no page among those that are `dirty`.
    /// All pages of such a block are watched, so what is written from here on is in the next harvest.
    ///
    /// None if that was done often enough: again only if it at least halves what would be left for the pause.
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

    /// The destination has the digests of these blocks, which were hashed after the last harvest.
    pub(crate) fn settle(&mut self, indices: &[usize], took: Duration) {
        self.passes += 1;
        self.hashing += took;
        for &index in indices {
            self.settled[index] = true;
            self.hashed_bytes += self.blocks[index].pages * PAGE_BYTES;
        }
    }

    /// Takes note of a harvest.
    pub(crate) fn harvested(&mut self, dirty: &DirtyBitmap) {
        for (settled, block) in self.settled.iter_mut().zip(&self.blocks) {
            *settled = *settled && !is_dirty(dirty, *block);
        }
    }

    /// The blocks that remain to be hashed.
    pub(crate) fn unsettled(&self) -> Vec<usize> {
        (0..self.len()).filter(|&index| !self.settled[index]).collect()
    }

    /// How long hashing what remains would take, at one end after the other; nothing as long as no pass has shown how fast that is.
    pub(crate) fn rest_takes(&self) -> Duration {
        let rest = self.unsettled().iter().map(|&index| self.blocks[index].pages * PAGE_BYTES).sum::<u64>();
        #[expect(clippy::cast_precision_loss, reason = "a prediction")]
        let share = if self.hashed_bytes == 0 { 0.0 } else { rest as f64 / self.hashed_bytes as f64 };
        // A pass hashes at both ends at the same time.
        Duration::try_from_secs_f64(2.0 * share * self.hashing.as_secs_f64()).unwrap_or(Duration::MAX)
    }
}

fn is_dirty(dirty: &DirtyBitmap, block: PageRun) -> bool {
    const WORD: u64 = u64::BITS as u64;
    let words = dirty.regions()[block.region].words();
    // Blocks begin at a multiple of their length, and nothing is marked past the end of a region.
    let [first, count] = [block.first_page / WORD, block.pages.div_ceil(WORD)]
        .map(|words| usize::try_from(words).unwrap_or(usize::MAX));
    words[first..].iter().take(count).any(|&word| word != 0)
}
