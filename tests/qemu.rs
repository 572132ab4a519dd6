//! Guests of stock QEMU, moved by `sterna adopt`, `receive` and `migrate`: they check their own memory, disk,
//! clocks and network.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::path::Path;

use serde_json::json;

use common::qemu::{BootSector, Disk, Held, LinuxGuest, Memory, NAME, Network, Program, Setup, Waiting};
use common::{ENDLESS, Host, in_a_lab, wait_until};
use sterna::transport::rdma::RdmaPath;

/// How often the Linux guest moves; the nightly checks set more.
fn hops() -> usize {
    std::env::var("STERNA_QEMU_HOPS").ok().and_then(|hops| hops.parse().ok()).unwrap_or(3)
}

#[test]
fn a_linux_guest_moves_back_and_forth_under_load_and_stays_whole() {
    for multifd in [None, Some(4)] {
        let Some(program) = Program::find("10") else { return };
        let (disk, network) = (Disk::new(64), Network::new());
        let setup = Setup::linux(&program, LinuxGuest::default()).disk(&disk).network(&network);
        let qemu = setup.start();
        qemu.serial().wait_for_ticks(2);
        let session = network.connect();
        let mut lines = 1;
        assert_eq!(session.exchange("before"), lines);
        let mut held = Held::adopt(qemu, &[]);
        for _ in 0..hops() {
            if let Some(channels) = multifd {
                held.qemu.monitor.set_capabilities(&[("multifd", true)]);
                let channels = json!({ "multifd-channels": channels });
                held.qemu.monitor.execute("migrate-set-parameters", channels);
            }
            (held, _) = held.move_to(&setup, &["--downtime-limit=2000"]);
            lines += 1;
            assert_eq!(session.exchange("after"), lines, "the TCP session goes on");
            let tick = held.qemu.serial().wait_for_ticks(3);
            assert_eq!((tick.wrong(), tick.jump_ms), (0, 0), "{tick:?}");
            assert_eq!(held.qemu.serial().complaints(), Vec::<String>::new());
        }
        let serial = held.qemu.stop_linux();
        assert!(serial.text().contains("load: disk unmounted"), "{}", serial.end());
        disk.expect_clean();
    }
}

/// Moves a boot sector twice, and asserts that it finds every page as it wrote the page.
#[track_caller]
fn moves_whole(setup: &Setup<'_>, destination: &Setup<'_>) {
    let qemu = setup.start();
    qemu.serial().wait_for_sweeps(1);
    let held = Held::adopt(qemu, &[]);
    let (held, _) = held.move_to(destination, &[]);
    checks_all_of_its_memory(&held);
    let (held, _) = held.move_to(setup, &[]);
    checks_all_of_its_memory(&held);
}

#[track_caller]
fn checks_all_of_its_memory(held: &Held) {
    held.qemu.serial().wait_for_sweeps(2);
    assert_eq!(held.qemu.serial().wrong_addresses(), Vec::<u64>::new());
}

#[test]
fn memory_of_each_kind_moves_whole() {
    let Some(program) = Program::find("10") else { return };
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let small = Setup::boot_sector(&program, BootSector::default());
    let kinds = [Memory::Memfd, Memory::File(folder.path().to_owned()), Memory::TwoNodes, Memory::Huge];
    for memory in kinds {
        if memory == Memory::Huge && !has_huge_pages(3 * 64 / 2) {
            println!("skipped: huge pages, of which this machine has too few: `sysctl vm.nr_hugepages=128`");
            continue;
        }
        let cpus = if memory == Memory::TwoNodes { 2 } else { 1 };
        let setup = small.clone().cpus(cpus).memory(memory);
        for setup in [setup.clone(), setup.prealloc()] {
            moves_whole(&setup, &setup);
        }
    }
}

/// On KVM: under TCG, QEMU 7.2 loses changed pages by itself.
#[test]
fn guests_move_between_versions_of_qemu_with_one_machine_type() {
    let (Some(old), Some(new)) = (Program::find("7.2"), Program::find("10")) else { return };
    if !has_kvm() {
        return;
    }
    for machine in ["pc-i440fx-7.2", "pc-q35-7.2"] {
        let setup = Setup::boot_sector(&old, ON_KVM).accelerator("kvm").machine(machine);
        moves_whole(&setup, &setup.clone().program(&new));
    }
}

#[test]
fn guests_on_kvm_move_whole() {
    if !has_kvm() {
        return;
    }
    for version in ["10", "7.2"] {
        let Some(program) = Program::find(version) else { return };
        let setup = Setup::boot_sector(&program, ON_KVM).accelerator("kvm");
        moves_whole(&setup, &setup);
    }
}

/// Small, because KVM may be emulated.
const ON_KVM: BootSector = BootSector { memory_mib: 24, hot_mib: 2, delay: 0 };

fn has_kvm() -> bool {
    let usable = matches!(sterna::host::kvm_access(), sterna::host::KvmAccess::Usable);
    if !usable {
        println!("skipped: a guest on KVM; `sterna check` tells what KVM lacks");
    }
    usable
}

/// A planted defect: the comparison of memory has to find it.
#[test]
#[cfg(debug_assertions)]
fn one_forgotten_page_in_a_thousand_is_found() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let qemu = setup.start();
    qemu.serial().wait_for_sweeps(1);
    let (waiting, held) = (Waiting::start(&setup), Held::adopt_forgetful(qemu));
    let failed = held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(10);
    assert!(failed.stderr.contains("differ"), "{}", failed.stderr);
    assert!(held.qemu.runs(), "{}", held.qemu.status());
}

fn has_huge_pages(count: u64) -> bool {
    let free = fs::read_to_string(Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"));
    free.ok().and_then(|free| free.trim().parse().ok()) >= Some(count)
}

#[test]
fn several_channels_of_qemu_are_read_and_no_page_is_lost() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    // Of types before 8.1 the marks that order pages are others, and before 9.0 the packets.
    for machine in ["pc", "pc-q35-7.2"] {
        let setup = setup.clone().machine(machine);
        let qemu = setup.start();
        qemu.serial().wait_for_sweeps(1);
        let mut held = Held::adopt(qemu, &[]);
        for channels in [1, 4] {
            held.qemu.monitor.set_capabilities(&[("multifd", true)]);
            held.qemu.monitor.execute("migrate-set-parameters", json!({ "multifd-channels": channels }));
            (held, _) = held.move_to(&setup, &[]);
            checks_all_of_its_memory(&held);
        }
    }
}

/// QEMU pauses such a guest by itself, if Sterna does not do it first.
#[test]
fn a_guest_that_writes_next_to_nothing_moves() {
    let Some(program) = Program::find("10") else { return };
    let idle = BootSector { hot_mib: 1, delay: 50_000_000, ..BootSector::default() };
    let setup = Setup::boot_sector(&program, idle);
    let mut held = Held::adopt(setup.start(), &[]);
    for _ in 0..3 {
        (held, _) = held.move_to(&setup, &[]);
    }
    assert_eq!(held.qemu.serial().wrong_addresses(), Vec::<u64>::new());
}

#[test]
fn a_guest_that_its_operator_has_paused_stays_paused() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let waiting = Waiting::start(&setup);
    let held = Held::adopt(setup.start_stopped(), &[]);
    let report = held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(0).json();
    assert_eq!((&report["status"], &report["wrong_pages"]), (&"completed".into(), &0.into()), "{report}");
    waiting.receiving.process.event("arrived");
    assert!(!waiting.qemu.runs(), "{}", waiting.qemu.status());
}

#[test]
fn after_a_cancelled_migration_the_guest_runs_and_the_operators_settings_are_back() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector { hot_mib: 32, ..BootSector::default() });
    let (waiting, qemu) = (Waiting::start(&setup), setup.start());
    qemu.serial().wait_for_sweeps(1);
    qemu.monitor.execute("migrate-set-parameters", json!({ "downtime-limit": 123, "max-bandwidth": 98_304 }));
    let settings = |qemu: &common::qemu::Qemu| {
        let mut capabilities = qemu.monitor.execute("query-migrate-capabilities", json!({}));
        let capabilities = capabilities.as_array_mut().map(std::mem::take);
        (capabilities, qemu.monitor.execute("query-migrate-parameters", json!({})))
    };
    let before = settings(&qemu);
    let held = Held::adopt(qemu, &[]);
    let slow = ["--bandwidth-limit=2", "--downtime-limit=1", "--max-rounds=1000", "--if-stuck=abort"];
    let migrating = held.migrate(waiting.receiving.address, &slow);
    wait_until("QEMU names pages", || held.qemu.migration_status() == "active");
    assert_eq!(held.host.ask(NAME, "cancel")["answer"], "done");
    migrating.wait().expect_code(130);
    assert!(held.qemu.runs());
    assert_eq!(settings(&held.qemu), before);
    // The QEMU at the destination has taken nothing, and takes the guest now.
    held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(0);
    checks_all_of_its_memory(&waiting.arrived_from(held));
}

#[test]
fn what_does_not_fit_is_refused_by_name_before_anything_is_sent() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let held = Held::adopt(setup.start(), &[]);
    let others = [
        (setup.clone().machine("pc"), "the machine type is"),
        (setup.clone().cpus(2), "the number of vCPUs is 1 at the source and 2 at the destination"),
        (setup.clone().memory(Memory::TwoNodes).cpus(2), "mem1"),
        (setup.clone().cpu("qemu64,-sse3"), "the CPU at the destination lacks pni"),
    ];
    for (other, why) in others {
        let waiting = Waiting::start(&other);
        let refused = held.migrate(waiting.receiving.address, &[]).wait().expect_code(11);
        assert!(refused.stderr.contains(why), "{why}: {}", refused.stderr);
        assert!(held.qemu.runs(), "{why}");
        assert_eq!(held.qemu.migration_status(), "", "{why}: nothing was asked of QEMU");
    }
}

#[test]
fn a_qemu_whose_memory_is_not_shared_is_not_adopted() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let qemu = setup.start_with_private_memory();
    let host = Host::new();
    let socket = format!("--qmp={}", qemu.qmp().display());
    let refused = host.start(["adopt", NAME, socket.as_str()]).wait().expect_code(11);
    assert!(refused.stderr.contains("share=on"), "{}", refused.stderr);
    assert!(qemu.runs());
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_by_qemu_and_moves() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector { hot_mib: 32, ..BootSector::default() });
    let qemu = setup.start();
    qemu.serial().wait_for_sweeps(1);
    let (waiting, held) = (Waiting::start(&setup), Held::adopt(qemu, &[]));
    let slowing =
        ["--bandwidth-limit=20", "--downtime-limit=400", "--max-rounds=1000", "--if-stuck=throttle,stop"];
    let migrating = held.migrate(waiting.receiving.address, &[&slowing[..], &["--verify=full"]].concat());
    migrating.says("guest slowed by");
    let report = migrating.wait().expect_code(0).json();
    assert_eq!((&report["status"], &report["wrong_pages"]), (&"completed".into(), &0.into()), "{report}");
    checks_all_of_its_memory(&waiting.arrived_from(held));
}

#[test]
fn a_guest_whose_writes_kvm_lists_in_rings_may_be_limited_in_them_only_while_it_migrates() {
    if !matches!(sterna::host::kvm_access(), sterna::host::KvmAccess::Usable) {
        println!("skipped: a guest on KVM; `sterna check` tells what KVM lacks");
        return;
    }
    let Some(program) = Program::find("10") else { return };
    let guest = BootSector { memory_mib: 24, hot_mib: 8, ..BootSector::default() };
    let setup = Setup::boot_sector(&program, guest).accelerator("kvm,dirty-ring-size=4096");
    let qemu = setup.start();
    qemu.serial().wait_for_sweeps(1);
    let (waiting, held) = (Waiting::start(&setup), Held::adopt(qemu, &[]));
    let limits = || held.qemu.monitor.execute("query-vcpu-dirty-limit", json!({}));
    // The first round takes longer than the test, however fast KVM is.
    let migrating = held.migrate(waiting.receiving.address, &["--bandwidth-limit=1"]);
    wait_until("QEMU counts what each vCPU writes", || limits()[0]["limit-rate"].is_u64());
    held.host.start(["cancel", NAME]).wait().expect_code(0);
    migrating.wait().expect_code(130);
    assert_eq!(limits(), json!([]));
    checks_all_of_its_memory(&held.move_to(&setup, &["--downtime-limit=10000"]).0);
}

/// From the second round on, each round has to pin more than this end may lock.
#[test]
fn rdma_that_fails_under_way_makes_way_for_tcp() {
    let Some(program) = Program::find("10") else { return };
    if RdmaPath::any_address().is_none() {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!("skipped: no RDMA device on this machine; `ci/lab uml` has one");
        return;
    }
    let setup = Setup::boot_sector(&program, BootSector { memory_mib: 96, hot_mib: 80, delay: 0 });
    let limited = || Host::that_may_lock(80 << 20);
    let hosts = [(limited(), Host::new(), false), (Host::new(), limited(), true)];
    for (source, destination, limited_there) in hosts {
        let waiting = Waiting::start_at(destination, &setup);
        let held = Held::adopt_at(source, setup.start(), &[]);
        held.qemu.serial().wait_for_sweeps(0);
        let mut arguments = vec!["--verify=full", "--lanes=1", "--pin-limit=64M", "--bandwidth-limit=20"];
        arguments.extend(&ENDLESS[..4]);
        let migrating = held.migrate(waiting.receiving.address, &arguments);
        migrating.says("over RDMA");
        migrating.says("round 2:");
        if limited_there { &waiting.receiving.process } else { &held.process }.may_lock_no_more();
        migrating.says("RDMA failed, going on over TCP: ");
        migrating.says("over TCP: 1 TCP stream");
        held.host.start(["migrate", NAME, "--set", "downtime-limit=60000"]).wait().expect_code(0);
        let report = migrating.wait().expect_code(0).json();
        assert_eq!((&report["transport"], &report["wrong_pages"]), (&"tcp".into(), &0.into()), "{report}");
        assert_eq!(report["verified_pages"], (96 << 20) / 4096, "{report}");
        let why = report["fell_back"].as_str().expect("it says why");
        assert!(why.contains("cannot pin") && why.contains("ulimit -l"), "{why}");
        assert_eq!(why.contains("at the other side"), limited_there, "{why}");
        checks_all_of_its_memory(&waiting.arrived_from(held));
    }
}
