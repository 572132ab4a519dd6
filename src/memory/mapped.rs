//! Which pages of anonymous memory are allocated, for memory without a file to query.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::PAGE_BYTES;
use super::region::RamRegion;
use super::run::PageRun;

/// A reader of this process's page tables.
///
/// It is a hint: a page that is not mapped now may be mapped a moment later. For pages that it leaves out,
/// the only conclusion is that they were not needed so far.
#[derive(Debug)]
pub struct MappedSearch {
    /// `None` if the kernel has none.
    pagemap: Option<File>,
}

/// Bytes of a pagemap entry; each page has one.
const ENTRY_BYTES: usize = 8;

/// Pages read in one call.
const CHUNK_PAGES: u64 = 4096;

/// The page is present or swapped out.
const THERE: u64 = 0b11 << 62;

impl Default for MappedSearch {
    fn default() -> Self {
        Self { pagemap: File::open("/proc/self/pagemap").ok() }
    }
}

impl MappedSearch {
    /// The allocated pages of `run`; `None` if that is unknown because the memory is not anonymous.
    #[must_use]
    pub fn mapped(&self, region: &RamRegion, run: PageRun) -> Option<Vec<PageRun>> {
        let pagemap = self.pagemap.as_ref().filter(|_| region.is_anonymous())?;
        let first_entry = region.host_address() / PAGE_BYTES;
        let mut mapped: Vec<PageRun> = Vec::new();
        let mut entries = Vec::new();
        for chunk in run.split(CHUNK_PAGES) {
            entries.resize(usize::try_from(chunk.pages).ok()? * ENTRY_BYTES, 0);
            let at = (first_entry + chunk.first_page) * ENTRY_BYTES as u64;
            pagemap.read_exact_at(&mut entries, at).ok()?;
            let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
            for (page, entry) in (chunk.first_page..).zip(entries) {
                if u64::from_ne_bytes(*entry) & THERE == 0 {
                    continue;
                }
                match mapped.last_mut() {
                    Some(last) if last.first_page + last.pages == page => last.pages += 1,
                    _ => mapped.push(PageRun { first_page: page, pages: 1, ..run }),
                }
            }
        }
        Some(mapped)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::memory::GuestRam;

    const PAGES: u64 = 10_000;

    #[test]
    fn pages_of_anonymous_memory_are_there_once_they_are_written() {
        let ranges = [(GuestAddress(0), usize::try_from(PAGES * PAGE_BYTES).unwrap())];
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let mapped = |first_page, pages| {
            let run = PageRun { region: 0, first_page, pages };
            let runs = MappedSearch::default().mapped(&ram.regions()[0], run).expect("it is anonymous");
            runs.iter().map(|run| run.first_page..run.first_page + run.pages).collect::<Vec<_>>()
        };
        assert!(mapped(0, PAGES).is_empty());
        let written = [5, 6, 4095, 4096, 9999];
        for page in written {
            memory.write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        // More pages are allocated if the kernel uses huge pages on its own.
        let found = mapped(0, PAGES);
        assert!(written.iter().all(|page| found.iter().any(|run| run.contains(page))), "{found:?}");
        let all: u64 = found.iter().map(|run| run.end - run.start).sum();
        assert!(all <= 4 * 512, "{found:?}");
        assert!(mapped(1024, 2048).is_empty());
    }

    #[test]
    fn of_a_file_nothing_is_told() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * PAGE_BYTES).unwrap();
        let len = usize::try_from(PAGES * PAGE_BYTES).unwrap();
        let range = (GuestAddress(0), len, Some(FileOffset::new(file, 0)));
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        let run = PageRun { region: 0, first_page: 0, pages: PAGES };
        assert_eq!(MappedSearch::default().mapped(&ram.regions()[0], run), None);
    }
}
