//! The monitor's commands, with real QEMUs whose guests do not run.

mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::qemu::{Qemu, programs, start};
use serde_json::{Value, json};
use sterna_qemu::monitor::{Accelerator, MigrationStatus, Parameter, Restore, RunState};
use sterna_qemu::qmp::{Client, Event, Notice, QmpError};

const GUEST: [&str; 4] = ["-machine", "pc", "-m", "32"];

#[test]
fn a_guest_is_described_by_its_command_line() {
    for program in programs() {
        let uuid = "5b3fe9b6-7f48-4a9a-8d6c-6b63a1f5a001";
        let arguments = ["-machine", "q35", "-m", "48", "-smp", "2", "-name", "a guest", "-uuid", uuid];
        let qemu = start(&program, &arguments);
        let monitor = &qemu.monitor;
        let version = monitor.version().unwrap();
        assert!(version.major >= 7, "{version}");
        assert_eq!(monitor.name().unwrap().as_deref(), Some("a guest"));
        assert_eq!(monitor.uuid().unwrap().as_deref(), Some(uuid));
        let machine_type = monitor.machine_type().unwrap();
        assert_eq!(machine_type, format!("pc-q35-{}.{}", version.major, version.minor));
        assert_eq!(monitor.accelerator().unwrap(), Accelerator::Tcg);
        assert_eq!(monitor.vcpus().unwrap().len(), 2);
        assert_eq!(monitor.memory_size().unwrap().base_memory, 48 << 20);
        let status = monitor.status().unwrap();
        assert_eq!((status.state, status.running), (RunState::PreLaunch, false));
    }
}

#[test]
fn the_features_of_a_cpu_are_those_of_the_processor_itself() {
    for program in programs() {
        // TCG lacks some features of an EPYC, and QEMU leaves them out.
        for model in ["qemu64,-sse3,+avx2", "max", "EPYC,-aes"] {
            let qemu = start(&program, &[&GUEST[..], &["-cpu", model]].concat());
            let vcpu = &qemu.monitor.vcpus().unwrap()[0];
            let began = Instant::now();
            let found = qemu.monitor.cpu_model(vcpu).unwrap();
            println!("{} {model}: {:?}", program.display(), began.elapsed());
            assert_eq!(Some(found.name.as_str()), model.split(',').next());
            assert!(found.props.len() > 300);
            for (property, value) in &found.props {
                let present: Value = qemu.monitor.qom_get(&vcpu.qom_path, property).unwrap();
                // Neither is seen by the guest.
                if !["realized", "hotplugged"].contains(&property.as_str()) {
                    assert_eq!(*value, present, "{property} of {model}");
                }
            }
        }
    }
}

#[test]
fn the_vcpus_start_and_stop_on_command() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        let events = qemu.monitor.client().subscribe();
        qemu.monitor.cont().unwrap();
        assert_eq!(qemu.monitor.status().unwrap().state, RunState::Running);
        qemu.monitor.stop().unwrap();
        assert_eq!(qemu.monitor.status().unwrap().state, RunState::Paused);
        let deadline = Instant::now() + PATIENCE;
        assert!(matches!(next_named(&events, "RESUME", deadline), Some(Event { .. })));
        assert!(matches!(next_named(&events, "STOP", deadline), Some(Event { .. })));
        qemu.monitor.announce_self().unwrap();
    }
}

fn next_named(events: &sterna_qemu::qmp::Events, name: &str, deadline: Instant) -> Option<Event> {
    loop {
        match events.next(deadline)? {
            Notice::Event(event) if event.name == name => return Some(event),
            _ => {}
        }
    }
}

#[test]
fn settings_of_the_operator_come_back() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        let monitor = &qemu.monitor;
        monitor.set_capabilities([("auto-converge", true)]).unwrap();
        monitor.set_parameters([(Parameter::DowntimeLimit, 77), (Parameter::MultifdChannels, 3)]).unwrap();
        let before = (monitor.capabilities().unwrap(), monitor.parameters().unwrap());

        let mut restore = Restore::default();
        restore
            .set_capabilities(
                monitor,
                &monitor.capabilities().unwrap(),
                &[("events", true), ("auto-converge", true)],
            )
            .unwrap();
        restore
            .set_capabilities(
                monitor,
                &monitor.capabilities().unwrap(),
                &[("events", true), ("auto-converge", false)],
            )
            .unwrap();
        restore
            .set_parameters(monitor, &monitor.parameters().unwrap(), &[(Parameter::DowntimeLimit, 1)])
            .unwrap();
        restore
            .set_parameters(monitor, &monitor.parameters().unwrap(), &[(Parameter::DowntimeLimit, 2_000_000)])
            .unwrap();
        assert!(monitor.capabilities().unwrap().is_on("events"));
        assert!(!monitor.capabilities().unwrap().is_on("auto-converge"));
        assert_eq!(monitor.parameters().unwrap().number(Parameter::DowntimeLimit), Some(2_000_000));
        // The operator changes another one meanwhile.
        monitor.set_parameters([(Parameter::MultifdChannels, 5)]).unwrap();

        let stored = serde_json::to_string(&restore).unwrap();
        let mut restore: Restore = serde_json::from_str(&stored).unwrap();
        restore.put_back(monitor).unwrap();
        assert!(restore.is_empty());
        assert_eq!(monitor.capabilities().unwrap(), before.0);
        let parameters = monitor.parameters().unwrap();
        assert_eq!(parameters.number(Parameter::DowntimeLimit), Some(77));
        assert_eq!(parameters.number(Parameter::MultifdChannels), Some(5));
    }
}

/// Begins to send the guest through a socket that was given to QEMU; returns the other end.
fn migrate(qemu: &Qemu) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    qemu.monitor.client().getfd("stream", theirs.as_fd()).unwrap();
    qemu.monitor.migrate("fd:stream").unwrap();
    ours
}

#[test]
fn a_guest_is_sent_through_a_socket_of_ours_up_to_the_point_of_no_return() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        let monitor = &qemu.monitor;
        let events = monitor.client().subscribe();
        monitor.set_capabilities([("events", true), ("pause-before-switchover", true)]).unwrap();
        let mut stream = migrate(&qemu);
        let reads = thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        });
        await_status(&qemu, &MigrationStatus::PreSwitchover);
        monitor.migrate_continue().unwrap();
        await_status(&qemu, &MigrationStatus::Completed);
        // QEMU says this a moment later.
        let released = monitor.client().wait_until(Instant::now() + PATIENCE, |_| {
            let state = monitor.status()?.state;
            Ok::<_, QmpError>((state == RunState::PostMigrate).then_some(()))
        });
        assert!(released.unwrap().is_some());
        assert!(reads.join().unwrap().starts_with(b"QEVM\0\0\0\x03"));
        let report = monitor.migration().unwrap();
        assert!(report.ram.unwrap().total >= 32 << 20);
        let pass = next_named(&events, "MIGRATION_PASS", Instant::now() + PATIENCE).unwrap();
        assert_eq!(pass.data["pass"], 1);
    }
}

#[test]
fn a_migration_that_is_given_up_is_cancelled() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        // Nothing reads, so it cannot end by itself.
        let _stream = migrate(&qemu);
        assert!(qemu.monitor.migration().unwrap().status.is_under_way());
        qemu.monitor.migrate_cancel().unwrap();
        await_status(&qemu, &MigrationStatus::Cancelled);
    }
}

fn await_status(qemu: &Qemu, wanted: &MigrationStatus) {
    let deadline = Instant::now() + PATIENCE;
    let mut last = MigrationStatus::None;
    let found = qemu.monitor.client().wait_until(deadline, |_| {
        last = qemu.monitor.migration()?.status;
        Ok::<_, QmpError>((last == *wanted).then_some(()))
    });
    assert!(found.unwrap().is_some(), "{last} instead of {wanted}");
}

#[test]
fn a_second_client_hears_that_qemu_is_busy_and_is_served_after_the_first() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        let second = Client::new(qemu.monitor.client().path());
        let error =
            second.execute_within(Duration::from_millis(300), "query-status", &json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Busy { .. }), "{error}");
        qemu.monitor.client().disconnect();
        second.execute("query-status", &json!({})).unwrap();
        second.disconnect();
        qemu.monitor.status().unwrap();
    }
}

#[test]
fn a_qemu_that_ends_is_noticed() {
    for program in programs() {
        let mut qemu = start(&program, &GUEST);
        let events = qemu.monitor.client().subscribe();
        qemu.kill();
        assert_eq!(events.next(Instant::now() + PATIENCE), Some(Notice::Gap));
        let error = qemu.monitor.status().unwrap_err();
        assert!(matches!(error, QmpError::Connect { .. }), "{error}");
    }
}

#[test]
fn quit_ends_qemu() {
    for program in programs() {
        let qemu = start(&program, &GUEST);
        let events = qemu.monitor.client().subscribe();
        // Its answer may be lost with QEMU.
        match qemu.monitor.quit() {
            Ok(()) => {}
            Err(error) => assert!(error.is_unknown(), "{error}"),
        }
        let deadline = Instant::now() + PATIENCE;
        while events.next(deadline) != Some(Notice::Gap) {
            assert!(Instant::now() < deadline);
        }
    }
}
