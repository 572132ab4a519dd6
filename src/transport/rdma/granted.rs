use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::slices::{is_of_blocks, parts_max};
use crate::memory::{PAGE_BYTES, RamLayout, RegionLayout};
use crate::transport::TransportError;
use crate::wire::SliceRange;

/// The slices, or parts of them, that a source may write to, and the rule for more: each lies in guest RAM,
/// consists of whole blocks and shares no page with another; together they are within the budget, and there
/// are no more than [`parts_max`] allows for RAM of this size.
#[derive(Debug)]
pub(super) struct Granted<R> {
    layout: RamLayout,
    pages_max: u64,
    slices_max: usize,
    /// Of all of them.
    pages: u64,
    /// By region and first page.
    slices: BTreeMap<(u16, u64), (SliceRange, R)>,
}

impl<R> Granted<R> {
    /// None yet, and at most `budget_bytes` at once; `None`: all of RAM.
    pub(super) fn new(layout: RamLayout, budget_bytes: Option<u64>) -> Self {
        let pages_max = budget_bytes.map_or(layout.total_pages(), |bytes| bytes / PAGE_BYTES);
        let slices_max = parts_max(&layout);
        Self { layout, pages_max, slices_max, pages: 0, slices: BTreeMap::new() }
    }

    /// Whether all of these may be granted.
    pub(super) fn check(&self, asked: &[SliceRange]) -> Result<(), TransportError> {
        let refused = |slice: &SliceRange, why: &str| {
            TransportError::Disagreement(format!("{slice:?} was asked for, and {why}"))
        };
        let mut pages = self.pages;
        for (index, slice) in asked.iter().enumerate() {
            if !self.is_a_slice(slice) {
                return Err(refused(slice, "is no slice of guest RAM"));
            }
            if self.overlaps(slice) || asked[..index].iter().any(|other| overlap(other, slice)) {
                return Err(refused(slice, "overlaps another"));
            }
            pages += slice.pages;
        }
        if pages > self.pages_max || self.slices.len() + asked.len() > self.slices_max {
            return Err(TransportError::Disagreement("more slices than may be registered at once".into()));
        }
        Ok(())
    }

    /// In RAM, and of whole blocks unless its region ends with it.
    fn is_a_slice(&self, slice: &SliceRange) -> bool {
        let pages = self.layout.regions.get(usize::from(slice.region)).map_or(0, RegionLayout::pages);
        is_of_blocks(slice, pages)
    }

    fn overlaps(&self, slice: &SliceRange) -> bool {
        let end = slice.first_page + slice.pages;
        let before = self.slices.range((slice.region, 0)..(slice.region, end)).next_back();
        before.is_some_and(|(_, (granted, _))| overlap(granted, slice))
    }

    /// Notes slices that were [checked](Self::check).
    pub(super) fn extend(&mut self, granted: impl IntoIterator<Item = (SliceRange, R)>) {
        for (slice, region) in granted {
            self.pages += slice.pages;
            self.slices.insert((slice.region, slice.first_page), (slice, region));
        }
    }

    /// Takes a slice back.
    pub(super) fn remove(&mut self, slice: &SliceRange) -> Result<R, TransportError> {
        match self.slices.entry((slice.region, slice.first_page)) {
            Entry::Occupied(entry) if entry.get().0 == *slice => {
                self.pages -= slice.pages;
                Ok(entry.remove().1)
            }
            _ => Err(TransportError::Disagreement(format!("{slice:?} is given back and was not registered"))),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slices.len()
    }

    pub(super) fn into_values(self) -> impl Iterator<Item = R> {
        self.slices.into_values().map(|(_, region)| region)
    }
}

/// Whether two slices of guest RAM have a page in common.
fn overlap(one: &SliceRange, other: &SliceRange) -> bool {
    let end = |slice: &SliceRange| slice.first_page + slice.pages;
    one.region == other.region && one.first_page < end(other) && other.first_page < end(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB_PAGES: u64 = (1 << 20) / PAGE_BYTES;

    /// Two regions of 64 and 5 MiB.
    fn granted(budget_mib: Option<u64>) -> Granted<()> {
        let region = |(guest_address, mib): (u64, u64)| RegionLayout { guest_address, len_bytes: mib << 20 };
        let regions = [(0, 64), (1 << 30, 5)].map(region).to_vec();
        Granted::new(RamLayout { regions }, budget_mib.map(|mib| mib << 20))
    }

    fn slice(region: u16, first_mib: u64, mib: u64) -> SliceRange {
        SliceRange { region, first_page: first_mib * MIB_PAGES, pages: mib * MIB_PAGES }
    }

    #[test]
    fn slices_that_a_source_makes_are_granted_and_may_come_again_once_they_went() {
        let mut granted = granted(Some(16));
        let first = [slice(0, 0, 4), slice(0, 4, 8), slice(1, 4, 1)];
        granted.check(&first).unwrap();
        granted.extend(first.map(|slice| (slice, ())));
        assert!(granted.check(&[slice(0, 60, 4)]).is_err(), "more than the budget");
        granted.remove(&slice(0, 4, 8)).unwrap();
        assert!(granted.remove(&slice(0, 4, 8)).is_err(), "it is gone");
        assert!(granted.remove(&slice(0, 0, 8)).is_err(), "it was another");
        granted.check(&[slice(0, 60, 4), slice(0, 4, 4)]).unwrap();
    }

    #[test]
    fn what_overlaps_is_refused_also_within_one_message() {
        let mut granted = granted(None);
        granted.extend([(slice(0, 16, 16), ())]);
        for overlapping in
            [slice(0, 16, 16), slice(0, 20, 4), slice(0, 12, 8), slice(0, 28, 8), slice(0, 8, 32)]
        {
            assert!(granted.check(&[overlapping]).is_err(), "{overlapping:?} with what is registered");
            let both = [slice(0, 16, 16), overlapping];
            assert!(
                Granted::<()>::new(granted.layout.clone(), None).check(&both).is_err(),
                "{overlapping:?}"
            );
        }
        granted.check(&[slice(0, 12, 4), slice(0, 32, 32), slice(1, 0, 5)]).unwrap();
    }

    #[test]
    fn slices_outside_of_ram_or_not_of_whole_blocks_are_refused() {
        let granted = granted(None);
        for wrong in [slice(0, 62, 4), slice(1, 0, 6), slice(2, 0, 4), slice(0, 0, 0)] {
            assert!(granted.check(&[wrong]).is_err(), "{wrong:?}");
        }
        let far = SliceRange { region: 0, first_page: u64::MAX - 63, pages: 64 };
        let [uneven, off] =
            [(0, 63), (32, 64)].map(|(first_page, pages)| SliceRange { region: 0, first_page, pages });
        for wrong in [far, uneven, off] {
            assert!(granted.check(&[wrong]).is_err(), "{wrong:?}");
        }
        granted.check(&[slice(1, 4, 1), SliceRange { region: 0, first_page: 64, pages: 64 }]).unwrap();
    }

    #[test]
    fn no_more_slices_are_granted_than_ram_of_this_size_has_parts() {
        let regions = vec![RegionLayout { guest_address: 0, len_bytes: 1 << 30 }];
        let mut granted = Granted::new(RamLayout { regions }, None);
        let block = |index: u64| SliceRange { region: 0, first_page: index * 64, pages: 64 };
        // One for every 2 MiB, and 1024 more.
        let most = 512 + 1024;
        let all: Vec<_> = (0..most).map(block).collect();
        granted.check(&all).unwrap();
        granted.extend(all.iter().map(|&slice| (slice, ())));
        assert!(granted.check(&[block(most)]).is_err());
        granted.remove(&block(0)).unwrap();
        granted.check(&[block(most)]).unwrap();
    }
}
