//! Regions of memory that no `vm-memory` guest describes: a file to be mapped, or a pointer with its owner.
#![expect(unsafe_code, reason = "a VMM answers for the memory behind a pointer")]

use std::any::Any;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapOptions;
use rustix::param::page_size;

use super::{Backing, GuestRam, HUGETLBFS_MAGIC, RamRegion, RegionLayout};
use crate::memory::PAGE_BYTES;
use crate::memory::error::MemoryError;

/// What is behind memory given by a pointer. It tells which pages were never touched, and so need not be
/// sent.
#[derive(Clone, Debug)]
pub enum RawBacking {
    /// Private memory of this process, without a file (`MAP_PRIVATE | MAP_ANONYMOUS`).
    Anonymous,
    /// A shared mapping (`MAP_SHARED`) of this file, such as a memfd, from this byte on. Pages in its holes
    /// count as zero.
    SharedFile {
        /// The file.
        file: Arc<File>,
        /// The offset in the file at which the memory begins, a multiple of the page size.
        offset_bytes: u64,
    },
    /// Anything else. All pages count as touched.
    Other,
}

impl GuestRam {
    /// The view of a guest with these regions, by ascending guest physical address. Each byte of memory
    /// belongs to one region only.
    ///
    /// # Errors
    /// [`MemoryError`] if the regions violate [`RamLayout::validate`](super::RamLayout::validate).
    pub fn from_regions(regions: impl IntoIterator<Item = RamRegion>) -> Result<Self, MemoryError> {
        let numbered = regions.into_iter().enumerate().map(|(index, region)| RamRegion { index, ..region });
        let ram = Self { regions: numbered.collect() };
        ram.layout().validate()?;
        Ok(ram)
    }
}

impl RamRegion {
    /// Maps a part of a file, shared and writable, as a region: RAM that another process has mapped as well,
    /// by a memfd, a file in `/dev/shm` or on hugetlbfs. It stays mapped as long as the region or a clone of
    /// it lives.
    ///
    /// `offset_bytes` and the length are multiples of the file's page size: that of hugetlbfs for a file on
    /// hugetlbfs, otherwise the host's.
    ///
    /// The file must keep its length. If another process truncates it, the kernel answers an access to the
    /// missing part with SIGBUS, which ends this process unless the VMM handles that signal. A memfd that is
    /// sealed with `F_SEAL_SHRINK` cannot become shorter.
    ///
    /// # Errors
    /// [`MemoryError`] if the part is not of whole pages, exceeds the file, or cannot be mapped.
    pub fn map_file(layout: RegionLayout, file: Arc<File>, offset_bytes: u64) -> Result<Self, MemoryError> {
        let RegionLayout { guest_address, len_bytes } = layout;
        let failed = |error| MemoryError::Map { guest_address, len_bytes, error };
        let system = rustix::fs::fstatfs(&*file).map_err(|error| failed(error.into()))?;
        let huge = system.f_type == HUGETLBFS_MAGIC;
        let page_bytes = match u64::try_from(system.f_bsize) {
            Ok(bytes) if huge => bytes,
            _ => page_size() as u64,
        };
        check_layout(layout, page_bytes)?;
        check_file(layout, &file, offset_bytes, page_bytes)?;
        let too_large = || MemoryError::TooLarge { guest_address, len_bytes };
        let len = usize::try_from(len_bytes).map_err(|_| too_large())?;
        let mapping = MmapOptions::new().offset(offset_bytes).len(len).map_raw(&*file).map_err(failed)?;
        let start = NonNull::new(mapping.as_mut_ptr()).ok_or_else(too_large)?;
        Ok(Self {
            index: 0,
            layout,
            start,
            anonymous: false,
            huge,
            backing: Some(Backing { file, offset_bytes }),
            _owner: Arc::new(mapping),
        })
    }

    /// A region of memory that the caller has mapped. `owner` keeps it mapped, and lives as long as the
    /// region or a clone of it.
    ///
    /// `page_bytes` is the size of the pages that the mapping is made of, any multiple of 4 KiB: the host's
    /// page size, or that of hugetlbfs, such as 2 MiB or 1 GiB. Transparent huge pages do not count. `start`
    /// and the length are multiples of `page_bytes`.
    ///
    /// # Errors
    /// [`MemoryError`] if the memory is not of whole pages, or exceeds the file that `backing` names.
    ///
    /// # Safety
    /// - The whole range of `layout.len_bytes` bytes from `start` on is mapped, readable and writable.
    /// - It stays mapped at this address, to the same memory, until `owner` is dropped.
    /// - No Rust reference to any of its bytes exists while the region or a clone of it does: the engine
    ///   reads and writes them from several threads, and so may network hardware.
    /// - `backing` describes the mapping at `start`. The contents of the guest, though not memory safety,
    ///   depend on it: pages in the holes of a wrong file are not sent.
    pub unsafe fn from_raw(
        layout: RegionLayout,
        start: NonNull<u8>,
        page_bytes: u64,
        backing: RawBacking,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, MemoryError> {
        if page_bytes == 0 || !page_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::PageSize { page_bytes });
        }
        check_layout(layout, page_bytes)?;
        let RegionLayout { guest_address, len_bytes } = layout;
        let address = start.addr().get() as u64;
        check_multiple(layout, "address in this process", address, page_bytes)?;
        address.checked_add(len_bytes).ok_or(MemoryError::TooLarge { guest_address, len_bytes })?;
        let (anonymous, backing) = match backing {
            RawBacking::Anonymous => (true, None),
            RawBacking::SharedFile { file, offset_bytes } => {
                check_file(layout, &file, offset_bytes, page_bytes)?;
                (false, Some(Backing { file, offset_bytes }))
            }
            RawBacking::Other => (false, None),
        };
        let huge = page_bytes > page_size() as u64;
        Ok(Self { index: 0, layout, start, anonymous, huge, backing, _owner: owner })
    }
}

fn check_layout(layout: RegionLayout, page_bytes: u64) -> Result<(), MemoryError> {
    super::RamLayout { regions: vec![layout] }.validate()?;
    check_multiple(layout, "length", layout.len_bytes, page_bytes)
}

fn check_file(
    layout: RegionLayout,
    file: &File,
    offset_bytes: u64,
    page_bytes: u64,
) -> Result<(), MemoryError> {
    let RegionLayout { guest_address, len_bytes } = layout;
    check_multiple(layout, "offset in its file", offset_bytes, page_bytes)?;
    let failed = |error| MemoryError::Map { guest_address, len_bytes, error };
    let file_bytes = file.metadata().map_err(failed)?.len();
    match offset_bytes.checked_add(len_bytes) {
        Some(end_bytes) if end_bytes <= file_bytes => Ok(()),
        _ => Err(MemoryError::FileTooShort { guest_address, len_bytes, offset_bytes, file_bytes }),
    }
}

fn check_multiple(
    RegionLayout { guest_address, .. }: RegionLayout,
    what: &'static str,
    bytes: u64,
    page_bytes: u64,
) -> Result<(), MemoryError> {
    if bytes.is_multiple_of(page_bytes) {
        return Ok(());
    }
    Err(MemoryError::PartialPage { guest_address, what, bytes, page_bytes })
}

#[cfg(test)]
mod tests;
