use std::os::unix::fs::FileExt;

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::memory::{PageRun, RamChange, TouchedSearch};

const MIB: u64 = 1 << 20;

fn layout(guest_address: u64, len_bytes: u64) -> RegionLayout {
    RegionLayout { guest_address, len_bytes }
}

fn memfd(flags: MemfdFlags, len_bytes: u64) -> Arc<File> {
    let file = File::from(memfd_create("sterna-test", flags | MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len_bytes).unwrap();
    Arc::new(file)
}

fn page(ram: &GuestRam, region: usize, first_page: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    ram.slice(PageRun { region, first_page, pages: 1 }).unwrap().copy_to(&mut bytes);
    bytes
}

/// Memory of this process from an address on that is a multiple of 1 MiB.
fn anonymous(len_bytes: u64) -> (Arc<MmapRaw>, NonNull<u8>) {
    let len = usize::try_from(len_bytes + MIB).unwrap();
    let mapping = Arc::new(MmapRaw::from(memmap2::MmapMut::map_anon(len).unwrap()));
    let start = mapping.as_mut_ptr();
    let start = start.wrapping_add(start.align_offset(1 << 20));
    (mapping, NonNull::new(start).unwrap())
}

fn raw(
    layout: RegionLayout,
    start: NonNull<u8>,
    page_bytes: u64,
    backing: RawBacking,
    owner: &Arc<MmapRaw>,
) -> Result<RamRegion, MemoryError> {
    // SAFETY: `start` is 1 MiB or more before the end of the mapping that the owner keeps, or the call fails.
    unsafe { RamRegion::from_raw(layout, start, page_bytes, backing, owner.clone()) }
}

#[test]
fn parts_of_a_file_are_ram_at_other_addresses_and_stay_mapped_without_the_file() {
    let file = memfd(MemfdFlags::empty(), 3 * MIB);
    file.write_all_at(b"tern", MIB + 4096).unwrap();
    let region = |at, offset| RamRegion::map_file(layout(at, MIB), file.clone(), offset).unwrap();
    let ram = GuestRam::from_regions([region(0, 2 * MIB), region(4 << 30, MIB)]).unwrap();
    let again = GuestRam::from_regions([region(0, 2 * MIB), region(4 << 30, MIB)]).unwrap();
    assert_eq!(ram.change_to(&again), None, "it is the same memory, mapped twice");
    let other = GuestRam::from_regions([region(0, 2 * MIB), region(4 << 30, 0)]).unwrap();
    assert_eq!(ram.change_to(&other), Some(RamChange::Replaced(layout(4 << 30, MIB))));
    let touched = TouchedSearch::default()
        .touched(&ram.regions()[1], PageRun { region: 1, first_page: 0, pages: 256 })
        .unwrap();
    assert_eq!(touched.first().map(|run| run.first_page), Some(1), "the file's holes count");
    drop((file, again, other));
    assert_eq!(ram.regions().iter().map(RamRegion::index).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(&page(&ram, 1, 1)[..4], b"tern");
}

#[test]
fn a_part_that_is_not_all_in_its_file_or_not_of_whole_pages_is_refused() {
    let file = memfd(MemfdFlags::empty(), 2 * MIB);
    let map = |at, len, offset| RamRegion::map_file(layout(at, len), file.clone(), offset).unwrap_err();
    for (len, offset) in [(2 * MIB, 4096), (4096, 2 * MIB), (4096, u64::MAX - 4095)] {
        let error = map(0, len, offset);
        assert!(
            matches!(error, MemoryError::FileTooShort { file_bytes, .. } if file_bytes == 2 * MIB),
            "{error}"
        );
    }
    let error = map(0, 4096, 100).to_string();
    assert!(
        error.contains("its offset in its file of 100 bytes is no multiple of its page size, 4 KiB"),
        "{error}"
    );
    assert!(matches!(map(0, 100, 0), MemoryError::Unaligned { .. }));
    assert!(matches!(map(100, 4096, 0), MemoryError::Unaligned { .. }));
    assert!(matches!(map(!4095, 4096, 0), MemoryError::TooLarge { .. }));
    let read_only = Arc::new(File::open("/proc/self/exe").unwrap());
    let error = RamRegion::map_file(layout(0, 4096), read_only, 0).unwrap_err();
    assert!(matches!(error, MemoryError::Map { .. }), "{error}");
}

#[test]
fn regions_overlap_nowhere() {
    let file = memfd(MemfdFlags::empty(), 2 * MIB);
    let region = |at| RamRegion::map_file(layout(at, MIB), file.clone(), 0).unwrap();
    for [first, second] in [[0, MIB - 4096], [MIB, 0]] {
        let overlap = GuestRam::from_regions([region(first), region(second)]);
        assert!(matches!(overlap, Err(MemoryError::Overlap { .. })));
    }
}

#[test]
fn a_file_of_huge_pages_is_mapped_in_huge_pages_only() {
    let huge = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    if memfd_create("sterna-test", huge).is_err_and(|error| error == rustix::io::Errno::NOSYS) {
        println!("skipped: this kernel has no huge pages; it would take one with CONFIG_HUGETLBFS");
        return;
    }
    let file = memfd(huge, 4 * MIB);
    for (len, offset) in [(MIB, 0), (2 * MIB, MIB)] {
        let error = RamRegion::map_file(layout(0, len), file.clone(), offset).unwrap_err();
        assert!(
            matches!(error, MemoryError::PartialPage { page_bytes, .. } if page_bytes == 2 * MIB),
            "{error}"
        );
    }
    match RamRegion::map_file(layout(0, 2 * MIB), file, 2 * MIB) {
        Ok(region) => assert!(region.is_of_huge_pages()),
        // This host has no free huge pages.
        Err(error) => assert!(error.to_string().contains("are huge pages of that size free?"), "{error}"),
    }
}

#[test]
fn memory_behind_a_pointer_keeps_its_owner_as_long_as_any_view_of_it() {
    let (owner, start) = anonymous(MIB);
    let kept = Arc::downgrade(&owner);
    let region = raw(layout(MIB, MIB), start, 64 << 10, RawBacking::Anonymous, &owner).unwrap();
    assert!(region.is_anonymous() && region.is_of_huge_pages());
    assert_eq!(region.host_address(), start.addr().get() as u64);
    let ram = GuestRam::from_regions([region]).unwrap();
    drop(owner);
    let clone = ram.clone();
    drop(ram);
    assert!(kept.upgrade().is_some());
    assert_eq!(page(&clone, 0, 255), [0; 4096]);
    drop(clone);
    assert!(kept.upgrade().is_none());
}

#[test]
fn memory_behind_a_pointer_is_of_whole_pages_of_any_multiple_of_4_kib() {
    let (owner, start) = anonymous(MIB);
    let make = |start, len, page_bytes| raw(layout(0, len), start, page_bytes, RawBacking::Other, &owner);
    for page_bytes in [4096, 12 << 10, 64 << 10, MIB] {
        let whole = page_bytes * (MIB / page_bytes);
        // 12 KiB is not a power of two, so the address may not be aligned to it.
        let aligned = (start.addr().get() as u64).is_multiple_of(page_bytes);
        assert_eq!(make(start, whole, page_bytes).is_ok(), aligned, "{page_bytes}");
    }
    for page_bytes in [0, 1, 512, 6000] {
        assert!(matches!(make(start, MIB, page_bytes), Err(MemoryError::PageSize { .. })), "{page_bytes}");
    }
    let shifted = NonNull::new(start.as_ptr().wrapping_add(4096)).unwrap();
    for result in [make(start, MIB / 2, MIB), make(shifted, 64 << 10, 64 << 10)] {
        assert!(matches!(result, Err(MemoryError::PartialPage { .. })), "{result:?}");
    }
    let last_page = NonNull::new(std::ptr::without_provenance_mut(usize::MAX & !4095)).unwrap();
    assert!(matches!(make(last_page, 8192, 4096), Err(MemoryError::TooLarge { .. })));
}

#[test]
fn memory_behind_a_pointer_is_all_in_the_file_that_it_is_said_to_be_of() {
    let file = memfd(MemfdFlags::empty(), 2 * MIB);
    let owner = Arc::new(MmapRaw::map_raw(&*file).unwrap());
    let start = NonNull::new(owner.as_mut_ptr()).unwrap();
    let make = |offset_bytes| {
        let backing = RawBacking::SharedFile { file: file.clone(), offset_bytes };
        raw(layout(0, 2 * MIB), start, 4096, backing, &owner)
    };
    let ram = GuestRam::from_regions([make(0).unwrap()]).unwrap();
    let run = PageRun { region: 0, first_page: 0, pages: 512 };
    assert!(!TouchedSearch::default().any_touched(&ram.regions()[0], run).unwrap());
    assert!(matches!(make(4096), Err(MemoryError::FileTooShort { .. })));
    assert!(matches!(make(1), Err(MemoryError::PartialPage { .. })));
}
