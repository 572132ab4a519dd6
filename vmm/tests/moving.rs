//! A guest's state is saved, loaded by another machine, and found whole; anything else is refused.

#![expect(unsafe_code, reason = "the dirty log is read by KVM's own calls on the machine's file descriptor")]

mod common;

use std::os::fd::IntoRawFd;

use common::{
    GIB, MIB, PATIENCE, busy, config, copy_ram, idle, kinds, kvm, move_guest, run_on, take_software_dirty,
    touched_pages, until, write,
};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use sterna_vmm::{DirtyTracking, MAX_STATE_BYTES, Machine, MachineError, PAGE_BYTES, Phase, Workload};

#[test]
fn a_guest_moves_and_moves_again() {
    for new in kinds() {
        for vcpus in [1, 4] {
            for workload in [idle(), busy()] {
                let mut machine = new(config(32 * MIB, vcpus, workload)).unwrap();
                machine.start().unwrap();
                run_on(&*machine);
                for _ in 0..3 {
                    machine = move_guest(&*machine, new);
                }
            }
        }
    }
}

#[test]
fn a_guest_with_memory_above_the_hole_moves() {
    for new in kinds() {
        let workload = Workload { working_set_bytes: 4 * MIB, rate_mb_per_s: 40, prefill: true, sweepers: 0 };
        let machine = new(config(5 * GIB + 4096, 2, workload)).unwrap();
        machine.start().unwrap();
        run_on(&*machine);
        let moved = move_guest(&*machine, new);
        let pages = touched_pages(moved.memory());
        let above = pages.iter().filter(|(page, _)| page * PAGE_BYTES >= 4 * GIB).count();
        assert!((350..450).contains(&above), "two fifths of the working set are above the hole: {above}");
        assert_eq!(
            pages.last().unwrap().0,
            (6 * GIB + 4096) / PAGE_BYTES - 1,
            "the last page of RAM is in it"
        );
    }
}

/// The timers' state is in the local APIC, in model specific registers, in PIC and PIT. A vCPU that has lost
/// its timer sleeps for ever.
#[test]
fn timers_go_on_after_the_move() {
    let Some(new) = kvm() else { return };
    let mut machine = new(config(32 * MIB, 2, idle())).unwrap();
    machine.start().unwrap();
    run_on(&*machine);
    for _ in 0..10 {
        machine = move_guest(&*machine, new);
        let before = machine.status();
        until("timers tick on", || {
            let now = machine.status();
            let ticking = now
                .vcpus
                .iter()
                .zip(&before.vcpus)
                .all(|(now, before)| now.timer_interrupts > before.timer_interrupts + 2);
            ticking && now.vcpus[0].pit_interrupts > before.vcpus[0].pit_interrupts + 1
        });
    }
}

#[test]
fn a_machine_that_was_loaded_can_be_saved_before_it_runs() {
    for new in kinds() {
        let source = new(config(32 * MIB, 2, busy())).unwrap();
        source.start().unwrap();
        run_on(&*source);
        source.pause().unwrap();
        let between = new(source.config().clone()).unwrap();
        copy_ram(&*source, &*between);
        between.load(&source.save().unwrap()).unwrap();
        between.pause().unwrap();
        drop(move_guest(&*between, new));
        // The source is unchanged and can run again.
        source.resume().unwrap();
        run_on(&*source);
        assert_eq!(source.check_from_inside(PATIENCE).unwrap().wrong, 0);
    }
}

#[test]
fn a_page_lost_on_the_way_is_found_from_inside() {
    for new in kinds() {
        let source = new(config(32 * MIB, 1, idle())).unwrap();
        source.start().unwrap();
        run_on(&*source);
        source.pause().unwrap();
        let target = new(source.config().clone()).unwrap();
        copy_ram(&*source, &*target);
        let lost = 32 * MIB / PAGE_BYTES - 3;
        write(target.memory(), lost, &[0; 4096]);
        target.load(&source.save().unwrap()).unwrap();
        assert_eq!(target.check_from_outside().unwrap().wrong, 1);
        target.resume().unwrap();
        let check = target.check_from_inside(PATIENCE).unwrap();
        assert_eq!((check.wrong, check.first_wrong), (1, Some(lost * PAGE_BYTES)));
    }
}

/// The VMM's own writes are in its bitmap and not in KVM's log. Without them the copy is wrong, and the guest
/// notices.
#[test]
fn a_copy_without_what_the_vmm_wrote_is_found_out() {
    let Some(new) = kvm() else { return };
    let source = new(config(32 * MIB, 2, busy())).unwrap();
    source.start().unwrap();
    run_on(&*source);
    source.pause().unwrap();
    let log = DirtyLog::start(&*source);
    take_software_dirty(source.memory());
    let [with, without] = [(), ()].map(|()| new(source.config().clone()).unwrap());
    copy_ram(&*source, &*with);
    copy_ram(&*source, &*without);
    source.resume().unwrap();
    run_on(&*source);
    source.pause().unwrap();

    let (by_vcpus, by_vmm) = (log.take(), take_software_dirty(source.memory()));
    assert!(!by_vcpus.is_empty() && !by_vmm.is_empty());
    assert!(by_vmm.iter().all(|page| !by_vcpus.contains(page)), "only the VMM writes the journal");
    for &page in &by_vcpus {
        let content = common::read(source.memory(), page);
        write(with.memory(), page, &content);
        write(without.memory(), page, &content);
    }
    for &page in &by_vmm {
        write(with.memory(), page, &common::read(source.memory(), page));
    }
    let state = source.save().unwrap();
    for (target, right) in [(with, true), (without, false)] {
        target.load(&state).unwrap();
        assert_eq!(target.check_from_outside().unwrap().wrong == 0, right);
        target.resume().unwrap();
        run_on(&*target);
        let check = target.check_from_inside(PATIENCE).unwrap();
        assert_eq!(check.wrong == 0, right, "{check:?}");
    }
}

#[test]
fn what_is_no_state_of_this_machine_is_refused_and_harmless() {
    for new in kinds() {
        let source = new(config(32 * MIB, 2, idle())).unwrap();
        source.start().unwrap();
        run_on(&*source);
        source.pause().unwrap();
        let state = source.save().unwrap();
        assert!(state.len() < MAX_STATE_BYTES / 16);

        let target = new(source.config().clone()).unwrap();
        let refused = |bytes: &[u8]| {
            let result = target.load(bytes);
            assert!(matches!(result, Err(MachineError::State { .. })), "{result:?}");
            assert_eq!(target.status().phase, Phase::Fresh);
        };
        for len in (0..state.len()).step_by(state.len().div_ceil(50)) {
            refused(&state[..len]);
        }
        for index in (0..state.len()).step_by(state.len().div_ceil(200)) {
            let mut bytes = state.clone();
            bytes[index] ^= 1 << (index % 8);
            refused(&bytes);
        }
        let mut version = state.clone();
        version[8] += 1;
        refused(&version);
        refused(&[state.clone(), vec![0]].concat());
        refused(&vec![0xa5; 4096]);
        assert!(touched_pages(target.memory()).is_empty(), "a refused state leaves no trace in RAM");

        for other in [
            config(32 * MIB, 1, idle()),
            config(64 * MIB, 2, idle()),
            config(32 * MIB, 2, busy()),
            config(32 * MIB, 2, Workload { working_set_bytes: 2 * MIB, ..idle() }),
        ] {
            let machine = new(other).unwrap();
            let result = machine.load(&state);
            assert!(matches!(result, Err(MachineError::StateMismatch { .. })), "{result:?}");
        }

        copy_ram(&*source, &*target);
        target.load(&state).unwrap();
        target.resume().unwrap();
        run_on(&*target);
        assert_eq!(target.check_from_inside(PATIENCE).unwrap().wrong, 0);
    }
}

/// KVM's dirty log of a machine, through the machine's descriptor and slots.
struct DirtyLog {
    vm: VmFd,
    slots: Vec<sterna_vmm::MemorySlot>,
}

impl DirtyLog {
    fn start(machine: &dyn Machine) -> Self {
        let DirtyTracking::Kvm { vm, slots } = machine.dirty_tracking() else {
            panic!("a real machine has KVM's log");
        };
        let vm = vm.try_clone_to_owned().unwrap().into_raw_fd();
        // SAFETY: the clone is a VM's descriptor, and no other code has it.
        let vm = unsafe { Kvm::new().unwrap().create_vmfd_from_rawfd(vm) }.unwrap();
        for slot in &slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.len_bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: the same slot as before, with the log.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        Self { vm, slots }
    }

    fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for slot in &self.slots {
            let words = self.vm.get_dirty_log(slot.slot, usize::try_from(slot.len_bytes).unwrap()).unwrap();
            for (index, word) in (0..).zip(words) {
                let base = slot.guest_address / PAGE_BYTES + index * 64;
                pages.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| base + bit));
            }
        }
        pages
    }
}
