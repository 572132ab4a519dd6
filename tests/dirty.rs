//! KVM's dirty log as the engine reads it, of a real vCPU.

#[path = "common/writer.rs"]
mod writer;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use sterna::dirty::{DirtyBitmap, DirtyError, DirtyLog, KvmLog};
use sterna::memory::Runs;
use sterna::preflight::{KvmAccess, kvm_access};
use writer::Writer;

const MIB: u64 = 1 << 20;

#[test]
fn what_the_guest_writes_is_harvested_over_all_slots_until_it_is_rearmed() {
    if !kvm() {
        return;
    }
    // The end of the first and the second slot lie within a stripe, and that of the last within a word.
    let mut guest = Writer::new(&[17 * MIB, MIB, 2 * MIB + 4096 * 5], |_| {});
    let log = KvmLog::new(descriptor(&guest.vm), guest.slots.clone(), &guest.ram).unwrap();
    let mut dirty = DirtyBitmap::new(&guest.ram.layout());
    log.start().unwrap();
    let all = dirty.regions()[0].pages();
    assert_eq!(dirty.harvest(&log).unwrap(), all, "the log begins with everything dirty");
    log.rearm(0, 0, dirty.regions()[0].words()).unwrap();
    dirty.clear();
    assert_eq!(dirty.harvest(&log).unwrap(), 0);

    // The last page of each slot and the first of the next.
    for page in [17 * 256 - 1, 18 * 256 - 1] {
        guest.write(page, 2, 1, || {});
    }
    guest.write(all - 1, 1, 1, || {});
    let written = [(17 * 256 - 1, 2), (18 * 256 - 1, 2), (all - 1, 1)];
    for _ in 0..2 {
        dirty.clear();
        assert_eq!(dirty.harvest(&log).unwrap(), 5, "what is not rearmed stays dirty");
        assert_eq!(runs(&dirty), written);
    }
    // Only a part, which begins in one slot and ends in the next.
    let first = 17 * 256 - 64;
    log.rearm(0, first, &[1 << 63, 1]).unwrap();
    dirty.clear();
    dirty.harvest(&log).unwrap();
    assert_eq!(runs(&dirty), written[1..]);
    guest.write(17 * 256, 1, 1, || {});
    dirty.harvest(&log).unwrap();
    assert_eq!(runs(&dirty), [(17 * 256, 1), written[1], written[2]]);

    log.stop().unwrap();
    assert!(matches!(log.rearm(0, 0, &[1]), Err(DirtyError::Ioctl { .. })), "nothing is recorded");
    assert!(matches!(log.rearm(0, all.next_multiple_of(64), &[1]), Err(DirtyError::OutOfRange { .. })));
}

#[test]
fn slots_that_are_not_the_guests_ram_are_refused() {
    if !kvm() {
        return;
    }
    let guest = Writer::new(&[MIB, MIB], |_| {});
    let slots = |change: &dyn Fn(&mut Vec<sterna::dirty::KvmSlot>)| {
        let mut slots = guest.slots.clone();
        change(&mut slots);
        match KvmLog::new(descriptor(&guest.vm), slots, &guest.ram) {
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

fn runs(dirty: &DirtyBitmap) -> Vec<(u64, u64)> {
    Runs::new(dirty.regions()[0].words()).collect()
}

fn descriptor(file: &impl AsRawFd) -> OwnedFd {
    borrowed(file).try_clone_to_owned().unwrap()
}

#[expect(unsafe_code, reason = "kvm-ioctls gives its descriptors only as numbers")]
fn borrowed(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: `file` owns the descriptor and keeps it open at least as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

/// Whether there is KVM; if not, says what would mend that.
fn kvm() -> bool {
    match kvm_access() {
        KvmAccess::Usable => true,
        unusable => {
            println!("skipped: {unusable}");
            false
        }
    }
}
