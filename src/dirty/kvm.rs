#![expect(
    unsafe_code,
    reason = "the KVM ioctls of the dirty log, which kvm-ioctls has not or only with an allocation a call"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use super::{DirtyError, DirtyLog};
use crate::memory::{GuestRam, PAGE_BYTES, RamRegion, RegionLayout};

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

impl KvmSlot {
    fn pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }
}

/// KVM's dirty log: what the vCPUs write.
///
/// With manual protection, `KVM_GET_DIRTY_LOG` only reads and `KVM_CLEAR_DIRTY_LOG` write-protects, in parts, just before
/// the pages are read; "initially set" spares the kernel a walk over all of RAM at the start. Both ioctls take one lock
/// per VM in the kernel, so calling them from several threads overlaps them with sending and speeds up nothing else.
#[derive(Debug)]
pub struct KvmLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    /// Keeps mapped what the slots name.
    #[expect(dead_code, reason = "held for its ownership")]
    ram: GuestRam,
    /// What the kernel fills before it is OR-ed into the caller's bits; kept from round to round.
    scratch: Mutex<Vec<u64>>,
}

impl KvmLog {
    /// The log of the VM behind `vm` (a duplicate of the VMM's descriptor), with one slot for each region of guest RAM, in
    /// the same order. The VMM must have set the slots without flags.
    ///
    /// # Errors
    /// [`DirtyError::Slot`] if a slot is not where its region is.
    pub fn new(vm: OwnedFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<Self, DirtyError> {
        let fits = |(slot, region): (&KvmSlot, &RamRegion)| {
            let RegionLayout { guest_address, len_bytes } = region.layout();
            (slot.guest_address, slot.len_bytes, slot.host_address)
                == (guest_address, len_bytes, region.host_address())
        };
        if slots.len() != ram.regions().len() {
            return Err(DirtyError::Slot { slot: None });
        }
        if let Some((wrong, _)) = slots.iter().zip(ram.regions()).find(|&pair| !fits(pair)) {
            return Err(DirtyError::Slot { slot: Some(wrong.slot) });
        }
        Ok(Self { vm, slots, ram: ram.clone(), scratch: Mutex::default() })
    }

    fn set_flags(&self, flags: u32) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.len_bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the structure is as the kernel wants it. It names guest RAM of `self.ram`, which is mapped there for as
            // long as this log lives; where the VMM set the slot so, as it must have, the kernel changes the flags alone.
            let answer = unsafe { ioctl_with_ref(&self.vm, KVM_SET_USER_MEMORY_REGION(), &region) };
            // On to the others all the same: as many as possible shall have the flags asked for.
            result = result.and(check(answer, "KVM_SET_USER_MEMORY_REGION", slot));
        }
        result
    }

    fn slot(&self, region: usize, first_page: u64, words: usize) -> Result<&KvmSlot, DirtyError> {
        self.slots
            .get(region)
            .filter(|slot| {
                first_page.is_multiple_of(64)
                    && first_page / 64 + words as u64 <= slot.pages().div_ceil(64)
                    && words > 0
            })
            .ok_or(DirtyError::OutOfRange { region, first_page, words })
    }
}

impl DirtyLog for KvmLog {
    fn start(&self) -> Result<(), DirtyError> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET), 0, 0, 0],
            ..Default::default()
        };
        // SAFETY: the structure is as the kernel wants it, and it is only read.
        let result = unsafe { ioctl_with_ref(&self.vm, KVM_ENABLE_CAP(), &capability) };
        if result < 0 {
            return Err(DirtyError::NoManualProtect(io::Error::last_os_error()));
        }
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES).inspect_err(|_| {
            // The error being returned matters more than one of the clean-up.
            let _ = self.stop();
        })
    }

    fn harvest(&self, region: usize, bits: &mut [u64]) -> Result<(), DirtyError> {
        let slot = self.slot(region, 0, bits.len())?;
        if bits.len() as u64 != slot.pages().div_ceil(64) {
            return Err(DirtyError::OutOfRange { region, first_page: 0, words: bits.len() });
        }
        // The ioctl overwrites what it is given, and what is set there already must stay.
        let mut log = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        log.resize(bits.len(), 0);
        let request = kvm_dirty_log {
            slot: slot.slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: log.as_mut_ptr().cast() },
        };
        // SAFETY: `log` has a bit for each page of the slot, rounded up to whole words as the kernel writes them.
        let result = unsafe { ioctl_with_ref(&self.vm, KVM_GET_DIRTY_LOG(), &request) };
        check(result, "KVM_GET_DIRTY_LOG", slot)?;
        for (bits, log) in bits.iter_mut().zip(log.iter()) {
            *bits |= *log;
        }
        Ok(())
    }

    fn rearm(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), DirtyError> {
        let slot = self.slot(region, first_page, bits.len())?;
        // A multiple of 64, except where the range ends with the slot.
        let pages = (bits.len() as u64 * 64).min(slot.pages() - first_page);
        let request = kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages: u32::try_from(pages).map_err(|_| DirtyError::OutOfRange {
                region,
                first_page,
                words: bits.len(),
            })?,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: `bits` has a bit for each of `num_pages` pages; the kernel only reads it.
        let result = unsafe { ioctl_with_ref(&self.vm, KVM_CLEAR_DIRTY_LOG(), &request) };
        check(result, "KVM_CLEAR_DIRTY_LOG", slot)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.set_flags(0)
    }
}

fn check(result: libc::c_int, call: &'static str, slot: &KvmSlot) -> Result<(), DirtyError> {
    if result < 0 {
        return Err(DirtyError::Ioctl { call, slot: slot.slot, error: io::Error::last_os_error() });
    }
    Ok(())
}
