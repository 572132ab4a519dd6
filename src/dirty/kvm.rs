#![expect(
    unsafe_code,
    reason = "the KVM ioctls of the dirty log, which kvm-ioctls has not or only with an allocation a call"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use super::error::DirtyError;
use super::guarded::GuardedWords;
use super::log::{CaughtUp, DirtyLog, InitiallyDirty};
use super::region::DirtyRegion;
use super::stripe::{STRIPE_PAGES, STRIPE_WORDS};
use crate::memory::{GuestRam, PAGE_BYTES, RamRegion, RegionLayout};
use crate::poison::IgnorePoison;

// Linux, Documentation/virt/kvm/api.rst.
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// A KVM memory slot: the arguments with which the VMM set it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    /// The slot's number.
    pub slot: u32,
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Address in the VMM's process at which it is mapped.
    pub host_address: u64,
}

/// KVM's dirty log: the pages that the vCPUs write.
///
/// With manual protection, `KVM_GET_DIRTY_LOG` only reads, and `KVM_CLEAR_DIRTY_LOG` write-protects, in
/// parts, just before the pages are read; "initially set" spares the kernel a walk over all of RAM at the
/// start. Both ioctls take one lock per VM in the kernel, so calls from several threads only overlap with
/// sending and with the work on the bits.
///
/// `KVM_GET_DIRTY_LOG` copies the bitmap of a whole slot. A VMM with much RAM should therefore use slots of
/// some tens of GiB, each with a bitmap of a few MiB: the copy is still in the processor's cache when it is
/// OR-ed into the guest's bits, the clean words of the guest's bits are not read, and other users of the lock
/// wait less.
#[derive(Debug)]
pub struct KvmLog {
    slots: Slots,
    /// Buffers that the kernel fills before they are OR-ed into the caller's bits: one for each worker that
    /// harvests, kept from round to round.
    scratch: Scratch,
}

impl KvmLog {
    /// The log of the VM behind `vm` (a duplicate of the VMM's descriptor). Its slots are the guest's RAM: in
    /// the order of the regions, one or several for each, of a multiple of 64 pages save for a region's last.
    ///
    /// # Safety
    /// Each of `slots` is a memory slot of `vm`, set with exactly these arguments and without flags. Until
    /// the log is dropped, the VMM neither sets nor deletes any slot.
    ///
    /// The reason is that [`start`](DirtyLog::start) and [`stop`](DirtyLog::stop) set the slots again, with
    /// other flags. KVM has no call that checks beforehand whether a slot exists, and creates one that does
    /// not: the guest could then write to these addresses of this process after its RAM is unmapped.
    ///
    /// A VMM that replaces a slot nevertheless, to plug memory during a migration, gets
    /// [`DirtyError::SlotChanged`] or [`DirtyError::Ioctl`] from the next harvest. The kernel never writes
    /// outside of the buffer for its bitmap, whatever the slot's new size.
    ///
    /// # Errors
    /// [`DirtyError::Slot`] if a slot does not match a region; [`DirtyError::NoMemory`] if the bitmap's copy
    /// cannot be allocated.
    pub unsafe fn new(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<Self, DirtyError> {
        let slots = Slots::new(vm, slots, ram)?;
        let scratch = Scratch::new(slots.regions.iter().flatten().map(RegionSlot::words).max().unwrap_or(0));
        scratch.with(|_| ())?;
        Ok(Self { slots, scratch })
    }

    fn slots(&self, region: usize, first_page: u64, words: usize) -> Result<&[RegionSlot], DirtyError> {
        let slots = self.slots.regions.get(region).filter(|slots| {
            let pages: u64 = slots.iter().map(|slot| slot.pages).sum();
            first_page.is_multiple_of(64) && first_page / 64 + words as u64 <= pages.div_ceil(64)
        });
        slots.map(Vec::as_slice).ok_or(DirtyError::OutOfRange { region, first_page, words })
    }

    /// The bits of a slot.
    fn get<'log>(
        &self,
        slot: &RegionSlot,
        scratch: &'log mut GuardedWords,
    ) -> Result<&'log [u64], DirtyError> {
        let log = scratch.last(slot.words());
        let Some(last) = log.len().checked_sub(1) else { return Ok(log) };
        // The kernel writes as many words as its slot has, whatever length the VMM claimed. A longer bitmap
        // runs into the buffer's guard. A shorter one leaves the last word unchanged; the kernel may have
        // written that value by chance, but not both values in two calls.
        for unwritten in [UNWRITTEN, !UNWRITTEN] {
            log[last] = unwritten;
            self.get_into(slot, log)?;
            if log[last] != unwritten {
                return Ok(log);
            }
        }
        Err(DirtyError::SlotChanged { slot: slot.kvm.slot })
    }

    fn get_into(&self, slot: &RegionSlot, log: &mut [u64]) -> Result<(), DirtyError> {
        let request = kvm_dirty_log {
            slot: slot.kvm.slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: log.as_mut_ptr().cast() },
        };
        // SAFETY: `log` ends where the guard of a `GuardedWords` begins, so the kernel writes to `log` alone
        // or fails, whatever the slot's size.
        let result = unsafe { ioctl_with_ref(&self.slots.vm, KVM_GET_DIRTY_LOG(), &request) };
        check(result, "KVM_GET_DIRTY_LOG", &slot.kvm).map_err(|error| match error {
            DirtyError::Ioctl { slot, error, .. } if error.raw_os_error() == Some(libc::EFAULT) => {
                DirtyError::SlotChanged { slot }
            }
            error => error,
        })
    }

    /// Write-protects the pages of a slot that are set in `bits`; `first_page` is counted from the slot's
    /// start.
    fn clear(&self, slot: &RegionSlot, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        // A multiple of 64, except where the range ends with the slot.
        let pages = (bits.len() as u64 * 64).min(slot.pages - first_page);
        let request = kvm_clear_dirty_log {
            slot: slot.kvm.slot,
            // The kernel refuses more than 16 TiB at once.
            num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: `bits` has a bit for each of `num_pages` pages; the kernel only reads these bits.
        let result = unsafe { ioctl_with_ref(&self.slots.vm, KVM_CLEAR_DIRTY_LOG(), &request) };
        check(result, "KVM_CLEAR_DIRTY_LOG", &slot.kvm)
    }
}

/// The content of a bitmap's last word before the kernel writes it.
const UNWRITTEN: u64 = 0x5a5a_5a5a_5a5a_5a5a;

impl DirtyLog for KvmLog {
    fn start(&self) -> Result<InitiallyDirty, DirtyError> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET), 0, 0, 0],
            ..Default::default()
        };
        // SAFETY: the structure has the kernel's layout, and the kernel only reads it.
        let result = unsafe { ioctl_with_ref(&self.slots.vm, KVM_ENABLE_CAP(), &capability) };
        if result < 0 {
            return Err(DirtyError::NoManualProtect(io::Error::last_os_error()));
        }
        self.slots.watch().inspect_err(|_| {
            // The error being returned matters more than an error of the clean-up.
            let _ = self.stop();
        })?;
        Ok(InitiallyDirty::All)
    }

    fn catch_up(&self) -> Result<CaughtUp, DirtyError> {
        Ok(CaughtUp::Fully { unnamed_pages: 0 })
    }

    fn harvest(&self, region: usize, dirty: &mut DirtyRegion) -> Result<(), DirtyError> {
        let slots = self.slots(region, 0, dirty.words().len())?;
        let groups: Vec<_> = slots.chunk_by(|slot, _| !slot.ends_with_a_stripe()).collect();
        let stripes = groups.iter().map(|slots| slots.iter().map(|slot| slot.pages).sum::<u64>());
        let stripes = stripes.map(|pages| word_of(pages).div_ceil(STRIPE_WORDS));
        // While the kernel copies the bitmap of one slot (one at a time), workers OR those of other slots.
        dirty.mark_parts(stripes, |index, part| {
            self.scratch.with(|scratch| {
                groups[index].iter().try_for_each(|slot| {
                    part.mark_many_words(word_of(slot.first_page), self.get(slot, scratch)?);
                    Ok(())
                })
            })?
        })
    }

    fn clear(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        let end = first_page + bits.len() as u64 * 64;
        for slot in self.slots(region, first_page, bits.len())? {
            let (from, to) = (first_page.max(slot.first_page), end.min(slot.first_page + slot.pages));
            if from < to {
                let bits = &bits[word_of(from - first_page)..word_of((to - first_page).next_multiple_of(64))];
                self.clear(slot, from - slot.first_page, bits)?;
            }
        }
        Ok(())
    }

    /// KVM shows the pages that are to be sent until they are cleared.
    fn peek(&self, uncleared: u64) -> Result<Option<u64>, DirtyError> {
        let mut shown = 0;
        for slot in self.slots.regions.iter().flatten() {
            let count = |words: &[u64]| words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            shown += self.scratch.with(|scratch| self.get(slot, scratch).map(count))??;
        }
        Ok(Some(shown.saturating_sub(uncleared)))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.slots.forget()
    }
}

/// Buffers that are not in use.
#[derive(Debug)]
struct Scratch {
    words: usize,
    free: Mutex<Vec<GuardedWords>>,
}

impl Scratch {
    /// Makes buffers of this many words each.
    fn new(words: usize) -> Self {
        Self { words, free: Mutex::default() }
    }

    /// Calls `work` with a buffer, making one if all are in use.
    fn with<T>(&self, work: impl FnOnce(&mut GuardedWords) -> T) -> Result<T, DirtyError> {
        let free = || self.free.lock().ignore_poison();
        let last = free().pop();
        let mut buffer = match last {
            Some(buffer) => buffer,
            None => GuardedWords::new(self.words).map_err(DirtyError::NoMemory)?,
        };
        let done = work(&mut buffer);
        free().push(buffer);
        Ok(done)
    }
}

/// The memory slots of a VM that are its guest's RAM.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) vm: OwnedFd,
    /// The slots of each region, ascending and without gaps.
    pub(super) regions: Vec<Vec<RegionSlot>>,
    /// Keeps the memory of the slots mapped.
    #[expect(dead_code, reason = "held for its ownership")]
    ram: GuestRam,
}

/// A slot in its region.
#[derive(Clone, Copy, Debug)]
pub(super) struct RegionSlot {
    pub(super) kvm: KvmSlot,
    /// Its first page, counted from the region's start: a multiple of 64.
    pub(super) first_page: u64,
    pub(super) pages: u64,
}

impl RegionSlot {
    fn ends_with_a_stripe(&self) -> bool {
        (self.first_page + self.pages).is_multiple_of(STRIPE_PAGES)
    }

    /// The words of its bitmap.
    fn words(&self) -> usize {
        usize::try_from(self.pages.div_ceil(64)).expect("RAM that is mapped here fits usize")
    }
}

impl Slots {
    /// As for [`KvmLog::new`], which is unsafe because of its use of these slots.
    pub(super) fn new(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<Self, DirtyError> {
        let mut slots = slots.into_iter();
        let regions = ram.regions().iter().map(|region| slots_of(region, &mut slots));
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        match slots.next() {
            Some(KvmSlot { slot, .. }) => Err(DirtyError::Slot { slot: Some(slot) }),
            None => Ok(Self { vm, regions, ram: ram.clone() }),
        }
    }

    /// Has KVM record writes to them.
    pub(super) fn watch(&self) -> Result<(), DirtyError> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Stops KVM's record.
    pub(super) fn forget(&self) -> Result<(), DirtyError> {
        self.set_flags(0)
    }

    /// Whether KVM records writes to a slot, or may.
    fn is_watched(&self, slot: &KvmSlot) -> bool {
        // For zero pages the kernel clears nothing, but fails if it has no such slot or no bitmap for it.
        let request = kvm_clear_dirty_log { slot: slot.slot, ..Default::default() };
        // SAFETY: for zero pages, the kernel reads no bits.
        let result = unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &request) };
        result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT)
    }

    fn set_flags(&self, flags: u32) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for RegionSlot { kvm: slot, .. } in self.regions.iter().flatten() {
            // A slot that was deleted meanwhile must not be created again.
            if flags == 0 && !self.is_watched(slot) {
                continue;
            }
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.len_bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the structure has the kernel's layout. The VMM set the slot with the same addresses and
            // size, as the caller of `new` promised, so the kernel changes the flags alone.
            let answer = unsafe { ioctl_with_ref(&self.vm, KVM_SET_USER_MEMORY_REGION(), &region) };
            // Continue after an error: as many slots as possible should get the flags.
            result = result.and(check(answer, "KVM_SET_USER_MEMORY_REGION", slot));
        }
        result
    }
}

/// Takes the slots of a region from the front of the remaining slots.
fn slots_of(
    region: &RamRegion,
    slots: &mut impl Iterator<Item = KvmSlot>,
) -> Result<Vec<RegionSlot>, DirtyError> {
    let RegionLayout { guest_address, len_bytes } = region.layout();
    let mut found = Vec::new();
    let mut start = 0;
    while start < len_bytes {
        let kvm = slots.next().ok_or(DirtyError::Slot { slot: None })?;
        let end = start.saturating_add(kvm.len_bytes);
        let whole_words = kvm.len_bytes > 0 && kvm.len_bytes.is_multiple_of(64 * PAGE_BYTES);
        let in_place = kvm.guest_address == guest_address + start
            && kvm.host_address == region.host_address() + start
            && (end == len_bytes || end < len_bytes && whole_words);
        if !in_place {
            return Err(DirtyError::Slot { slot: Some(kvm.slot) });
        }
        found.push(RegionSlot { kvm, first_page: start / PAGE_BYTES, pages: kvm.len_bytes / PAGE_BYTES });
        start = end;
    }
    Ok(found)
}

/// The word of a page that is a multiple of 64.
fn word_of(page: u64) -> usize {
    usize::try_from(page / 64).expect("it is within a bitmap that is in memory")
}

fn check(result: libc::c_int, call: &'static str, slot: &KvmSlot) -> Result<(), DirtyError> {
    if result < 0 {
        return Err(DirtyError::Ioctl { call, slot: slot.slot, error: io::Error::last_os_error() });
    }
    Ok(())
}
