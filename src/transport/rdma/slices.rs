use std::sync::{Arc, OnceLock};

use sterna_rdma::{MemoryRegion, RemoteKey};

use crate::dirty::DirtyBitmap;
use crate::memory::{PAGE_BYTES, RamLayout};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// Pages in a slice, the unit of registration: 256 MiB. One memory region past 4 GiB is slow on some hardware, and many
/// small ones are slow to make.
pub const SLICE_PAGES: u64 = 65_536;

/// A slice that both ends have registered.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) local: Arc<MemoryRegion>,
    /// Address of its first byte at the destination.
    pub(super) remote_address: u64,
    pub(super) remote_key: RemoteKey,
}

/// The slices of all of guest RAM at the source, filled in as they are registered.
#[derive(Debug)]
pub(super) struct Slices {
    layout: RamLayout,
    regions: Vec<Vec<OnceLock<Slice>>>,
}

impl Slices {
    pub(super) fn new(layout: RamLayout) -> Self {
        let slots = |pages: u64| (0..pages.div_ceil(SLICE_PAGES)).map(|_| OnceLock::new()).collect();
        Self { regions: layout.regions.iter().map(|region| slots(region.pages())).collect(), layout }
    }

    /// The slices with dirty pages that are not registered yet.
    pub(super) fn missing(&self, dirty: &DirtyBitmap) -> Vec<SliceRange> {
        let words_per_slice = usize::try_from(SLICE_PAGES / 64).unwrap_or(usize::MAX);
        let mut missing = Vec::new();
        for (region, slots) in self.regions.iter().enumerate() {
            for (index, words) in dirty.words(region).chunks(words_per_slice).enumerate() {
                if slots[index].get().is_none() && words.iter().any(|&word| word != 0) {
                    missing.extend(range_of(&self.layout, region, index as u64 * SLICE_PAGES));
                }
            }
        }
        missing
    }

    /// Notes a slice as registered at both ends.
    pub(super) fn set(&self, range: SliceRange, slice: Slice) {
        let (region, index) = (usize::from(range.region), usize::try_from(range.first_page / SLICE_PAGES));
        if let (Some(slots), Ok(index)) = (self.regions.get(region), index) {
            // It is asked for only while unset, so nothing is ever replaced.
            let _ = slots[index].set(slice);
        }
    }

    /// The slice of a page, and the byte in it at which the page begins.
    pub(super) fn of_page(&self, region: usize, page: u64) -> Result<(&Slice, u64), TransportError> {
        let index = usize::try_from(page / SLICE_PAGES).ok();
        let slot = index.and_then(|index| self.regions.get(region)?.get(index)?.get());
        let slice = slot.ok_or_else(|| {
            TransportError::Disagreement(format!("page {page} of region {region} was never registered"))
        })?;
        Ok((slice, page % SLICE_PAGES * PAGE_BYTES))
    }
}

/// The slice of a region that begins at a page, if there is one that does.
pub(super) fn range_of(layout: &RamLayout, region: usize, first_page: u64) -> Option<SliceRange> {
    let pages = layout.regions.get(region)?.pages();
    if !first_page.is_multiple_of(SLICE_PAGES) || first_page >= pages {
        return None;
    }
    let pages = SLICE_PAGES.min(pages - first_page);
    Some(SliceRange { region: u16::try_from(region).ok()?, first_page, pages })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;

    fn layout() -> RamLayout {
        let region =
            |guest_address, pages: u64| RegionLayout { guest_address, len_bytes: pages * PAGE_BYTES };
        RamLayout { regions: vec![region(0, SLICE_PAGES + 1), region(1 << 40, 5)] }
    }

    #[test]
    fn slices_with_dirty_pages_are_asked_for() {
        let (layout, mut dirty) = (layout(), DirtyBitmap::new(&layout()));
        let slices = Slices::new(layout);
        assert_eq!(slices.missing(&dirty), []);
        dirty.words_mut(0)[1024] = 1;
        let last = SliceRange { region: 0, first_page: SLICE_PAGES, pages: 1 };
        assert_eq!(slices.missing(&dirty), [last]);
        dirty.fill();
        let first = SliceRange { region: 0, first_page: 0, pages: SLICE_PAGES };
        assert_eq!(slices.missing(&dirty), [first, last, SliceRange { region: 1, first_page: 0, pages: 5 }]);
        assert!(slices.of_page(0, 7).is_err(), "nothing is registered yet");
    }

    #[test]
    fn only_slices_that_are_there_can_be_named() {
        let layout = layout();
        assert!(range_of(&layout, 0, SLICE_PAGES).is_some());
        for (region, first_page) in
            [(0, 1), (0, 2 * SLICE_PAGES), (1, SLICE_PAGES), (2, 0), (0, u64::MAX - 65_535)]
        {
            assert_eq!(range_of(&layout, region, first_page), None, "{region} {first_page}");
        }
    }
}
