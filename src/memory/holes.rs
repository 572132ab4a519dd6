#![expect(unsafe_code, reason = "lseek(2) with SEEK_DATA, which the standard library does not offer")]

use std::io;
use std::os::fd::AsRawFd;

use super::{MemoryError, PAGE_BYTES, PageRun, RamRegion};

/// Pages between two looks at the file: 256 KiB.
///
/// `SEEK_HOLE` would say where data ends, but walks all of it, to the end of the guest if need be, at every call. So a
/// group counts as touched from its first page with data on; what is read of a hole in vain is at most one group.
const GROUP_PAGES: u64 = 64;

impl RamRegion {
    /// The parts of `run` that have been touched: those where the backing file has data rather than a hole, and perhaps
    /// some pages more.
    ///
    /// Watch the pages before asking: a page found to be a hole and written later is then known to be dirty. A region
    /// without a file has no holes. Hugetlbfs reports none either, which is safe, only slower.
    ///
    /// # Errors
    /// [`MemoryError::Holes`] if the kernel refuses.
    pub fn touched(&self, run: PageRun) -> Result<Vec<PageRun>, MemoryError> {
        let Some(backing) = self.backing() else { return Ok(vec![run]) };
        let (mut page, end) = (run.first_page, run.first_page + run.pages);
        let mut touched: Vec<PageRun> = Vec::new();
        while page < end {
            let data = next_data(&backing.file, backing.offset_bytes + page * PAGE_BYTES)?;
            let Some(first_page) =
                data.map(|at| (at - backing.offset_bytes) / PAGE_BYTES).filter(|&at| at < end)
            else {
                break;
            };
            page = ((first_page / GROUP_PAGES + 1) * GROUP_PAGES).min(end);
            match touched.last_mut() {
                Some(last) if last.first_page + last.pages == first_page => {
                    last.pages = page - last.first_page;
                }
                _ => touched.push(PageRun { region: run.region, first_page, pages: page - first_page }),
            }
        }
        Ok(touched)
    }

    /// Whether any page of `run` has been touched; as [`touched`](Self::touched) would tell, in one look.
    ///
    /// # Errors
    /// [`MemoryError::Holes`] if the kernel refuses.
    pub fn is_touched(&self, run: PageRun) -> Result<bool, MemoryError> {
        let Some(backing) = self.backing() else { return Ok(true) };
        let start = backing.offset_bytes + run.first_page * PAGE_BYTES;
        Ok(next_data(&backing.file, start)?.is_some_and(|at| at < start + run.len_bytes()))
    }
}

/// Where the next data is, at or after `at`; `None` if there is none up to the end of the file.
fn next_data(file: &impl AsRawFd, at: u64) -> Result<Option<u64>, MemoryError> {
    let at = libc::off_t::try_from(at).map_err(|_| MemoryError::Holes(io::ErrorKind::InvalidInput.into()))?;
    // SAFETY: lseek takes no pointer. It moves the file's position, which nobody uses: guest RAM is mapped, not read.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(MemoryError::Holes(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use crate::memory::{GuestRam, PageRun};

    #[test]
    fn every_page_with_data_is_found_and_no_whole_group_without() {
        const PAGES: u64 = 1000;
        let file = tempfile::tempfile().unwrap();
        file.set_len((PAGES + 3) * 4096).unwrap();
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            usize::try_from(PAGES * 4096).unwrap(),
            Some(FileOffset::new(file, 3 * 4096)),
        )])
        .unwrap();
        let data = [5u64, 63, 64, 300, 999];
        for page in data {
            memory.write_obj(1u8, GuestAddress(page * 4096)).unwrap();
        }
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let touched = |first_page, pages| {
            let run = PageRun { region: 0, first_page, pages };
            let runs = ram.regions()[0].touched(run).unwrap();
            runs.iter().map(|run| (run.first_page, run.pages)).collect::<Vec<_>>()
        };
        // 5 to 63 are a group from its first data on, 64 to 127 the next one, and 960 to 999 the last.
        assert_eq!(touched(0, PAGES), [(5, 123), (300, 20), (999, 1)]);
        assert_eq!(touched(64, 1), [(64, 1)]);
        assert_eq!(touched(320, 600), []);
    }
}
