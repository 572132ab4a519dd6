//! Machines of both kinds run, stand still, slow down, and detect damage to their memory.

#[expect(dead_code, reason = "each test program uses its part")]
mod common;

use std::thread;
use std::time::Duration;

use common::{GIB, MIB, PATIENCE, busy, config, idle, kinds, kvm, read, run_on, touched_pages, until, write};
use sterna_vmm::{
    HugePageSize, MachineError, MachineKind, PAGE_BYTES, Phase, SharedMachine, Workload, host_cpu, new_kvm,
    new_synthetic,
};

#[test]
fn a_guest_boots_beats_and_sweeps() {
    for new in kinds() {
        for vcpus in [1, 4] {
            let machine = new(config(32 * MIB, vcpus, busy())).unwrap();
            assert_eq!(machine.status().phase, Phase::Fresh);
            assert!(touched_pages(machine.memory()).is_empty(), "a fresh machine's RAM is untouched");
            machine.start().unwrap();
            for _ in 0..3 {
                run_on(&*machine);
            }
            let status = machine.status();
            assert!(status.vcpus.iter().all(|vcpu| vcpu.heartbeat.regressions == 0));
            assert!(status.passes >= 3);
            if machine.kind() == MachineKind::Kvm {
                assert_eq!(machine.console(), b"sterna guest: up\r\n");
                until("the PIT ticks", || machine.status().vcpus[0].pit_interrupts > 2);
            }
        }
    }
}

#[test]
fn an_idle_guest_wakes_by_its_timer() {
    let Some(new) = kvm() else { return };
    let machine = new(config(32 * MIB, 2, idle())).unwrap();
    machine.start().unwrap();
    until("each vCPU takes timer interrupts", || {
        machine.status().vcpus.iter().all(|vcpu| vcpu.timer_interrupts > 5)
    });
    let once = Workload { working_set_bytes: MIB, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
    let machine = new(config(32 * MIB, 2, once)).unwrap();
    machine.start().unwrap();
    until("the first pass is done", || machine.status().passes == 1);
    run_on(&*machine);
    assert_eq!(machine.status().vcpus.iter().map(|vcpu| vcpu.pages_written).sum::<u64>(), MIB / PAGE_BYTES);
    assert_eq!(machine.check_from_inside(PATIENCE).unwrap().wrong, 0);
}

#[test]
fn whenever_it_is_paused_memory_is_right_and_stands_still() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 3, busy())).unwrap();
        machine.start().unwrap();
        for round in 0..25 {
            thread::sleep(Duration::from_micros(1700 * (round % 7)));
            machine.pause().unwrap();
            machine.pause().unwrap();
            assert_eq!(machine.status().phase, Phase::Paused);
            let check = machine.check_from_outside().unwrap();
            assert_eq!(check.wrong, 0, "{check:?}");
            // The working set, a control page for each vCPU, and the journal.
            assert_eq!(check.pages, 256 + 3 + 32);
            if round % 5 == 0 {
                let before = (touched_pages(machine.memory()), machine.status());
                thread::sleep(Duration::from_millis(20));
                assert!(before == (touched_pages(machine.memory()), machine.status()));
            }
            machine.resume().unwrap();
            machine.resume().unwrap();
        }
        run_on(&*machine);
    }
}

#[test]
fn a_guest_finds_its_own_memory_right_while_it_sweeps() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 2, busy())).unwrap();
        machine.start().unwrap();
        for _ in 0..3 {
            let check = machine.check_from_inside(PATIENCE).unwrap();
            assert_eq!((check.pages, check.wrong), (256 + 2 + 32, 0));
            run_on(&*machine);
        }
    }
}

/// Changes the memory of a paused idle guest; both the outside and the inside check must find it.
fn assert_found(machine: &SharedMachine, pages: &[u64], change: impl FnOnce()) {
    machine.pause().unwrap();
    let before: Vec<_> = pages.iter().map(|&page| read(machine.memory(), page)).collect();
    change();
    let outside = machine.check_from_outside().unwrap();
    machine.resume().unwrap();
    let inside = machine.check_from_inside(PATIENCE).unwrap();
    for check in [outside, inside] {
        assert_eq!(check.wrong, pages.len() as u64, "{check:?}");
        assert_eq!(check.first_wrong, Some(pages[0] * PAGE_BYTES));
    }
    machine.pause().unwrap();
    pages.iter().zip(before).for_each(|(&page, content)| write(machine.memory(), page, &content));
    assert_eq!(machine.check_from_outside().unwrap().wrong, 0);
    machine.resume().unwrap();
}

#[test]
fn every_change_to_memory_is_found_and_nothing_else() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 1, idle())).unwrap();
        machine.start().unwrap();
        run_on(&*machine);
        let memory = machine.memory();
        // The pattern's pages: behind the page tables, and up to the end of RAM.
        let set: Vec<u64> =
            touched_pages(memory).iter().map(|&(page, _)| page).filter(|&page| page > 0x102).collect();
        assert_eq!(set.len(), 256);
        let (first, last) = (set[0], set[255]);
        assert_eq!((last + 1) * PAGE_BYTES, 32 * MIB);

        let content = read(memory, first);
        let words: Vec<usize> = (0..4096).step_by(8).filter(|&at| content[at..at + 8] != [0; 8]).collect();
        assert_eq!(words.len(), 8, "one word in each block");
        for at in words {
            assert_found(&machine, &[first], || {
                let mut content = content.clone();
                content[at + 3] ^= 0x10;
                write(memory, first, &content);
            });
        }
        assert_found(&machine, &[last], || write(memory, last, &[0; 4096]));
        assert_found(&machine, &[set[7], set[200]], || {
            let (one, other) = (read(memory, set[7]), read(memory, set[200]));
            write(memory, set[7], &other);
            write(memory, set[200], &one);
        });
        assert_found(&machine, &[set[9]], || {
            write(memory, set[9], &[&read(memory, set[9])[..2048], &[0; 2048]].concat());
        });
    }
}

#[test]
fn an_old_page_is_found() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 1, busy())).unwrap();
        machine.start().unwrap();
        run_on(&*machine);
        machine.pause().unwrap();
        let page = 32 * MIB / PAGE_BYTES - 1;
        let old = read(machine.memory(), page);
        machine.resume().unwrap();
        run_on(&*machine);
        run_on(&*machine);
        machine.pause().unwrap();
        write(machine.memory(), page, &old);
        let check = machine.check_from_outside().unwrap();
        assert_eq!((check.wrong, check.first_wrong), (1, Some(page * PAGE_BYTES)));
    }
}

#[test]
fn a_throttled_guest_goes_on_and_can_be_paused() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 2, busy())).unwrap();
        machine.start().unwrap();
        for percent in [50, 99, 1, 90] {
            machine.throttle(percent).unwrap();
            assert_eq!(machine.status().throttle_percent, percent);
            let before = machine.heartbeat().count;
            until("a throttled guest beats", || machine.heartbeat().count > before + 3);
            machine.pause().unwrap();
            assert_eq!(machine.check_from_outside().unwrap().wrong, 0);
            machine.resume().unwrap();
        }
        machine.throttle(0).unwrap();
        run_on(&*machine);
        assert!(matches!(machine.throttle(100), Err(MachineError::Config(_))));
        assert_eq!(machine.status().throttle_percent, 0);
    }
}

#[test]
fn what_is_asked_at_the_wrong_time_is_refused_and_harmless() {
    fn refused<T: std::fmt::Debug>(result: &Result<T, MachineError>) {
        assert!(matches!(result, Err(MachineError::WrongPhase { .. })), "{result:?}");
    }
    for new in kinds() {
        let machine = new(config(32 * MIB, 1, idle())).unwrap();
        refused(&machine.pause());
        refused(&machine.resume());
        refused(&machine.save());
        refused(&machine.check_from_inside(PATIENCE));
        refused(&machine.check_from_outside());
        machine.start().unwrap();
        refused(&machine.start());
        refused(&machine.load(&[]));
        refused(&machine.save());
        refused(&machine.check_from_outside());
        run_on(&*machine);
        machine.pause().unwrap();
        refused(&machine.check_from_inside(PATIENCE));
        refused(&machine.start());
        machine.stop();
        machine.stop();
        refused(&machine.resume());
        refused(&machine.save());
        assert_eq!(machine.status().phase, Phase::Stopped);
    }
}

#[test]
fn a_broken_guest_is_a_failed_machine_and_no_panic() {
    let Some(new) = kvm() else { return };
    let machine = new(config(32 * MIB, 2, idle())).unwrap();
    machine.start().unwrap();
    run_on(&*machine);
    machine.pause().unwrap();
    // Without page tables the next instruction is the guest's last.
    for page in 0x100..0x103 {
        write(machine.memory(), page, &[0; 4096]);
    }
    // A processor may continue on cached translations, but not for long without code.
    write(machine.memory(), 8, &[0x0f; 4096]);
    machine.resume().unwrap();
    until("the guest fails", || matches!(machine.status().phase, Phase::Failed(_)));
    for result in [machine.pause(), machine.resume(), machine.check_from_inside(PATIENCE).map(drop)] {
        assert!(matches!(result, Err(MachineError::GuestFailed { .. })), "{result:?}");
    }
}

#[test]
fn a_silent_guest_is_reported() {
    for new in kinds() {
        let machine = new(config(32 * MIB, 1, idle())).unwrap();
        machine.start().unwrap();
        run_on(&*machine);
        // A single check may finish in no time, but not check after check.
        until("no answer in time", || {
            let result = machine.check_from_inside(Duration::ZERO);
            matches!(result, Err(MachineError::Timeout { missing: 1, .. }))
        });
        assert_eq!(machine.check_from_inside(PATIENCE).unwrap().wrong, 0, "and can be asked again");
    }
}

#[test]
fn impossible_machines_are_refused() {
    let none = Workload { working_set_bytes: 0, rate_mb_per_s: 0, prefill: false, sweepers: 0 };
    for new in [new_kvm, new_synthetic] as [common::Constructor; 2] {
        for (memory_bytes, vcpus) in [
            (0, 1),
            (15 * MIB, 1),
            (16 * MIB + 1, 1),
            (512 * GIB, 1),
            (!0xfff, 1),
            (16 * MIB, 0),
            (16 * MIB, 65),
        ] {
            let result = new(config(memory_bytes, vcpus, none.clone()));
            let no_kvm = matches!(result, Err(MachineError::KvmMissing | MachineError::KvmPermission));
            assert!(
                no_kvm || matches!(result, Err(MachineError::Config(_))),
                "{memory_bytes} {vcpus}: {result:?}"
            );
        }
    }
    let too_large = Workload { working_set_bytes: 16 * MIB, ..none.clone() };
    assert!(matches!(new_synthetic(config(16 * MIB, 1, too_large)), Err(MachineError::Config(_))));
    let mut uneven = config(17 * MIB, 1, none);
    uneven.hugepages = Some(HugePageSize::TwoMiB);
    assert!(matches!(new_synthetic(uneven), Err(MachineError::Config(_))));
}

#[test]
fn huge_pages_are_used_or_their_lack_is_explained() {
    for new in kinds() {
        let mut config = config(32 * MIB, 1, idle());
        config.hugepages = Some(HugePageSize::TwoMiB);
        match new(config) {
            Ok(machine) => {
                machine.start().unwrap();
                run_on(&*machine);
                assert_eq!(machine.check_from_inside(PATIENCE).unwrap().wrong, 0);
            }
            Err(error) => assert!(error.to_string().contains("nr_hugepages"), "{error}"),
        }
    }
}

#[test]
fn every_page_that_can_be_in_the_working_set_works() {
    for new in kinds() {
        let workload = Workload {
            working_set_bytes: Workload::largest_bytes(16 * MIB + 4096),
            rate_mb_per_s: 0,
            prefill: true,
            sweepers: 0,
        };
        let machine = new(config(16 * MIB + 4096, 3, workload)).unwrap();
        machine.start().unwrap();
        run_on(&*machine);
        assert_eq!(machine.check_from_inside(PATIENCE).unwrap().wrong, 0);
        machine.pause().unwrap();
        assert_eq!(machine.check_from_outside().unwrap().wrong, 0);
    }
    for memory_bytes in [16 * MIB, GIB, 5 * GIB] {
        assert!(
            Workload::for_memory(memory_bytes).working_set_bytes <= Workload::largest_bytes(memory_bytes)
        );
    }
}

#[test]
fn this_host_can_take_the_guests_that_it_makes() {
    let Some(new) = kvm() else { return };
    let machine = new(config(32 * MIB, 2, idle())).unwrap();
    let host = host_cpu().unwrap();
    assert!(host.is_within_bounds());
    assert_eq!(machine.cpu().missing_on(&host), Vec::<String>::new());
    assert!(!machine.cpu().missing_on(&sterna_vmm::CpuDescription::synthetic()).is_empty());
}
