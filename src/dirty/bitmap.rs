use crate::memory::RamLayout;

/// One bit a page for all of guest RAM, region by region, in the layout of `KVM_GET_DIRTY_LOG`: the only bitmap there is.
///
/// It is made once for a migration and reused every round. Bits past a region's last page are never set.
#[derive(Clone, Debug)]
pub struct DirtyBitmap {
    regions: Vec<Region>,
}

#[derive(Clone, Debug)]
struct Region {
    pages: u64,
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// An empty bitmap for the layout.
    #[must_use]
    pub fn new(layout: &RamLayout) -> Self {
        let regions = layout
            .regions
            .iter()
            .map(|region| Region {
                pages: region.pages(),
                words: vec![
                    0;
                    usize::try_from(region.pages().div_ceil(64))
                        .expect("RAM that is mapped here fits usize")
                ],
            })
            .collect();
        Self { regions }
    }

    /// How many regions it covers.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// The words of one region.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn words(&self, region: usize) -> &[u64] {
        &self.regions[region].words
    }

    /// The words of one region, to be filled by a harvest.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn words_mut(&mut self, region: usize) -> &mut [u64] {
        &mut self.regions[region].words
    }

    /// Marks every page dirty: the first round.
    pub fn fill(&mut self) {
        for region in &mut self.regions {
            region.words.fill(u64::MAX);
            let tail = region.pages % 64;
            if let Some(last) = region.words.last_mut().filter(|_| tail != 0) {
                *last = (1 << tail) - 1;
            }
        }
    }

    /// Marks every page clean.
    pub fn clear(&mut self) {
        for region in &mut self.regions {
            region.words.fill(0);
        }
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|region| &region.words).map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;

    #[test]
    fn a_full_bitmap_has_exactly_the_pages_of_the_regions() {
        let region = |guest_address, pages: u64| RegionLayout { guest_address, len_bytes: pages * 4096 };
        let layout = RamLayout { regions: vec![region(0, 64), region(1 << 32, 130), region(1 << 33, 1)] };
        let mut bitmap = DirtyBitmap::new(&layout);
        assert_eq!(bitmap.count(), 0);
        bitmap.fill();
        assert_eq!(bitmap.count(), 195);
        assert_eq!(bitmap.words(1), [u64::MAX, u64::MAX, 3]);
        bitmap.clear();
        assert_eq!(bitmap.count(), 0);
    }
}
