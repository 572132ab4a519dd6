//! KVM's dirty log as the engine reads it, of a real vCPU.

#[path = "common/writer.rs"]
mod writer;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::{Kvm, VmFd};
use memmap2::{MmapOptions, MmapRaw};
use sterna::dirty::{DirtyBitmap, DirtyError, DirtyLog, KvmLog, KvmSlot};
use sterna::host::{KvmAccess, kvm_access};
use sterna::memory::{GuestRam, RamLayout, RegionLayout, Runs};
use writer::Writer;

const MIB: u64 = 1 << 20;

#[test]
fn what_the_guest_writes_is_harvested_over_all_slots_until_it_is_cleared() {
    if !kvm() {
        return;
    }
    // The first and the second slot end within a stripe, the last within a word.
    let mut guest = Writer::new(&[17 * MIB, MIB, 2 * MIB + 4096 * 5], |_| {});
    let log = log_of(&guest.vm, guest.slots.clone(), &guest.ram).unwrap();
    let mut dirty = DirtyBitmap::new(&guest.ram.layout());
    log.start().unwrap();
    let all = dirty.regions()[0].pages();
    assert_eq!(dirty.harvest(&log).unwrap(), all, "the log begins with everything dirty");
    assert_eq!(log.peek(all).unwrap(), Some(0), "none of that was written since");
    log.clear(0, 0, dirty.regions()[0].words()).unwrap();
    dirty.clear();
    assert_eq!(dirty.harvest(&log).unwrap(), 0);

    // The last page of each slot and the first of the next.
    for page in [17 * 256 - 1, 18 * 256 - 1] {
        guest.write(page, 2, 1, || {});
    }
    guest.write(all - 1, 1, 1, || {});
    assert_eq!([0, 3].map(|uncleared| log.peek(uncleared).unwrap()), [Some(5), Some(2)]);
    let written = [(17 * 256 - 1, 2), (18 * 256 - 1, 2), (all - 1, 1)];
    for _ in 0..2 {
        dirty.clear();
        assert_eq!(dirty.harvest(&log).unwrap(), 5, "what is not cleared stays dirty");
        assert_eq!(runs(&dirty), written);
    }
    // Clears only a part, which begins in one slot and ends in the next.
    let first = 17 * 256 - 64;
    log.clear(0, first, &[1 << 63, 1]).unwrap();
    dirty.clear();
    dirty.harvest(&log).unwrap();
    assert_eq!(runs(&dirty), written[1..]);
    guest.write(17 * 256, 1, 1, || {});
    dirty.harvest(&log).unwrap();
    assert_eq!(runs(&dirty), [(17 * 256, 1), written[1], written[2]]);

    log.stop().unwrap();
    assert!(matches!(log.clear(0, 0, &[1]), Err(DirtyError::Ioctl { .. })), "nothing is recorded");
    assert!(matches!(log.clear(0, all.next_multiple_of(64), &[1]), Err(DirtyError::OutOfRange { .. })));
}

#[test]
fn several_workers_harvest_all_slots() {
    if !kvm() {
        return;
    }
    // Two slots end with a stripe, one within.
    let mut guest = Writer::new(&[16 * MIB, 15 * MIB, 17 * MIB, 16 * MIB, 33 * MIB], |_| {});
    let log = log_of(&guest.vm, guest.slots.clone(), &guest.ram).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let mut dirty = DirtyBitmap::new(&guest.ram.layout());
    log.start().unwrap();
    assert_eq!(pool.install(|| dirty.harvest(&log)).unwrap(), 97 * MIB / 4096);
    log.clear(0, 0, dirty.regions()[0].words()).unwrap();
    dirty.clear();
    let written = [1, 16 * 256, 31 * 256 - 1, 31 * 256 + 1, 48 * 256, 64 * 256, 97 * 256 - 1];
    written.iter().for_each(|&page| guest.write(page, 1, 1, || {}));
    assert_eq!(pool.install(|| dirty.harvest(&log)).unwrap(), 7);
    assert_eq!(runs(&dirty), written.map(|page| (page, 1)));
}

#[test]
fn slots_that_are_not_the_guests_ram_are_refused() {
    if !kvm() {
        return;
    }
    let guest = Writer::new(&[MIB, MIB], |_| {});
    let slots = |change: &dyn Fn(&mut Vec<KvmSlot>)| {
        let mut slots = guest.slots.clone();
        change(&mut slots);
        match log_of(&guest.vm, slots, &guest.ram) {
            Err(DirtyError::Slot { slot }) => slot,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(slots(&|slots| slots.truncate(1)), None);
    assert_eq!(slots(&|slots| slots.push(slots[0])), Some(0));
    assert_eq!(slots(&|slots| slots.swap(0, 1)), Some(1));
    assert_eq!(slots(&|slots| slots[1].host_address += 4096), Some(1));
    assert_eq!(slots(&|slots| slots[1].len_bytes += 4096), Some(1));
    assert_eq!(slots(&|slots| slots[0].len_bytes -= 4096), Some(0));
    assert_eq!(slots(&|slots| slots[0].len_bytes = 0), Some(0));
}

/// A VM with a slot of some megabytes, and a log that was made for `LOGGED_BYTES` bytes.
struct Plugged {
    vm: VmFd,
    ram: GuestRam,
    host_address: u64,
}

const LOGGED_BYTES: u64 = 3 * MIB;

impl Plugged {
    fn new() -> Self {
        let mapping = MmapOptions::new().len(64 << 20).map_anon().unwrap();
        let logged = RegionLayout { guest_address: 0, len_bytes: LOGGED_BYTES };
        let mapping = Arc::new(MmapRaw::from(mapping));
        let ram = GuestRam::from_mapping(&mapping, &RamLayout { regions: vec![logged] }).unwrap();
        let host_address = ram.regions()[0].host_address();
        Self { vm: Kvm::new().unwrap().create_vm().unwrap(), ram, host_address }
    }

    fn log(&self) -> KvmLog {
        log_of(&self.vm, vec![self.slot(LOGGED_BYTES)], &self.ram).unwrap()
    }

    fn slot(&self, len_bytes: u64) -> KvmSlot {
        KvmSlot { slot: 3, guest_address: 0, len_bytes, host_address: self.host_address }
    }

    /// Plugs memory of another length, with the dirty log on.
    fn plug(&self, len_bytes: u64) {
        writer::set_slot(&self.vm, &self.slot(0), 0);
        writer::set_slot(&self.vm, &self.slot(len_bytes), KVM_MEM_LOG_DIRTY_PAGES);
    }
}

#[test]
fn a_slot_that_is_larger_than_the_vmm_said_is_an_error_and_overwrites_nothing() {
    if !kvm() {
        return;
    }
    for len_bytes in [64 * MIB, LOGGED_BYTES + 65 * 4096, LOGGED_BYTES + 4096] {
        let guest = Plugged::new();
        writer::set_slot(&guest.vm, &guest.slot(len_bytes), KVM_MEM_LOG_DIRTY_PAGES);
        let (log, mut dirty) = (guest.log(), DirtyBitmap::new(&guest.ram.layout()));
        let harvested = dirty.harvest(&log);
        assert!(matches!(harvested, Err(DirtyError::SlotChanged { slot: 3 })), "{len_bytes}: {harvested:?}");
        assert_eq!(dirty.count(), 0);
        // The kernel does not take flags for a slot of another size either.
        assert!(matches!(log.start(), Err(DirtyError::Ioctl { slot: 3, .. })));
    }
}

#[test]
fn a_slot_that_is_replaced_between_harvests_is_an_error() {
    if !kvm() {
        return;
    }
    for len_bytes in [64 * MIB, LOGGED_BYTES + 4096, LOGGED_BYTES - 64 * 4096, 4096] {
        let guest = Plugged::new();
        writer::set_slot(&guest.vm, &guest.slot(LOGGED_BYTES), 0);
        let (log, mut dirty) = (guest.log(), DirtyBitmap::new(&guest.ram.layout()));
        log.start().unwrap();
        assert_eq!(dirty.harvest(&log).unwrap(), LOGGED_BYTES / 4096);
        guest.plug(len_bytes);
        let harvested = dirty.harvest(&log);
        assert!(matches!(harvested, Err(DirtyError::SlotChanged { slot: 3 })), "{len_bytes}: {harvested:?}");
        assert!(log.stop().is_err(), "it is another slot, and stays as it is");
        guest.plug(LOGGED_BYTES);
        assert_eq!(dirty.harvest(&log).unwrap(), LOGGED_BYTES / 4096);
        log.stop().unwrap();
    }
}

#[test]
fn a_slot_that_is_deleted_between_harvests_is_an_error_and_is_not_made_again() {
    if !kvm() {
        return;
    }
    let guest = Plugged::new();
    writer::set_slot(&guest.vm, &guest.slot(LOGGED_BYTES), 0);
    let (log, mut dirty) = (guest.log(), DirtyBitmap::new(&guest.ram.layout()));
    log.start().unwrap();
    writer::set_slot(&guest.vm, &guest.slot(0), 0);
    assert!(matches!(dirty.harvest(&log), Err(DirtyError::Ioctl { slot: 3, .. })));
    log.stop().unwrap();
    // KVM refuses a slot that overlaps another.
    writer::set_slot(&guest.vm, &KvmSlot { slot: 4, ..guest.slot(MIB) }, 0);
}

fn runs(dirty: &DirtyBitmap) -> Vec<(u64, u64)> {
    Runs::new(dirty.regions()[0].words()).collect()
}

#[expect(unsafe_code, reason = "a VMM answers for its memory slots")]
fn log_of(vm: &VmFd, slots: Vec<KvmSlot>, ram: &GuestRam) -> Result<KvmLog, DirtyError> {
    // SAFETY: the slots of these VMs name memory that `ram` keeps mapped for as long as the VM is used.
    unsafe { KvmLog::new(descriptor(vm), slots, ram) }
}

fn descriptor(file: &impl AsRawFd) -> OwnedFd {
    borrowed(file).try_clone_to_owned().unwrap()
}

#[expect(unsafe_code, reason = "kvm-ioctls gives its descriptors only as numbers")]
fn borrowed(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: `file` owns the descriptor and keeps it open at least as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

/// Whether KVM is available; if not, prints a remedy.
fn kvm() -> bool {
    match kvm_access() {
        KvmAccess::Usable => true,
        unusable => {
            println!("skipped: {unusable}");
            false
        }
    }
}
