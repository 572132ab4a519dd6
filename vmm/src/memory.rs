//! Guest RAM: one memfd, mapped shared, one region on each side of the hole below 4 GiB.
#![expect(unsafe_code, reason = "memfd_create and taking over its file descriptor, madvise, lseek")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError, NewBitmap};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::config::{HugePageSize, MachineConfig};
use crate::error::MachineError;
use crate::guest::layout::{PageRun, ram_parts};
use crate::guest::pattern::{PAGE_WORDS, PageContent};
use crate::ram::{GuestRam, PAGE_BYTES};

/// Reserves the RAM of a machine and touches none of its pages.
pub(crate) fn guest_ram(config: &MachineConfig) -> Result<GuestRam, MachineError> {
    let len_bytes = config.memory_bytes;
    let failed = |doing, source| MachineError::Memory { len_bytes, doing, source, remedy: remedy(config) };
    let file = memfd(config.hugepages).map_err(|error| failed("memfd_create", error))?;
    file.set_len(len_bytes).map_err(|error| failed("ftruncate", error))?;

    // mmap reserves huge pages: without the reservation, one page too few would be a SIGBUS during a run.
    let flags = libc::MAP_SHARED | if config.hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
    let mut regions = Vec::new();
    let mut file_start = 0;
    let first = FileOffset::new(file, 0);
    for (guest_address, part_bytes) in ram_parts(len_bytes) {
        let size =
            usize::try_from(part_bytes).map_err(|_| failed("mmap", io::ErrorKind::OutOfMemory.into()))?;
        let mapping = MmapRegionBuilder::new_with_bitmap(size, NewBitmap::with_len(size))
            .with_file_offset(FileOffset::from_arc(first.arc().clone(), file_start))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(config.hugepages.is_some())
            .build()
            .map_err(|error| failed("mmap", mapping_error(error)))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest_address))
            .ok_or_else(|| failed("mmap", io::ErrorKind::InvalidInput.into()))?;
        regions.push(region);
        file_start += part_bytes;
    }
    GuestRam::from_regions(regions).map_err(|error| failed("mmap", io::Error::other(error)))
}

/// Allocates the pages of a run at once, where the kernel can (Linux 5.14), so that writes to them do not
/// fault.
pub(crate) fn populate(memory: &GuestRam, run: PageRun) {
    let Ok(len_bytes) = usize::try_from(run.pages.saturating_mul(PAGE_BYTES)) else { return };
    let Ok(pages) = memory.get_slice(GuestAddress(run.address()), len_bytes) else { return };
    // SAFETY: the slice is mapped, writable and of this length; allocating its pages changes none of their
    // bytes.
    let _ =
        unsafe { libc::madvise(pages.ptr_guard_mut().as_ptr().cast(), len_bytes, libc::MADV_POPULATE_WRITE) };
}

/// Marks every page that has been written or read so far: all of RAM but its holes.
///
/// # Errors
/// The kernel's answer. Then all pages are marked.
pub(crate) fn mark_populated(memory: &GuestRam) -> io::Result<()> {
    for region in memory.iter() {
        let mapping = region.get_mmap();
        let bitmap = mapping.bitmap();
        let Some(backing) = region.file_offset() else {
            bitmap.mark_dirty(0, usize::MAX);
            continue;
        };
        let (begin, end) = (backing.start(), backing.start() + region.len());
        let mut from = begin;
        while let Some(run) =
            next_data(backing.file(), from, end).inspect_err(|_| bitmap.mark_dirty(0, usize::MAX))?
        {
            let offset = |position: u64| usize::try_from(position - begin).unwrap_or(usize::MAX);
            bitmap.mark_dirty(offset(run.start), offset(run.end) - offset(run.start));
            from = run.end;
        }
    }
    Ok(())
}

/// The first run of a file's bytes from `from` to `end` that is no hole.
fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |position: u64, whence| {
        let position = libc::off_t::try_from(position).map_err(io::Error::other)?;
        // SAFETY: the call has no pointer; nothing reads this file at its position.
        let found = unsafe { libc::lseek(file.as_raw_fd(), position, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    if from >= end {
        return Ok(None);
    }
    let start = match seek(from, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        start => start?,
    };
    let run = start..seek(start, libc::SEEK_HOLE)?.min(end);
    Ok((start < end).then_some(run))
}

/// Clears the marks of the VMM's writes so far.
pub(crate) fn clear_bitmaps(memory: &GuestRam) {
    for region in memory.iter() {
        region.get_mmap().bitmap().reset();
    }
}

/// A copy of one page. The guest may be writing to it; each word is read once.
pub(crate) fn read_page(memory: &GuestRam, page: u64) -> Result<PageContent, MachineError> {
    let guest_address = page.saturating_mul(PAGE_BYTES);
    let mut content = [0; PAGE_WORDS];
    memory
        .get_slice(GuestAddress(guest_address), PAGE_WORDS * 8)
        .map_err(|source| MachineError::GuestAddress { guest_address, source })?
        .copy_to(&mut content);
    Ok(content)
}

/// Where each region lies: guest address, length in bytes and host address.
pub(crate) fn regions(memory: &GuestRam) -> Vec<(u64, u64, u64)> {
    let of = |region: &GuestRegionMmap<_>| (region.start_addr().0, region.len(), region.as_ptr() as u64);
    memory.iter().map(of).collect()
}

fn memfd(hugepages: Option<HugePageSize>) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC
        | match hugepages {
            None => 0,
            Some(HugePageSize::TwoMiB) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            Some(HugePageSize::OneGiB) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        };
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(c"sterna-guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, and no other code has it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn mapping_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

fn remedy(config: &MachineConfig) -> &'static str {
    match config.hugepages {
        None => "",
        Some(HugePageSize::TwoMiB) => {
            "; reserve huge pages: `echo N | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`"
        }
        Some(HugePageSize::OneGiB) => {
            "; reserve huge pages: `echo N | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages`"
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::config::Workload;

    #[test]
    fn what_counts_as_written_when_it_is_unknown_is_what_was_touched_and_no_hole() {
        let workload = Workload { working_set_bytes: 0, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
        let memory_bytes = 16 << 20;
        let config = MachineConfig { memory_bytes, vcpus: 1, hugepages: None, workload };
        let memory = guest_ram(&config).unwrap();
        mark_populated(&memory).unwrap();
        let marked = || {
            let region = memory.iter().next().unwrap();
            let pages = region.len() / PAGE_BYTES;
            let is_marked =
                |page: &u64| region.get_mmap().bitmap().dirty_at(usize::try_from(page * PAGE_BYTES).unwrap());
            (0..pages).filter(is_marked).collect::<Vec<_>>()
        };
        assert_eq!(marked(), [0u64; 0]);
        for page in [0, 7, 8, 4095] {
            memory.write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        clear_bitmaps(&memory);
        mark_populated(&memory).unwrap();
        assert_eq!(marked(), [0, 7, 8, 4095]);
    }
}
