use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::chunks::{is_of_blocks, parts_max};
use super::wire::ChunkRange;
use crate::memory::{PAGE_BYTES, RamLayout, RegionLayout};
use crate::transport::error::TransportError;

/// The chunks, or parts of chunks, that a source may write to, and the rule for more. Each lies in guest RAM,
/// consists of whole blocks and shares no page with another. Together they are within the budget, and at most
/// as many as [`parts_max`] allows for RAM of this size.
#[derive(Debug)]
pub(super) struct ExposedRegions<R> {
    layout: RamLayout,
    pages_max: u64,
    chunks_max: usize,
    /// The pages of all chunks.
    pages: u64,
    /// By region and first page.
    chunks: BTreeMap<(u16, u64), (ChunkRange, R)>,
}

impl<R> ExposedRegions<R> {
    /// None yet, and at most `budget_bytes` at once; `None`: all of RAM.
    pub(super) fn new(layout: RamLayout, budget_bytes: Option<u64>) -> Self {
        let pages_max = budget_bytes.map_or(layout.total_pages(), |bytes| bytes / PAGE_BYTES);
        let chunks_max = parts_max(&layout);
        Self { layout, pages_max, chunks_max, pages: 0, chunks: BTreeMap::new() }
    }

    /// Whether all of these may be exposed.
    pub(super) fn check(&self, asked: &[ChunkRange]) -> Result<(), TransportError> {
        let refused = |chunk: &ChunkRange, why: &str| {
            TransportError::Disagreement(format!("{chunk:?} was asked for, and {why}"))
        };
        let mut pages = self.pages;
        for (index, chunk) in asked.iter().enumerate() {
            if !self.is_a_chunk(chunk) {
                return Err(refused(chunk, "is no chunk of guest RAM"));
            }
            if self.overlaps(chunk) || asked[..index].iter().any(|other| overlap(other, chunk)) {
                return Err(refused(chunk, "overlaps another"));
            }
            pages += chunk.pages;
        }
        if pages > self.pages_max || self.chunks.len() + asked.len() > self.chunks_max {
            return Err(TransportError::Disagreement("more chunks than may be registered at once".into()));
        }
        Ok(())
    }

    /// Whether a chunk lies in RAM, and consists of whole blocks unless its region ends with it.
    fn is_a_chunk(&self, chunk: &ChunkRange) -> bool {
        let pages = self.layout.regions.get(usize::from(chunk.region)).map_or(0, RegionLayout::pages);
        is_of_blocks(chunk, pages)
    }

    fn overlaps(&self, chunk: &ChunkRange) -> bool {
        let end = chunk.first_page + chunk.pages;
        let before = self.chunks.range((chunk.region, 0)..(chunk.region, end)).next_back();
        before.is_some_and(|(_, (exposed, _))| overlap(exposed, chunk))
    }

    /// Adds chunks that were [checked](Self::check).
    pub(super) fn extend(&mut self, exposed: impl IntoIterator<Item = (ChunkRange, R)>) {
        for (chunk, region) in exposed {
            self.pages += chunk.pages;
            self.chunks.insert((chunk.region, chunk.first_page), (chunk, region));
        }
    }

    /// Removes a chunk.
    pub(super) fn remove(&mut self, chunk: &ChunkRange) -> Result<R, TransportError> {
        match self.chunks.entry((chunk.region, chunk.first_page)) {
            Entry::Occupied(entry) if entry.get().0 == *chunk => {
                self.pages -= chunk.pages;
                Ok(entry.remove().1)
            }
            _ => Err(TransportError::Disagreement(format!("{chunk:?} is given back and was not registered"))),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    pub(super) fn into_values(self) -> impl Iterator<Item = R> {
        self.chunks.into_values().map(|(_, region)| region)
    }
}

/// Whether two chunks of guest RAM share a page.
fn overlap(one: &ChunkRange, other: &ChunkRange) -> bool {
    let end = |chunk: &ChunkRange| chunk.first_page + chunk.pages;
    one.region == other.region && one.first_page < end(other) && other.first_page < end(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB_PAGES: u64 = (1 << 20) / PAGE_BYTES;

    /// Two regions of 64 and 5 MiB.
    fn exposed(budget_mib: Option<u64>) -> ExposedRegions<()> {
        let region = |(guest_address, mib): (u64, u64)| RegionLayout { guest_address, len_bytes: mib << 20 };
        let regions = [(0, 64), (1 << 30, 5)].map(region).to_vec();
        ExposedRegions::new(RamLayout { regions }, budget_mib.map(|mib| mib << 20))
    }

    fn chunk(region: u16, first_mib: u64, mib: u64) -> ChunkRange {
        ChunkRange { region, first_page: first_mib * MIB_PAGES, pages: mib * MIB_PAGES }
    }

    #[test]
    fn chunks_that_a_source_makes_are_exposed_and_may_come_again_once_they_went() {
        let mut exposed = exposed(Some(16));
        let first = [chunk(0, 0, 4), chunk(0, 4, 8), chunk(1, 4, 1)];
        exposed.check(&first).unwrap();
        exposed.extend(first.map(|chunk| (chunk, ())));
        assert!(exposed.check(&[chunk(0, 60, 4)]).is_err(), "more than the budget");
        exposed.remove(&chunk(0, 4, 8)).unwrap();
        assert!(exposed.remove(&chunk(0, 4, 8)).is_err(), "it is gone");
        assert!(exposed.remove(&chunk(0, 0, 8)).is_err(), "it was another");
        exposed.check(&[chunk(0, 60, 4), chunk(0, 4, 4)]).unwrap();
    }

    #[test]
    fn what_overlaps_is_refused_also_within_one_message() {
        let mut exposed = exposed(None);
        exposed.extend([(chunk(0, 16, 16), ())]);
        for overlapping in
            [chunk(0, 16, 16), chunk(0, 20, 4), chunk(0, 12, 8), chunk(0, 28, 8), chunk(0, 8, 32)]
        {
            assert!(exposed.check(&[overlapping]).is_err(), "{overlapping:?} with what is registered");
            let both = [chunk(0, 16, 16), overlapping];
            assert!(
                ExposedRegions::<()>::new(exposed.layout.clone(), None).check(&both).is_err(),
                "{overlapping:?}"
            );
        }
        exposed.check(&[chunk(0, 12, 4), chunk(0, 32, 32), chunk(1, 0, 5)]).unwrap();
    }

    #[test]
    fn slices_outside_of_ram_or_not_of_whole_blocks_are_refused() {
        let exposed = exposed(None);
        for wrong in [chunk(0, 62, 4), chunk(1, 0, 6), chunk(2, 0, 4), chunk(0, 0, 0)] {
            assert!(exposed.check(&[wrong]).is_err(), "{wrong:?}");
        }
        let far = ChunkRange { region: 0, first_page: u64::MAX - 63, pages: 64 };
        let [uneven, off] =
            [(0, 63), (32, 64)].map(|(first_page, pages)| ChunkRange { region: 0, first_page, pages });
        for wrong in [far, uneven, off] {
            assert!(exposed.check(&[wrong]).is_err(), "{wrong:?}");
        }
        exposed.check(&[chunk(1, 4, 1), ChunkRange { region: 0, first_page: 64, pages: 64 }]).unwrap();
    }

    #[test]
    fn no_more_chunks_are_exposed_than_ram_of_this_size_has_parts() {
        let regions = vec![RegionLayout { guest_address: 0, len_bytes: 1 << 30 }];
        let mut exposed = ExposedRegions::new(RamLayout { regions }, None);
        let block = |index: u64| ChunkRange { region: 0, first_page: index * 64, pages: 64 };
        // One for every 2 MiB, and 1024 more.
        let most = 512 + 1024;
        let all: Vec<_> = (0..most).map(block).collect();
        exposed.check(&all).unwrap();
        exposed.extend(all.iter().map(|&chunk| (chunk, ())));
        assert!(exposed.check(&[block(most)]).is_err());
        exposed.remove(&block(0)).unwrap();
        exposed.check(&[block(most)]).unwrap();
    }
}
