//! A running guest is copied from its dirty rings, as a migration would, and the copy is whole.

#[expect(dead_code, reason = "not all of it is for rings")]
mod common;

use common::{
    MIB, PATIENCE, config, copy_ram, idle, kinds, kvm, read, run_on, take_software_dirty, touched_pages,
    until, write,
};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use sterna_vmm::{
    DirtyRings, DirtyTracking, Machine, MachineError, RING_ENTRIES_MAX, RING_ENTRIES_MIN, SharedMachine,
    Workload, new_kvm_with_rings,
};

/// Writes over 24 MiB as fast as it can: six times the entries of the shortest ring in each pass.
fn sweeping() -> Workload {
    Workload { working_set_bytes: 24 * MIB, rate_mb_per_s: 100_000, prefill: false, sweepers: 0 }
}

fn rings_of(machine: &dyn Machine) -> Arc<DirtyRings> {
    match machine.dirty_tracking() {
        DirtyTracking::Rings(rings) => rings,
        other => panic!("{other:?}"),
    }
}

/// A machine with rings, if this host has them.
fn machine(vcpus: u8, workload: Workload, entries: u32) -> Option<SharedMachine> {
    kvm()?;
    match new_kvm_with_rings(config(32 * MIB, vcpus, workload), entries) {
        Ok(machine) => Some(machine),
        Err(error @ MachineError::NoDirtyRing { .. }) => {
            assert!(std::env::var_os("STERNA_LAB").is_none(), "a lab must have rings: {error}");
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Copies the pages written since the last call.
fn follow(from: &dyn Machine, to: &dyn Machine, rings: &DirtyRings) -> usize {
    rings.collect().unwrap();
    let pages = take_software_dirty(from.memory());
    for &page in &pages {
        write(to.memory(), page, &read(from.memory(), page));
    }
    pages.len()
}

#[test]
fn a_running_guest_is_followed_however_often_its_rings_are_full() {
    for (vcpus, entries) in [(1, RING_ENTRIES_MIN), (3, RING_ENTRIES_MIN), (2, RING_ENTRIES_MAX)] {
        let Some(source) = machine(vcpus, sweeping(), entries) else { return };
        let rings = rings_of(&*source);
        source.start().unwrap();
        // Twice: a failed migration must not disturb the next one.
        for _ in 0..2 {
            let target = machine(vcpus, sweeping(), entries).unwrap();
            rings.watch().unwrap();
            take_software_dirty(source.memory());
            copy_ram(&*source, &*target);
            let full_before = rings.times_full();
            for _ in 0..3 {
                run_on(&*source);
                assert!(follow(&*source, &*target, &rings) > 0);
            }
            if entries == RING_ENTRIES_MIN {
                until("a ring is full", || rings.times_full() > full_before);
            }
            source.pause().unwrap();
            let state = source.save().unwrap();
            follow(&*source, &*target, &rings);
            assert_eq!(follow(&*source, &*target, &rings), 0, "who stands still writes nothing");
            rings.forget().unwrap();
            assert!(touched_pages(source.memory()) == touched_pages(target.memory()), "a page was lost");
            target.load(&state).unwrap();
            target.resume().unwrap();
            run_on(&*target);
            assert_eq!(target.check_from_inside(PATIENCE).unwrap().wrong, 0);
            source.resume().unwrap();
        }
    }
}

/// The first of two vCPUs sweeps, the other writes one page again and again.
fn one_sweeps() -> Workload {
    Workload { sweepers: 1, ..sweeping() }
}

#[test]
fn a_quota_holds_back_the_vcpu_that_writes_and_no_other() {
    let Some(machine) = machine(2, one_sweeps(), RING_ENTRIES_MAX) else { return };
    let rings = rings_of(&*machine);
    machine.start().unwrap();
    rings.watch().unwrap();
    run_on(&*machine);
    let quota = NonZeroU64::new(500);
    machine.limit_writes(quota).unwrap();
    assert_eq!(machine.status().pages_per_second, quota);
    let writes = || machine.vcpu_writes().unwrap();
    until("the vCPU that sweeps has stood still for a while", || {
        // Taken as by a harvest, so that pages count again.
        take_software_dirty(machine.memory());
        writes()[0].stood_still > Duration::from_millis(500)
    });
    let (before, began) = (writes(), Instant::now());
    thread::sleep(Duration::from_secs(2));
    let (after, seconds) = (writes(), began.elapsed().as_secs_f64());
    // What it writes before its ring is looked at comes on top, which on a busy host is more.
    let pages = after[0].pages - before[0].pages;
    assert!(pages > 0 && pages as f64 <= 3.0 * 500.0 * seconds, "{pages} pages in {seconds:.1} s");
    // The marks were taken very often before, and that debt may not be over.
    let stood = after[1].stood_still - before[1].stood_still;
    assert!(stood < Duration::from_millis(300), "a page or two are within the quota: {stood:?}");
    assert!(after[0].stood_still - before[0].stood_still > stood * 3);
    machine.pause().unwrap();
    machine.resume().unwrap();
    machine.limit_writes(None).unwrap();
    assert_eq!(machine.status().pages_per_second, None);
    let stood = writes()[0].stood_still;
    run_on(&*machine);
    assert_eq!(writes()[0].stood_still, stood, "it runs at full speed again");
    rings.forget().unwrap();
    assert_eq!(machine.check_from_inside(PATIENCE).unwrap().wrong, 0);
}

#[test]
fn writes_that_cannot_be_told_apart_are_not_limited() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 1, idle())).unwrap();
        assert!(matches!(machine.limit_writes(NonZeroU64::new(1)), Err(MachineError::NoWriteQuota)));
        assert!(machine.vcpu_writes().is_none());
    }
}

#[test]
fn nothing_is_listed_unless_it_is_watched() {
    let Some(machine) = machine(1, sweeping(), RING_ENTRIES_MIN) else { return };
    let rings = rings_of(&*machine);
    machine.start().unwrap();
    run_on(&*machine);
    assert_eq!(rings.collect().unwrap(), 0);
    rings.watch().unwrap();
    run_on(&*machine);
    rings.forget().unwrap();
    let full = rings.times_full();
    run_on(&*machine);
    assert_eq!((rings.collect().unwrap(), rings.times_full()), (0, full));
}

#[test]
fn rings_that_no_kernel_has_are_refused() {
    if kvm().is_none() {
        return;
    }
    for entries in [0, 1, 512, 3000, RING_ENTRIES_MAX * 2, u32::MAX] {
        let refused = new_kvm_with_rings(config(32 * MIB, 1, idle()), entries);
        assert!(matches!(refused, Err(MachineError::Config(_))), "{entries}: {refused:?}");
    }
}
