//! Guests of stock QEMU whose migration is disturbed: a process of Sterna or a QEMU is killed, or the link
//! is cut, in each stage. No guest runs twice, the commands' reports are true, and the guest can be moved
//! afterwards, with all of its pages right.
//!
//! `STERNA_QEMU_FAULTS=all` tries each fault in each stage. `STERNA_QEMU_KILLS=100` kills that often at
//! random; `STERNA_SEED` is the first kill's seed, and each later kill uses the next number.
#![cfg(feature = "cli")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::qemu::{
    At, BootSector, Crossing, Disk, End, Fault, Held, LinuxGuest, Program, Setup, Strike, Victim, Waiting,
};
use common::{ENDLESS, Random};

/// What keeps a migration of the boot sector in its rounds for some time.
const SLOW: [&str; 4] =
    ["--bandwidth-limit=16", "--downtime-limit=300", "--max-rounds=10000", "--throttle-max=0"];

const STAGES: [At; 9] =
    [At::Hello, At::Bulk, At::Rounds, At::Paused, At::State, At::Final, At::Prepared, At::Go, At::Running];
const VICTIMS: [Victim; 5] = [
    Victim::SourceSterna,
    Victim::DestinationSterna,
    Victim::SourceQemu,
    Victim::DestinationQemu,
    Victim::Link,
];

fn boot_sector(program: &Program) -> Setup<'static> {
    let guest = BootSector { memory_mib: 48, hot_mib: 12, delay: 0 };
    Setup::boot_sector(program, guest)
}

/// Disturbs one migration, and asserts what must be so afterwards.
fn disturb(setup: &Setup<'_>, fault: Fault) -> End {
    let qemu = setup.start();
    qemu.serial().wait_for_sweeps(0);
    let is_slow = matches!(fault.at, At::Bulk | At::Rounds);
    let end = Crossing::new(setup, qemu, fault).migrate(if is_slow { &SLOW } else { &[] });
    if let Some(held) = &end.held {
        held.qemu.serial().wait_for_sweeps(1);
        assert_eq!(held.qemu.serial().wrong_addresses(), Vec::<u64>::new());
    }
    end
}

#[test]
fn each_fault_in_each_stage_leaves_one_guest_and_true_reports() {
    let Some(program) = Program::find("10") else { return };
    let all = std::env::var("STERNA_QEMU_FAULTS").is_ok_and(|which| which == "all");
    let setup = boot_sector(&program);
    let mut failed = Vec::new();
    for (row, &at) in STAGES.iter().enumerate() {
        for (column, &victim) in VICTIMS.iter().enumerate() {
            // Each stage and each victim is met often enough by a part of the cells.
            if !all && (row + column) % 4 != 0 {
                continue;
            }
            let fault = Fault { victim, at, delay: at.delay() };
            let begun = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| disturb(&setup, fault))) {
                Ok(end) => println!("{fault}: {end}, {:.1} s", begun.elapsed().as_secs_f64()),
                Err(_) => {
                    println!("{fault}: FAILED");
                    failed.push(fault.to_string());
                }
            }
        }
    }
    assert_eq!(failed, Vec::<String>::new());
}

/// Nothing else ends these rounds.
#[test]
fn a_qemu_that_ends_in_the_rounds_is_noticed_at_either_end() {
    let Some(program) = Program::find("10") else { return };
    let setup = boot_sector(&program);
    let endless = [&ENDLESS[..], &["--transport=tcp"]].concat();
    for at_source in [false, true] {
        let (waiting, qemu) = (Waiting::start(&setup), setup.start());
        qemu.serial().wait_for_sweeps(1);
        let held = Held::adopt(qemu, &[]);
        let migrating = held.migrate(waiting.receiving.address, &endless);
        migrating.says("round 1:");
        let killed = Instant::now();
        if at_source {
            held.qemu.kill();
            let ended = migrating.wait().expect_code(10);
            println!("at the source, noticed after {:.1} s", killed.elapsed().as_secs_f64());
            ended.says("cannot connect to QEMU's monitor");
            held.process.event("vmm-ended");
            held.process.wait().expect_code(0).says("QEMU has ended, and the guest with it");
        } else {
            let socket = waiting.qemu.qmp().display().to_string();
            waiting.qemu.kill();
            let ended = migrating.wait().expect_code(10);
            println!("at the destination, noticed after {:.1} s", killed.elapsed().as_secs_f64());
            ended.says("the destination gave up").says("the QEMU at the destination has ended").says(&socket);
            ended.says("where: the guest runs on at the source");
            assert!(held.qemu.runs(), "{}", held.qemu.status());
            held.move_to(&setup, &["--downtime-limit=5000"]);
        }
        waiting.receiving.process.says("a guest did not arrive");
    }
}

#[test]
fn a_disk_is_clean_after_a_fault_in_the_switch() {
    let Some(program) = Program::find("10") else { return };
    let faults = [(Victim::SourceSterna, At::Final), (Victim::DestinationQemu, At::Prepared)];
    for (victim, at) in faults {
        let disk = Disk::new(64);
        let setup = Setup::linux(&program, LinuxGuest::default()).disk(&disk);
        let qemu = setup.start();
        qemu.serial().wait_for_ticks(2);
        let end = Crossing::new(&setup, qemu, Fault { victim, at, delay: Duration::ZERO }).migrate(&[]);
        println!("{victim:?} {at:?}: {end}");
        let held = end.held.expect("the guest lives");
        let tick = held.qemu.serial().wait_for_ticks(2);
        assert_eq!(tick.wrong(), 0, "{tick:?}");
        assert_eq!(held.qemu.serial().complaints(), Vec::<String>::new());
        held.qemu.stop_linux();
        disk.expect_clean();
    }
}

#[test]
fn whichever_process_is_killed_at_random_the_guest_never_runs_twice() {
    let Some(program) = Program::find("10") else { return };
    let kills = number("STERNA_QEMU_KILLS").unwrap_or(3);
    let seed = number("STERNA_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() * 1000)
    });
    println!("{kills} kills: STERNA_QEMU_KILLS={kills} STERNA_SEED={seed}");
    let setup = boot_sector(&program);
    let mut failed = Vec::new();
    for seed in seed..seed + kills {
        let fault = random_fault(seed);
        let begun = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| disturb(&setup, fault))) {
            Ok(end) => println!("{seed}: {fault}: {end}, {:.1} s", begun.elapsed().as_secs_f64()),
            Err(_) => {
                println!("failed with STERNA_QEMU_KILLS=1 STERNA_SEED={seed}: {fault}");
                failed.push(seed);
            }
        }
    }
    assert_eq!(failed, Vec::<u64>::new());
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("it is a number"))
}

/// Any process, any time from the beginning of the migration to a moment after its end, the switch more
/// often than its share of the time.
fn random_fault(seed: u64) -> Fault {
    let mut random = Random(seed);
    let victim = VICTIMS[usize::try_from(random.below(4)).unwrap_or(0)];
    let (at, most) = match random.below(10) {
        0..3 => (At::Hello, 4_000_000),
        3..5 => (At::Rounds, 1_000_000),
        5 => (At::Paused, 100_000),
        6 => (At::State, 50_000),
        7 => (At::Final, 200_000),
        8 => (At::Prepared, 20_000),
        _ => (At::Go, 50_000),
    };
    Fault { victim, at, delay: Duration::from_micros(random.below(most)) }
}

/// Of such a QEMU nothing but a command resumes the guest, whatever becomes of the process.
#[test]
fn the_source_qemu_has_let_the_guest_go_before_the_guest_is_given_away() {
    let Some(program) = Program::find("10") else { return };
    let fault = Fault { victim: Victim::None, at: At::Prepared, delay: Duration::ZERO };
    let end = disturb(&boot_sector(&program), fault);
    assert_eq!((end.code, end.strike), (0, Strike::Came), "{end}");
    assert_eq!(end.saved_in.as_deref(), Some("postmigrate"), "{end}");
}
