#![expect(
    unsafe_code,
    reason = "pointers into the mapping of guest RAM: made here, and only here, from an owner that outlives them"
)]

mod raw;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapRaw;
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

pub use self::raw::RawBacking;
use super::PAGE_BYTES;
use super::error::MemoryError;
use super::run::PageRun;
use super::slice::GuestSlice;

/// A view of all of a guest's RAM that keeps the mapping alive.
///
/// Cloning is cheap and gives another view of the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    regions: Arc<[RamRegion]>,
}

impl GuestRam {
    /// The view of a `vm-memory` guest. The view and its clones keep the mappings.
    ///
    /// # Errors
    /// [`MemoryError`] if the regions violate [`RamLayout::validate`].
    pub fn from_vm_memory<B>(memory: &GuestMemoryMmap<B>) -> Result<Self, MemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(memory.clone());
        let mut regions = Vec::with_capacity(memory.num_regions());
        for region in memory.iter() {
            let guest_address = region.start_addr().raw_value();
            let start = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|error| MemoryError::NotMapped { guest_address, reason: error.to_string() })?;
            let start = NonNull::new(start)
                .ok_or_else(|| MemoryError::NotMapped { guest_address, reason: "no address".into() })?;
            regions.push(RamRegion {
                index: regions.len(),
                layout: RegionLayout { guest_address, len_bytes: region.len() },
                start,
                anonymous: region.file_offset().is_none() && region.flags() & libc::MAP_ANONYMOUS != 0,
                huge: region.is_hugetlbfs() == Some(true)
                    || region.file_offset().is_some_and(|file| lies_on_hugetlbfs(file.file())),
                // Writes to a private mapping do not reach its file, so the file's holes are meaningless.
                backing: region
                    .file_offset()
                    .filter(|_| region.flags() & libc::MAP_SHARED != 0)
                    .map(|file| Backing { file: file.arc().clone(), offset_bytes: file.start() }),
                _owner: owner.clone(),
            });
        }
        let ram = Self { regions: regions.into() };
        ram.layout().validate()?;
        Ok(ram)
    }

    /// The view of parts of a mapped file, which the view and its clones keep mapped. A
    /// guest address is an offset in the mapping. All pages of the parts count as touched.
    ///
    /// # Errors
    /// [`MemoryError`] if the parts violate [`RamLayout::validate`], or exceed the mapping.
    pub fn from_mapping(mapping: &Arc<MmapRaw>, parts: &RamLayout) -> Result<Self, MemoryError> {
        parts.validate()?;
        let region = |(index, &layout): (usize, &RegionLayout)| {
            let RegionLayout { guest_address, len_bytes } = layout;
            // Validated: the sum does not overflow.
            let inside = usize::try_from(guest_address + len_bytes).is_ok_and(|end| end <= mapping.len());
            let offset = usize::try_from(guest_address).ok().filter(|_| inside);
            let start = NonNull::new(mapping.as_mut_ptr()).zip(offset);
            let (start, offset) = start.ok_or(MemoryError::TooLarge { guest_address, len_bytes })?;
            // SAFETY: `offset` is inside the mapping, checked above.
            let start = unsafe { start.add(offset) };
            Ok(RamRegion {
                index,
                layout,
                start,
                anonymous: false,
                huge: false,
                backing: None,
                _owner: mapping.clone(),
            })
        };
        Ok(Self { regions: parts.regions.iter().enumerate().map(region).collect::<Result<_, _>>()? })
    }

    /// The regions, by ascending guest physical address.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Addresses and lengths of the regions.
    #[must_use]
    pub fn layout(&self) -> RamLayout {
        RamLayout { regions: self.regions.iter().map(|region| region.layout).collect() }
    }

    /// The bytes of a run of pages.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if any byte lies outside of guest RAM.
    pub fn slice(&self, run: PageRun) -> Result<GuestSlice<'_>, MemoryError> {
        let outside =
            || MemoryError::OutOfRange { region: run.region, first_page: run.first_page, pages: run.pages };
        let region = self.regions.get(run.region).ok_or_else(outside)?;
        region.slice(run.first_page, run.pages).ok_or_else(outside)
    }
}

/// One contiguous range of guest physical addresses on one mapping.
#[derive(Clone)]
pub struct RamRegion {
    index: usize,
    layout: RegionLayout,
    start: NonNull<u8>,
    /// Whether it is private memory of this process, without a file.
    anonymous: bool,
    /// Whether its pages come from the pool of huge pages.
    huge: bool,
    backing: Option<Backing>,
    _owner: Arc<dyn Any + Send + Sync>,
}

/// The file behind a mapping: a memfd or hugetlbfs region has one, an anonymous region has none.
#[derive(Clone, Debug)]
pub(super) struct Backing {
    pub(super) file: Arc<File>,
    pub(super) offset_bytes: u64,
}

/// `f_type` of hugetlbfs, from `linux/magic.h`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

fn lies_on_hugetlbfs(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type == HUGETLBFS_MAGIC)
}

// SAFETY: the pointer is to shared memory that `_owner` keeps mapped; it is only used through `GuestSlice`,
// with operations that are sound although other threads and devices read or write the same bytes at the same
// time.
unsafe impl Send for RamRegion {}

// SAFETY: as for Send: no method hands out a reference to the bytes.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Its index in [`GuestRam::regions`].
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its range in the guest's physical address space.
    #[must_use]
    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.layout.pages()
    }

    /// The address of its first byte in this process.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.start.addr().get() as u64
    }

    /// Whether its pages come from the host's pool of huge pages, and so take none of the other available
    /// memory.
    #[must_use]
    pub fn is_of_huge_pages(&self) -> bool {
        self.huge
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.anonymous
    }

    pub(super) fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// The bytes of `pages` pages from `first_page` on; `None` if the region does not contain them all.
    #[must_use]
    pub fn slice(&self, first_page: u64, pages: u64) -> Option<GuestSlice<'_>> {
        if first_page.checked_add(pages)? > self.pages() {
            return None;
        }
        let offset = usize::try_from(first_page.checked_mul(PAGE_BYTES)?).ok()?;
        let len = usize::try_from(pages.checked_mul(PAGE_BYTES)?).ok()?;
        // SAFETY: `offset` is at most the mapping's length, checked above.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: the range is inside the mapping, checked above, and `_owner` keeps that mapped while `self`
        // lives.
        Some(unsafe { GuestSlice::new(start, len) })
    }
}

impl fmt::Debug for RamRegion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("RamRegion").field("index", &self.index).field("layout", &self.layout).finish()
    }
}

// SAFETY: the bytes stay mapped, at this address, until the last clone of the region is dropped: `_owner`
// holds the mapping.
unsafe impl sterna_rdma::Mapping for RamRegion {
    fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    fn len_bytes(&self) -> usize {
        usize::try_from(self.layout.len_bytes).unwrap_or(usize::MAX)
    }
}

/// The range of a RAM region in the guest's physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLayout {
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
}

impl RegionLayout {
    /// How many pages the region has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }
}

/// The layout of all of a guest's RAM. It is sent to the destination, which must be able to build the same
/// layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamLayout {
    /// The regions, by ascending guest physical address.
    pub regions: Vec<RegionLayout>,
}

impl RamLayout {
    /// x86 KVM allows 32,764 memory slots; VMMs use a handful, or with hot-plugging a few hundred.
    pub const REGIONS_MAX: usize = 1024;

    /// All RAM, in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().fold(0, |sum, region| sum.saturating_add(region.len_bytes))
    }

    /// All RAM, in pages.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.total_bytes() / PAGE_BYTES
    }

    /// Checks a layout before use: not empty, bounded, of whole pages, ascending, without overlap.
    ///
    /// # Errors
    /// The first [`MemoryError`] found.
    pub fn validate(&self) -> Result<(), MemoryError> {
        if self.regions.is_empty() || self.regions.len() > Self::REGIONS_MAX {
            return Err(MemoryError::RegionCount { count: self.regions.len(), max: Self::REGIONS_MAX });
        }
        let mut end = 0;
        for &RegionLayout { guest_address, len_bytes } in &self.regions {
            if len_bytes == 0 || len_bytes % PAGE_BYTES != 0 || guest_address % PAGE_BYTES != 0 {
                return Err(MemoryError::Unaligned { guest_address, len_bytes });
            }
            if guest_address < end {
                return Err(MemoryError::Overlap { guest_address });
            }
            end = guest_address
                .checked_add(len_bytes)
                .filter(|_| isize::try_from(len_bytes).is_ok())
                .ok_or(MemoryError::TooLarge { guest_address, len_bytes })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const MIB: usize = 1 << 20;

    fn two_regions() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB), (GuestAddress(1 << 32), 2 * MIB)]).unwrap()
    }

    #[test]
    fn a_view_shows_what_the_guest_wrote_and_keeps_it_mapped() {
        let memory = two_regions();
        memory.write_slice(b"tern", GuestAddress((1 << 32) + 4096)).unwrap();
        let ram = GuestRam::from_vm_memory(&memory).unwrap();
        drop(memory);
        let mut page = [0; 4096];
        ram.slice(PageRun { region: 1, first_page: 1, pages: 1 }).unwrap().copy_to(&mut page);
        assert_eq!(&page[..4], b"tern");
        assert_eq!(ram.layout().total_pages(), 768);
    }

    #[test]
    fn nothing_outside_of_the_regions_can_be_addressed() {
        let ram = GuestRam::from_vm_memory(&two_regions()).unwrap();
        for run in [
            PageRun { region: 0, first_page: 255, pages: 2 },
            PageRun { region: 0, first_page: u64::MAX, pages: 1 },
            PageRun { region: 0, first_page: 1, pages: u64::MAX },
            PageRun { region: 2, first_page: 0, pages: 1 },
        ] {
            assert!(matches!(ram.slice(run), Err(MemoryError::OutOfRange { .. })), "{run:?}");
        }
    }

    #[test]
    fn parts_of_a_mapping_are_at_their_places_in_it_and_never_outside() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * 4096).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"tern", 3 * 4096).unwrap();
        let mapping = Arc::new(MmapRaw::map_raw(&file).unwrap());
        let part =
            |first: u64, pages: u64| RegionLayout { guest_address: first * 4096, len_bytes: pages * 4096 };
        let ram =
            |parts: &[RegionLayout]| GuestRam::from_mapping(&mapping, &RamLayout { regions: parts.to_vec() });
        let mut page = [0; 4096];
        let whole = ram(&[part(0, 1), part(2, 3)]).unwrap();
        whole.slice(PageRun { region: 1, first_page: 1, pages: 1 }).unwrap().copy_to(&mut page);
        assert_eq!(&page[..4], b"tern");
        assert!(matches!(ram(&[part(2, 4)]), Err(MemoryError::TooLarge { .. })));
        assert!(matches!(ram(&[part(1 << 40, 1)]), Err(MemoryError::TooLarge { .. })));
    }

    #[test]
    fn a_layout_is_refused_unless_it_is_whole_pages_in_order() {
        let layout = |regions: &[(u64, u64)]| RamLayout {
            regions: regions
                .iter()
                .map(|&(guest_address, len_bytes)| RegionLayout { guest_address, len_bytes })
                .collect(),
        };
        assert!(layout(&[(0, 4096), (4096, 8192)]).validate().is_ok());
        assert!(matches!(layout(&[]).validate(), Err(MemoryError::RegionCount { .. })));
        assert!(matches!(layout(&[(0, 4096); 1025]).validate(), Err(MemoryError::RegionCount { .. })));
        assert!(matches!(layout(&[(0, 0)]).validate(), Err(MemoryError::Unaligned { .. })));
        assert!(matches!(layout(&[(0, 5000)]).validate(), Err(MemoryError::Unaligned { .. })));
        assert!(matches!(layout(&[(1, 4096)]).validate(), Err(MemoryError::Unaligned { .. })));
        assert!(matches!(layout(&[(0, 8192), (4096, 4096)]).validate(), Err(MemoryError::Overlap { .. })));
        assert!(matches!(layout(&[(!4095, 8192)]).validate(), Err(MemoryError::TooLarge { .. })));
        assert!(matches!(layout(&[(0, 1 << 63)]).validate(), Err(MemoryError::TooLarge { .. })));
    }
}
