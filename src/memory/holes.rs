#![expect(unsafe_code, reason = "lseek(2) with SEEK_DATA, which the standard library does not offer")]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use super::PAGE_BYTES;
use super::error::MemoryError;
use super::region::{Backing, RamRegion};
use super::run::PageRun;

/// The size of a group of pages that is checked at once, initially and at most: 256 KiB and 4 MiB.
const GROUP_PAGES: RangeInclusive<u64> = 64..=1024;

/// A search for touched memory, run after run by ascending page, that queries the file less often in areas
/// without holes.
///
/// `SEEK_HOLE` would find the end of data, but walks over all of the data at every call, to the end of the
/// guest if need be. So a group of pages counts as touched from its first page with data on. If the next
/// group begins with data, it is twice as large, unless its last page has none: a guest with one page in
/// every 4 MiB must not have all pages read, because reading allocates memory for holes.
#[derive(Clone, Debug)]
pub struct TouchedSearch {
    group_pages: u64,
    /// The region of the last query, and its first page with data after that.
    next_data: Option<(usize, u64)>,
}

impl Default for TouchedSearch {
    fn default() -> Self {
        Self { group_pages: *GROUP_PAGES.start(), next_data: None }
    }
}

impl TouchedSearch {
    /// The touched parts of `run`, which are pages of `region`: those where the region's file has data rather
    /// than a hole, and perhaps some more pages.
    ///
    /// Watch the pages before the call: a page that was a hole and is written later is then reported as
    /// dirty. A region without a file has no holes. Hugetlbfs reports none either, which is safe, only
    /// slower.
    ///
    /// # Errors
    /// [`MemoryError::Holes`] if the kernel refuses.
    pub fn touched(&mut self, region: &RamRegion, run: PageRun) -> Result<Vec<PageRun>, MemoryError> {
        let Some(backing) = region.backing() else { return Ok(vec![run]) };
        self.next_data = None;
        let (mut page, end) = (run.first_page, run.first_page + run.pages);
        let mut touched: Vec<PageRun> = Vec::new();
        while page < end {
            let first_page = next_data(backing, page)?;
            if first_page >= end {
                self.next_data = Some((run.region, first_page));
                break;
            }
            let group_end = |group_pages: u64| ((first_page / group_pages + 1) * group_pages).min(end);
            let larger = (self.group_pages * 2).min(*GROUP_PAGES.end());
            let last = group_end(larger) - 1;
            let no_gap = first_page == page && next_data(backing, last)? == last;
            self.group_pages = if no_gap { larger } else { *GROUP_PAGES.start() };
            page = group_end(self.group_pages);
            match touched.last_mut() {
                Some(last) if last.first_page + last.pages == first_page => {
                    last.pages = page - last.first_page;
                }
                _ => touched.push(PageRun { region: run.region, first_page, pages: page - first_page }),
            }
        }
        if page < end {
            self.group_pages = *GROUP_PAGES.start();
        }
        Ok(touched)
    }

    /// Whether any page of `run` has been touched, in one query.
    ///
    /// # Errors
    /// [`MemoryError::Holes`] if the kernel refuses.
    pub fn any_touched(&mut self, region: &RamRegion, run: PageRun) -> Result<bool, MemoryError> {
        let Some(backing) = region.backing() else { return Ok(true) };
        let page = next_data(backing, run.first_page)?;
        self.next_data = Some((run.region, page));
        Ok(page < run.first_page + run.pages)
    }

    /// Whether a run after the last one had no data at the last query. It is only a hint: to leave such pages
    /// out, a caller watches them first, and then asks whether [any is touched](Self::any_touched), for any
    /// number of pages in one query.
    #[must_use]
    pub fn expects_hole(&self, run: PageRun) -> bool {
        self.next_data
            .is_some_and(|(region, page)| region == run.region && run.first_page + run.pages <= page)
    }
}

/// The first page with data, from this one on; `u64::MAX` if the rest of the file has none.
fn next_data(backing: &Backing, page: u64) -> Result<u64, MemoryError> {
    let at = libc::off_t::try_from(backing.offset_bytes + page * PAGE_BYTES)
        .map_err(|_| MemoryError::Holes(io::ErrorKind::InvalidInput.into()))?;
    // SAFETY: lseek takes no pointer. It moves the file's position, which is not used: guest RAM is mapped,
    // not read.
    let found = unsafe { libc::lseek(backing.file.as_raw_fd(), at, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => Ok((found - backing.offset_bytes) / PAGE_BYTES),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(u64::MAX),
            error => Err(MemoryError::Holes(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::TouchedSearch;
    use crate::memory::{GuestRam, PageRun};

    const PAGES: u64 = 5000;

    /// The touched parts of these runs, one after the other, if these pages have data.
    fn touched(data: impl IntoIterator<Item = u64>, runs: &[(u64, u64)]) -> Vec<Vec<(u64, u64)>> {
        let file = tempfile::tempfile().unwrap();
        file.set_len((PAGES + 3) * 4096).unwrap();
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            usize::try_from(PAGES * 4096).unwrap(),
            Some(FileOffset::new(file, 3 * 4096)),
        )])
        .unwrap();
        for page in data {
            memory.write_obj(1u8, GuestAddress(page * 4096)).unwrap();
        }
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let mut search = TouchedSearch::default();
        let mut of_run = |&(first_page, pages): &(u64, u64)| {
            let runs = search.touched(&ram.regions()[0], PageRun { region: 0, first_page, pages }).unwrap();
            runs.iter().map(|run| (run.first_page, run.pages)).collect()
        };
        runs.iter().map(&mut of_run).collect()
    }

    #[test]
    fn every_page_with_data_is_found_and_no_whole_group_without() {
        // 5 to 63 are a group from its first data on, 64 to 127 the next one, and 4992 to 4999 the last.
        let data = [5, 63, 64, 300, 4999];
        assert_eq!(touched(data, &[(0, PAGES)]), [[(5, 123), (300, 20), (4999, 1)]]);
        assert_eq!(touched(data, &[(64, 1), (320, 600)]), [vec![(64, 1)], vec![]]);
    }

    #[test]
    fn groups_grow_where_data_has_no_gap_and_are_small_again_behind_a_hole() {
        // Groups of up to 1024 pages, at their multiples, and only if the last page has data: 1500 to 1535
        // are the rest of a group of 64.
        let data = (0..1500).chain([2100, 3000]);
        let runs = [(0, 1024), (1024, 1024), (2048, 1024)];
        assert_eq!(touched(data, &runs), [vec![(0, 1024)], vec![(1024, 512)], vec![(2100, 12), (3000, 8)]]);
    }

    #[test]
    fn a_hole_is_expected_up_to_the_next_data_and_in_no_other_region() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * 4096).unwrap();
        let range = (GuestAddress(0), usize::try_from(PAGES * 4096).unwrap(), Some(FileOffset::new(file, 0)));
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        memory.write_obj(1u8, GuestAddress(1000 * 4096)).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let region = &ram.regions()[0];
        let run = |region, first_page, pages| PageRun { region, first_page, pages };
        let mut search = TouchedSearch::default();
        assert!(!search.expects_hole(run(0, 0, 1)), "nobody has looked");
        assert!(!search.any_touched(region, run(0, 0, 1000)).unwrap());
        assert!(search.expects_hole(run(0, 500, 500)));
        assert!(!search.expects_hole(run(0, 500, 501)) && !search.expects_hole(run(1, 500, 500)));
        assert!(search.any_touched(region, run(0, 1000, 1)).unwrap());
        assert!(search.touched(region, run(0, 1001, 9)).unwrap().is_empty());
        assert!(search.expects_hole(run(0, 1010, PAGES)), "there is no data any more");
    }

    #[test]
    fn a_page_at_the_start_of_each_large_group_does_not_have_all_of_it_read() {
        let data = (0..1024).chain([1024, 2048]);
        let runs = [(0, 1024), (1024, 1024), (2048, 1024)];
        assert_eq!(touched(data, &runs), [[(0, 1024)], [(1024, 64)], [(2048, 64)]]);
    }
}
