//! KVM's dirty rings: each vCPU lists the pages that it writes.
//!
//! Linux, Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING_ACQ_REL. The kernel makes an entry *dirty*,
//! the VMM makes it *to be reset*, and `KVM_RESET_DIRTY_RINGS` returns it to the kernel, which then tracks
//! the page again. A vCPU with a nearly full ring leaves the guest until the VMM has made room.
//!
//! A kernel that interprets guests may check too late and overwrite entries that the VMM has not taken.
//! `collect` detects this, and then all pages that were ever touched count as written.
#![expect(unsafe_code, reason = "the rings are mappings of the vCPUs' descriptors, shared with the kernel")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::{ptr, slice};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_dirty_gfn,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::error::MachineError;
use crate::kvm::error::refused;
use crate::kvm::host::set_slot;
use crate::memory::mark_populated;
use crate::poison::IgnorePoison;
use crate::ram::{GuestRam, MemorySlot, PAGE_BYTES};
use crate::write_quota::WriteQuota;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The fewest entries of a ring: the kernel keeps 64 as its reserve, and 512 for processors that log pages
/// themselves.
pub const RING_ENTRIES_MIN: u32 = 1024;
/// The most entries of a ring on any kernel.
pub const RING_ENTRIES_MAX: u32 = 65_536;

// `KVM_DIRTY_GFN_F_DIRTY` and `KVM_DIRTY_GFN_F_RESET`.
const DIRTY: u32 = 1;
const TO_BE_RESET: u32 = 2;

/// Enables the rings; must precede the first vCPU.
pub(super) fn enable(vm: &VmFd, entries: u32) -> Result<(), MachineError> {
    if !entries.is_power_of_two() || !(RING_ENTRIES_MIN..=RING_ENTRIES_MAX).contains(&entries) {
        return Err(MachineError::Config(format!(
            "a dirty ring of {entries} entries: a power of two from {RING_ENTRIES_MIN} to {RING_ENTRIES_MAX} is wanted"
        )));
    }
    let most_bytes = vm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into());
    let most = usize::try_from(most_bytes).unwrap_or(0) / ENTRY_BYTES;
    if most < entries as usize {
        return Err(MachineError::NoDirtyRing { entries, most });
    }
    let capability = kvm_enable_cap {
        cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        args: [u64::from(entries) * ENTRY_BYTES as u64, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability).map_err(refused("keep dirty rings"))
}

/// The dirty rings of a machine, and the transfer of their entries to the bitmap of its RAM.
///
/// KVM tracks pages from [`watch`](Self::watch) to [`forget`](Self::forget). [`collect`](Self::collect) marks
/// the pages written so far in the software bitmap of [`Machine::memory`](crate::Machine::memory), and KVM
/// tracks them again when it returns. A vCPU with a full ring does the same by itself. So a caller that
/// empties the software bitmap after `collect` may read the pages at once.
#[derive(Debug)]
pub struct DirtyRings {
    vm: Arc<VmFd>,
    slots: Vec<MemorySlot>,
    memory: GuestRam,
    rings: Mutex<Rings>,
    quota: WriteQuota,
    watched: AtomicBool,
    times_full: AtomicU64,
    times_overrun: AtomicU64,
}

#[derive(Debug)]
struct Rings {
    rings: Vec<Ring>,
    /// Entries that were collected and not marked yet: at most the entries of one ring.
    collected: Vec<(u32, u64)>,
}

impl DirtyRings {
    pub(super) fn new(
        vm: Arc<VmFd>,
        slots: &[MemorySlot],
        memory: &GuestRam,
        vcpus: &[VcpuFd],
        entries: u32,
    ) -> Result<Self, MachineError> {
        let rings = vcpus.iter().map(|vcpu| Ring::map(vcpu, entries)).collect::<Result<Vec<_>, _>>()?;
        let collected = Vec::with_capacity(entries as usize);
        let rings = Mutex::new(Rings { rings, collected });
        Ok(Self {
            vm,
            slots: slots.to_vec(),
            memory: memory.clone(),
            rings,
            quota: WriteQuota::new(vcpus.len()),
            watched: false.into(),
            times_full: 0.into(),
            times_overrun: 0.into(),
        })
    }

    /// Makes KVM list the vCPUs' writes from now on.
    ///
    /// # Errors
    /// The kernel's answer; KVM then tracks nothing.
    pub fn watch(&self) -> io::Result<()> {
        let rings = self.lock();
        self.watched.store(true, Ordering::Relaxed);
        let told = self.set_flags(KVM_MEM_LOG_DIRTY_PAGES);
        drop(rings);
        told.inspect_err(|_| {
            // The first error matters more.
            let _ = self.forget();
        })
    }

    /// Makes KVM stop listing writes.
    ///
    /// # Errors
    /// The kernel's answer; the only consequence is a slower guest.
    pub fn forget(&self) -> io::Result<()> {
        let rings = self.lock();
        self.watched.store(false, Ordering::Relaxed);
        let told = self.set_flags(0);
        drop(rings);
        // Entries left in a ring would disturb the next watch.
        told.and(self.collect().map(drop))
    }

    /// Marks the pages listed so far in the software bitmap and makes KVM track them again; returns the
    /// number of entries.
    ///
    /// One call reads each ring once, so it ends however fast the guest writes.
    ///
    /// # Errors
    /// The kernel's answer; then any page may have been written.
    pub fn collect(&self) -> io::Result<u64> {
        let mut all = self.lock();
        let mut count = 0;
        for index in 0..all.rings.len() {
            count += self.collect_from(&mut all, index)?;
        }
        Ok(count)
    }

    /// Collects those rings that are filling: before the kernel writes over their entries, and before a vCPU
    /// is far above its quota. The others are left as they are, because a page that was collected costs the
    /// guest an exit when it is written again. Returns whether writes are tracked.
    ///
    /// # Errors
    /// Those of [`collect`](Self::collect).
    pub(crate) fn collect_filling(&self) -> io::Result<bool> {
        if !self.watched.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let uncounted_max = self.quota.uncounted_max();
        let mut all = self.lock();
        for index in 0..all.rings.len() {
            let fills = all.rings[index].len / FILLING;
            if all.rings[index].lists(uncounted_max.map_or(fills, |most| most.min(fills))) {
                self.collect_from(&mut all, index)?;
            }
        }
        Ok(true)
    }

    /// How often a vCPU had to leave the guest so far because its ring was full.
    #[must_use]
    pub fn times_full(&self) -> u64 {
        self.times_full.load(Ordering::Relaxed)
    }

    /// The quota of each vCPU. It is kept only as long as the rings are collected often.
    pub(crate) fn quota(&self) -> &WriteQuota {
        &self.quota
    }

    /// Collects the ring of one vCPU, which is full.
    pub(super) fn make_room(&self, vcpu: u8) -> io::Result<u64> {
        self.times_full.fetch_add(1, Ordering::Relaxed);
        self.collect_from(&mut self.lock(), vcpu.into())
    }

    /// How many entries the ring of each vCPU has.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.lock().rings.first().map_or(0, |ring| u32::try_from(ring.len).unwrap_or(u32::MAX))
    }

    /// How often a ring was overwritten before it could be emptied, so that all pages that were ever touched
    /// had to count as written.
    #[must_use]
    pub fn times_overrun(&self) -> u64 {
        self.times_overrun.load(Ordering::Relaxed)
    }

    /// Holds the lock until all pages are marked: a thread that waited for the lock finds a mark for every
    /// entry that has left a ring.
    fn collect_from(&self, all: &mut Rings, index: usize) -> io::Result<u64> {
        let Rings { rings, collected } = all;
        let ring = &mut rings[index];
        collected.clear();
        let taken = ring.take(collected);
        let (mut left, mut tries) = (taken, 0);
        while left > 0 && tries < RESET_TRIES {
            // Entries that are taken and not marked count as lost.
            let reset = self.reset().inspect_err(|_| ring.overran = true)?;
            ring.gave_back(reset);
            left -= reset.min(left);
            // A signal may have interrupted the call.
            tries = if reset == 0 { tries + 1 } else { 0 };
        }
        // The kernel has overwritten the entries that it does not take back.
        ring.overran |= left > 0;
        if std::mem::take(&mut ring.overran) {
            ring.gaps = true;
            self.times_overrun.fetch_add(1, Ordering::Relaxed);
            self.count_touched_as_written()?;
            // How many were new is unknown: at least what the ring held.
            self.quota.charge(index, ring.len as u64);
        } else {
            // Marked after the reset: a reader of the mark then reads the page, and KVM must list any later
            // write again.
            let new = collected.iter().filter(|&&(slot, page)| self.mark(slot, page)).count();
            self.quota.charge(index, new as u64);
        }
        Ok(taken as u64)
    }

    /// Makes the kernel track the taken pages again; returns how many entries it took back.
    fn reset(&self) -> io::Result<usize> {
        // SAFETY: the call takes no argument, and changes nothing but the rings and the kernel's tracking.
        let reset = unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) };
        usize::try_from(reset).or_else(|_| match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        })
    }

    /// KVM does not track the pages of lost entries any more, and their numbers are unknown.
    fn count_touched_as_written(&self) -> io::Result<()> {
        if self.watched.load(Ordering::Relaxed) {
            self.set_flags(0)?;
            self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        }
        // After that, because a page that is touched later is listed.
        mark_populated(&self.memory)
    }

    /// Marks a page as written; returns whether it was not.
    fn mark(&self, slot: u32, page: u64) -> bool {
        let listed = self.slots.iter().find(|known| known.slot == slot);
        let place = listed.filter(|known| page < known.len_bytes / PAGE_BYTES).and_then(|known| {
            let address = GuestAddress(known.guest_address + page * PAGE_BYTES);
            let region = self.memory.find_region(address)?;
            Some((region, usize::try_from(address.0 - region.start_addr().0).ok()?))
        });
        match place {
            Some((region, offset)) => {
                let mapping = region.get_mmap();
                let bitmap = mapping.bitmap();
                let is_new = !bitmap.dirty_at(offset);
                bitmap.mark_dirty(offset, 1);
                is_new
            }
            None => {
                tracing::warn!("KVM lists page {page} of memory slot {slot}, which this machine has not");
                false
            }
        }
    }

    fn set_flags(&self, flags: u32) -> io::Result<()> {
        let mut result = Ok(());
        for slot in &self.slots {
            // Continue with the other slots: as many as possible should have the new flags.
            result = result.and(set_slot(&self.vm, slot, flags).map_err(io::Error::from));
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().ignore_poison()
    }
}

/// A ring that is filled to one part in so many is collected.
const FILLING: usize = 8;

/// How many resets in a row may return no entry before `collect` gives up: a signal may interrupt each.
const RESET_TRIES: u32 = 10;

/// The kernel's entry, `struct kvm_dirty_gfn`.
#[repr(C)]
#[derive(Debug)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    page: AtomicU64,
}

const ENTRY_BYTES: usize = size_of::<Entry>();
const _: () = assert!(ENTRY_BYTES == size_of::<kvm_dirty_gfn>());

/// The ring of one vCPU.
#[derive(Debug)]
struct Ring {
    entries: ptr::NonNull<Entry>,
    len: usize,
    /// The entry that the kernel fills next after the taken ones. It continues from watch to watch, as the
    /// kernel's index does.
    next: usize,
    /// Whether entries were lost since the last collection.
    overran: bool,
    /// Whether entries were ever lost: the kernel's index is then ahead by their number, and their places in
    /// the ring are empty.
    gaps: bool,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `Rings` is behind a lock.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> Result<Self, MachineError> {
        let len = entries as usize;
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a new mapping of an open descriptor at an address that the kernel chooses.
        let mapped = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len * ENTRY_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        match ptr::NonNull::new(mapped).filter(|_| mapped != libc::MAP_FAILED) {
            Some(entries) => Ok(Self { entries: entries.cast(), len, next: 0, overran: false, gaps: false }),
            None => Err(MachineError::Kvm {
                doing: "map a vCPU's dirty ring".to_owned(),
                source: io::Error::last_os_error(),
            }),
        }
    }

    fn entries(&self) -> &[Entry] {
        // SAFETY: the mapping has this many entries and lives as long as `self`. Any bits are a valid entry.
        // The kernel writes entries too, so each field is atomic.
        unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.len) }
    }

    /// Whether the kernel has listed so many entries that were not taken.
    fn lists(&self, entries: usize) -> bool {
        let last = (self.next + entries.saturating_sub(1)) % self.len;
        self.entries()[last].flags.load(Ordering::Acquire) & (DIRTY | TO_BE_RESET) == DIRTY
    }

    /// Takes the dirty entries, at most the whole ring, as slots and pages; returns how many the kernel is to
    /// reset.
    fn take(&mut self, into: &mut Vec<(u32, u64)>) -> usize {
        let at = |taken: usize| &self.entries()[(self.next + taken) % self.len];
        // Acquire: sees what the kernel wrote before it set the flag.
        let flags = |taken: usize| at(taken).flags.load(Ordering::Acquire) & (DIRTY | TO_BE_RESET);
        let (mut taken, mut gap) = (0, false);
        while taken < self.len {
            if flags(taken) == 0 {
                let Some(end) = (taken..self.len).find(|&later| self.gaps && flags(later) == DIRTY) else {
                    break;
                };
                (taken..end).for_each(|lost| at(lost).flags.store(TO_BE_RESET, Ordering::Release));
                (taken, gap) = (end, true);
            }
            let entry = at(taken);
            // Otherwise it was taken before, and a signal interrupted the kernel before the reset.
            if flags(taken) == DIRTY {
                into.push((entry.slot.load(Ordering::Relaxed), entry.page.load(Ordering::Relaxed)));
                entry.flags.store(TO_BE_RESET, Ordering::Release);
            }
            taken += 1;
        }
        // The kernel keeps a reserve, so it has overwritten a ring that is completely full.
        self.overran |= gap || taken == self.len;
        taken
    }

    /// Records that the kernel took back so many entries.
    fn gave_back(&mut self, entries: usize) {
        self.next = (self.next + entries) % self.len;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: only this value has the mapping, which has this length and is not used any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.len * ENTRY_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 256;

    /// The kernel's side of a ring.
    struct Kernel {
        ring: Ring,
        dirty: usize,
        reset: usize,
    }

    impl Kernel {
        fn new() -> Self {
            let bytes = LEN * ENTRY_BYTES;
            let (access, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: new memory at an address that the kernel chooses.
            let mapped = unsafe { libc::mmap(ptr::null_mut(), bytes, access, flags, -1, 0) };
            assert_ne!(mapped, libc::MAP_FAILED);
            let entries = ptr::NonNull::new(mapped).unwrap().cast();
            Self {
                ring: Ring { entries, len: LEN, next: 0, overran: false, gaps: false },
                dirty: 0,
                reset: 0,
            }
        }

        fn lists(&mut self, pages: std::ops::Range<u64>) {
            for page in pages {
                let entry = &self.ring.entries()[self.dirty % LEN];
                entry.page.store(page, Ordering::Relaxed);
                entry.flags.store(DIRTY, Ordering::Release);
                self.dirty += 1;
            }
        }

        fn resets(&mut self) -> usize {
            let before = self.reset;
            while let entry = &self.ring.entries()[self.reset % LEN]
                && entry.flags.load(Ordering::Acquire) & TO_BE_RESET != 0
            {
                entry.flags.store(0, Ordering::Release);
                self.reset += 1;
            }
            self.reset - before
        }

        /// The pages collected, and whether any were lost.
        fn collect(&mut self) -> (Vec<u64>, bool) {
            let mut listed = Vec::new();
            let taken = self.ring.take(&mut listed);
            let reset = self.resets();
            self.ring.gave_back(reset);
            let overran = std::mem::take(&mut self.ring.overran) || reset < taken;
            self.ring.gaps |= overran;
            (listed.into_iter().map(|(_, page)| page).collect(), overran)
        }
    }

    #[test]
    fn what_is_listed_is_collected_once_and_in_order_around_the_ring() {
        let mut kernel = Kernel::new();
        for turn in 0..20 {
            kernel.lists(turn * 100..turn * 100 + 90);
            assert_eq!(kernel.collect(), ((turn * 100..turn * 100 + 90).collect(), false));
            assert_eq!(kernel.collect(), (Vec::new(), false));
        }
    }

    #[test]
    fn a_ring_that_was_written_over_is_noticed_and_goes_on() {
        for too_many in [0, 1, 77, LEN as u64 - 1, LEN as u64 + 3] {
            let mut kernel = Kernel::new();
            kernel.lists(0..50);
            assert!(!kernel.collect().1);
            kernel.lists(0..LEN as u64 + too_many);
            assert!(kernel.collect().1, "{too_many} were lost");
            // Until the kernel's index is found again, each entry must be found or count as lost.
            for turn in 0..10 {
                kernel.lists(turn * 100..turn * 100 + 100);
                let (found, lost) = kernel.collect();
                assert!(
                    lost || found == (turn * 100..turn * 100 + 100).collect::<Vec<_>>(),
                    "{too_many}, {turn}"
                );
                assert!(!lost || turn < 5, "it does not go on like this: {too_many}, {turn}");
            }
        }
    }

    #[test]
    fn entries_that_are_written_over_while_they_are_collected_are_noticed() {
        let mut kernel = Kernel::new();
        kernel.lists(0..200);
        let mut listed = Vec::new();
        let taken = kernel.ring.take(&mut listed);
        kernel.lists(200..300);
        assert_eq!((taken, kernel.resets()), (200, 0), "the kernel finds its oldest entry dirty");
        assert!(kernel.collect().1);
    }
}
