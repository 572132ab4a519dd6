//! Guests of stock QEMU that Sterna refuses to hold, to take or to measure: each error says what mends it.
//! And QEMUs that an operator's command starts.
#![cfg(feature = "cli")]

mod common;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use common::qemu::{BootSector, Held, NAME, Program, Setup, Started, Waiting};
use common::{Ended, Host, Process, wait_until};

#[test]
fn a_monitor_that_is_not_to_be_had_is_told_with_the_option_that_provides_one() {
    let Some(program) = Program::find("10") else { return };
    let qemu = Setup::boot_sector(&program, BootSector::default()).start();
    let host = Host::new();
    let adopt = |socket: String| {
        let socket = format!("--qmp={socket}");
        let refused = host.start(["adopt", NAME, socket.as_str()]).wait().expect_code(11);
        refused.says("where: the guest is as it was, and not adopted");
        refused
    };
    let nothing = host.runtime().join("nothing");
    let option = format!("`-qmp unix:{},server=on,wait=off`", nothing.display());
    adopt(nothing.display().to_string()).says(&option).says("No such file");

    let client = UnixStream::connect(qemu.qmp()).expect("QEMU listens");
    adopt(qemu.qmp().display().to_string()).says("another client is connected").says("one more monitor");
    drop(client);

    let held = Held::adopt(qemu, &[]);
    let again = |name: &str| {
        let socket = format!("--qmp={}", held.qemu.qmp().display());
        held.host.start(["adopt", name, socket.as_str()]).wait().expect_code(11)
    };
    again(NAME).says("has the guest tern").says("choose another name");
    again("other").says("perhaps another Sterna");
    assert!(held.qemu.runs());
}

#[test]
fn each_destination_names_the_option_that_takes_guests_of_the_other_vmm() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let held = Held::adopt(setup.start(), &[]);
    let plain = Host::new();
    let receiving = plain.receive(&[]);
    let refused = held.migrate(receiving.address, &[]).wait().expect_code(11);
    refused.says("it is a guest of QEMU").says("`--qmp SOCKET` or `--start COMMAND`");
    assert!(held.qemu.runs());

    let waiting = Waiting::start(&setup);
    let running = plain.run("gull", &["--machine=synthetic"]);
    let refused = plain.migrate("gull", waiting.receiving.address, &[]).wait().expect_code(11);
    refused.says("a guest of Sterna's own VMM").says("without `--qmp` and `--start`");
    drop(running);
    // Neither refusal has used up the QEMU that waits.
    held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(0);
    waiting.arrived_from(held);
}

#[test]
fn a_qemu_that_ended_while_it_waited_is_named_and_another_one_takes_its_place() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let held = Held::adopt(setup.start(), &[]);
    let Waiting { receiving, qemu, .. } = Waiting::start(&setup);
    let socket = qemu.qmp();
    qemu.kill();
    let refused = held.migrate(receiving.address, &[]).wait().expect_code(11);
    refused.says("listens there while it runs").says(&socket.display().to_string());
    receiving.process.says("a guest did not arrive");
    assert!(held.qemu.runs());
}

/// Only QEMU finds out: devices that are on no PCI bus, and on none behind one, are not compared before.
#[test]
fn a_guest_whose_devices_are_not_those_of_the_destination_runs_on_at_the_source() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let held = Held::adopt(setup.clone().arguments(["-serial", "null"]).start(), &[]);
    let mut waiting = Waiting::start(&setup);
    let failed = held.migrate(waiting.receiving.address, &[]).wait().expect_code(10);
    failed.says("QEMU could not load the guest").says("where: the guest runs on at the source");
    assert!(held.qemu.runs());
    wait_until("the QEMU that could not load the guest ends", || waiting.qemu.has_ended());
    waiting.receiving.process.says("a guest did not arrive");
}

/// QEMU takes a guest out of the state in which it was saved by running it only, which must not happen to a
/// paused guest unasked.
#[test]
fn a_paused_guest_that_was_saved_and_did_not_move_stays_paused_and_moves_once_it_has_run() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let of_source = setup.clone().arguments(["-serial", "null"]);
    // A boot sector at work has overwritten a queue of its disk, to which QEMU writes at each `cont`.
    let qemu = of_source.start_stopped();
    let monitor = qemu.monitor.clone();
    let settings = || monitor.execute("query-migrate-parameters", json!({}));
    let before = settings();
    let held = Held::adopt(qemu, &[]);
    let failed = held.migrate(Waiting::start(&setup).receiving.address, &[]).wait().expect_code(10);
    failed.says("QEMU could not load the guest");
    assert_eq!(held.qemu.status(), "postmigrate");
    assert_eq!(settings(), before);

    let waiting = Waiting::start(&of_source);
    let refused = held.migrate(waiting.receiving.address, &[]).wait().expect_code(11);
    refused.says("the paused guest was saved by a migration that failed").says("(QMP cont)");
    for command in ["cont", "stop"] {
        monitor.execute(command, json!({}));
    }
    held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(0);
    waiting.receiving.process.event("arrived");
    assert_eq!(waiting.qemu.status(), "paused");
    waiting.qemu.monitor.execute("cont", json!({}));
    waiting.qemu.serial().wait_for_sweeps(2);
    assert_eq!(waiting.qemu.serial().wrong_addresses(), Vec::<u64>::new());
}

/// A device that only the destination has would be left as if it were just switched on.
#[test]
fn a_device_that_one_end_lacks_or_has_elsewhere_is_named_before_anything_is_sent() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let with = |device: &str| setup.clone().arguments(["-device", device]);
    let held = Held::adopt(with("pcie-root-port,id=rp,addr=1e").start(), &[]);
    let refused = |destination: &Setup<'_>, why: &[&str]| {
        let waiting = Waiting::start(destination);
        let refused = held.migrate(waiting.receiving.address, &[]).wait().expect_code(11);
        for why in why {
            refused.says(why);
        }
        assert!(held.qemu.runs());
        assert_eq!(held.qemu.migration_status(), "", "nothing was asked of QEMU");
    };
    let (is_not, only) = ("is not at the destination", "is at the destination only");
    let port = |slot: &str, what: &str| format!("the device pcie-root-port at 00:{slot}.0 {what}");
    refused(&setup, &[&port("1e", is_not)]);
    let elsewhere = with("pcie-root-port,id=rp,addr=1d");
    refused(&elsewhere, &[&port("1e", is_not), &port("1d", only)]);
    let more = with("pcie-root-port,id=rp2,addr=1e").arguments(["-device", "virtio-rng-pci,bus=rp2"]);
    refused(&more, &["the device virtio-rng-pci at 00:1e.0:00.0 is at the destination only"]);

    // It is plugged into the source as well, after Sterna has seen the source's devices.
    held.qemu.monitor.execute("device_add", json!({ "driver": "virtio-rng-pci", "bus": "rp", "id": "rng" }));
    let waiting = Waiting::start(&more);
    held.migrate(waiting.receiving.address, &["--verify=full"]).wait().expect_code(0);
    waiting.arrived_from(held);
}

#[test]
fn the_writes_of_a_guest_are_measured_by_qemu_or_not_at_all() {
    let Some(program) = Program::find("10") else { return };
    let measure = |memory_mib: u32| -> (Held, Ended) {
        let guest = BootSector { memory_mib, hot_mib: memory_mib / 2, ..BootSector::default() };
        let qemu = Setup::boot_sector(&program, guest).start();
        qemu.serial().wait_for_sweeps(1);
        let held = Held::adopt(qemu, &[]);
        let measured = held.host.start(["dirty-rate", NAME, "--json"]).wait();
        assert!(held.qemu.runs());
        assert_eq!(held.qemu.migration_status(), "", "no migration was begun");
        (held, measured)
    };
    let (_, measured) = measure(128);
    let measured = measured.expect_code(0).json();
    let sampled = &measured["sampled"];
    assert_eq!(sampled["ram_bytes"], 128 << 20, "{measured}");
    assert!(sampled["touched_bytes"].as_u64() > Some(100 << 20), "{measured}");
    assert!(sampled["note"].as_str().is_some_and(|note| note.contains("estimated by QEMU")), "{measured}");
    let wrote = |sample: &serde_json::Value| sample["dirty_bytes"].as_u64() > Some(1 << 20);
    assert!(sampled["samples"].as_array().expect("samples").iter().any(wrote), "{measured}");

    let (_, refused) = measure(64);
    refused.expect_code(10).says("only under KVM").says("where: the guest runs here");
}

#[test]
fn a_guest_comes_into_a_qemu_that_the_operators_command_starts() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default()).machine("pc-q35-10.0");
    let held = Held::adopt(setup.start(), &[]);
    held.qemu.serial().wait_for_sweeps(1);
    let (host, started) = (Host::new(), Started::new());
    let receiving = host.receive(&["--start", &started.command(&setup)]);
    held.migrate(receiving.address, &["--verify=full"]).wait().expect_code(0);
    assert_eq!(receiving.process.event("arrived")["name"], NAME);
    assert!(started.runs());
    held.process.wait().expect_code(0);
    started.serial().wait_for_sweeps(2);
    assert_eq!(started.serial().wrong_addresses(), Vec::<u64>::new());
    assert_eq!(
        started.environment(),
        "STERNA_GUEST_ACCELERATOR=tcg\n\
         STERNA_GUEST_FROM=127.0.0.1\n\
         STERNA_GUEST_MACHINE=pc-q35-10.0\n\
         STERNA_GUEST_MEMORY_BYTES=67108864\n\
         STERNA_GUEST_NAME=tern\n\
         STERNA_GUEST_VCPUS=1\n"
    );
}

#[test]
fn the_example_moves_a_guest_on_one_machine() {
    let Some(program) = Program::find("10") else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/qemu/move.sh");
    let mut command = Command::new(script);
    command.arg("--verify=full").env("STERNA", env!("CARGO_BIN_EXE_sterna")).env("QEMU", &program.path);
    let ended = Process::start(command).wait().expect_code(0);
    assert!(ended.stdout.contains("all equal") && ended.stdout.contains(" 0 wrong pages"), "{ended:#?}");
}

#[test]
fn a_guest_is_refused_with_the_words_of_the_command_that_failed() {
    let Some(program) = Program::find("10") else { return };
    let held = Held::adopt(Setup::boot_sector(&program, BootSector::default()).start(), &[]);
    let host = Host::new();
    let receiving = host.receive(&["--start", "echo no bridge on this host >&2; exit 3"]);
    let refused = held.migrate(receiving.address, &[]).wait().expect_code(11);
    refused.says("failed (exit status: 3): no bridge on this host");
    receiving.process.says("start: no bridge on this host");
    assert!(held.qemu.runs());
}

#[test]
fn a_qemu_that_loses_track_of_changed_pages_is_adopted_with_a_warning() {
    let Some(program) = Program::find("7.2") else { return };
    let held = Held::adopt(Setup::boot_sector(&program, BootSector::default()).start(), &[]);
    held.process.says("warning: QEMU 7.2");
    held.process.says("`sterna migrate --verify final`");
}

#[test]
fn a_qemu_that_was_started_for_a_guest_that_does_not_come_ends() {
    let Some(program) = Program::find("10") else { return };
    let setup = Setup::boot_sector(&program, BootSector::default());
    let held = Held::adopt(setup.start(), &[]);
    let (host, started) = (Host::new(), Started::new());
    let receiving = host.receive(&["--start", &started.command(&setup.clone().cpus(2))]);
    let refused = held.migrate(receiving.address, &[]).wait().expect_code(11);
    refused.says("the number of vCPUs is 1 at the source and 2 at the destination");
    assert_ne!(started.environment(), "");
    wait_until("the QEMU that was started ends", || !started.lives());
    assert!(held.qemu.runs());

    // One that is too large for this host is refused before anything is started.
    let (host, never) = (Host::new(), Started::new());
    let receiving = host.receive(&["--memory-max=32M", "--start", &never.command(&setup)]);
    held.migrate(receiving.address, &[]).wait().expect_code(11).says("memory");
    assert_eq!(never.environment(), "");

    // A command may print the socket of a QEMU that has a guest already: that one is left alone.
    let (host, other) = (Host::new(), setup.start());
    let receiving = host.receive(&["--start", &format!("echo {}", other.qmp().display())]);
    held.migrate(receiving.address, &[]).wait().expect_code(11).says("is in the state running");
    assert!(held.qemu.runs() && other.runs());
    // With that socket by name, `receive` does not even begin to wait.
    let socket = format!("--qmp={}", other.qmp().display());
    let refused = host.start(["receive", "--port=0", socket.as_str()]).wait().expect_code(11);
    refused.says("is in the state running").says("`-incoming defer -S`");
}
