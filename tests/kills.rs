//! Processes that die, hang or receive a signal in the middle of the rounds: the guest runs on at the source.
#![cfg(feature = "cli")]

mod common;

use common::{BUSY, ENDLESS, Host, LONG, Process, Receiving, moves_away_from, runs_on};

/// A migration in the middle of its rounds.
struct UnderWay {
    source: Host,
    running: Process,
    destination: Host,
    receiving: Receiving,
    migrating: Process,
}

impl UnderWay {
    fn new(receive: &[&str], how: &[&str]) -> Self {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &["--memory=32M", BUSY]);
        let receiving = destination.receive(receive);
        let migrating = source.migrate("tern", receiving.address, &[&["--transport=tcp"], how].concat());
        migrating.says("round 1:");
        Self { source, running, destination, receiving, migrating }
    }
}

#[test]
fn when_the_destination_is_killed_the_guest_runs_on_and_can_move_elsewhere() {
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &ENDLESS);
    receiving.process.signal(libc::SIGKILL);
    let ended = migrating.wait().expect_code(10);
    ended.says("where: the guest");
    let report = ended.json();
    assert_eq!((&report["status"], &report["exit"]), (&"failed".into(), &"failed".into()));
    assert!(report["guest"].as_str().expect("it says where").contains("at the source"), "{report}");
    runs_on(&source, "tern");
    source.checks_clean("tern");
    drop(destination);
    moves_away_from(&source, running, "tern", &["--verify=full"]);
}

#[test]
fn a_guest_that_was_slowed_for_a_migration_that_failed_runs_at_full_speed_again() {
    let slowing = ["--downtime-limit=150", "--bandwidth-limit=20", "--max-rounds=1000"];
    let UnderWay { source, running, receiving, migrating, .. } = UnderWay::new(&[], &slowing);
    migrating.says("guest slowed by");
    assert!(source.status("tern")["throttle_percent"].as_u64() > Some(0));
    receiving.process.signal(libc::SIGKILL);
    migrating.wait().expect_code(10).says("guest at full speed again");
    runs_on(&source, "tern");
    moves_away_from(&source, running, "tern", &["--verify=full"]);
}

#[test]
fn when_the_source_is_killed_the_destination_does_not_run_the_guest() {
    let UnderWay { source, running, destination, receiving, migrating } =
        UnderWay::new(&["--once"], &ENDLESS);
    running.signal(libc::SIGKILL);
    receiving.process.wait().expect_code(10);
    destination.lets_go_of("tern");
    // The command cannot find out more on this host.
    migrating.wait().expect_code(12).says("in doubt");
    drop((source, running));
}

#[test]
fn a_destination_outlives_a_source_that_was_killed_and_takes_the_next_guest() {
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &ENDLESS);
    running.signal(libc::SIGKILL);
    migrating.wait().expect_code(12);
    running.wait();
    receiving.process.says("a guest did not arrive");
    destination.lets_go_of("tern");

    // The socket left by the killed process is in the way of no process on either host.
    let running = source.run("tern", &[]);
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// A side's message about a peer that sends not even heartbeats.
const SILENCE: &str = "nothing was heard from the other side for 10 s";

#[test]
fn when_the_destination_hangs_the_source_gives_up_and_the_guest_runs_on() {
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &LONG);
    receiving.process.signal(libc::SIGSTOP);
    migrating.wait().expect_code(10).says(SILENCE);
    runs_on(&source, "tern");

    receiving.process.signal(libc::SIGCONT);
    receiving.process.says("a guest did not arrive");
    destination.lets_go_of("tern");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

/// As over RDMA: the source sends nothing that needs the destination's process, or so little that no buffer
/// fills.
#[test]
fn a_destination_that_hangs_is_noticed_also_where_hardly_anything_is_sent_to_it() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--memory=32M", BUSY]);
    let receiving = destination.receive(&[]);
    let slow = ["--transport=tcp", "--bandwidth-limit=1"];
    let migrating = source.migrate("tern", receiving.address, &slow);
    migrating.says("TCP stream");
    receiving.process.signal(libc::SIGSTOP);
    migrating.wait().expect_code(10).says(SILENCE);
    runs_on(&source, "tern");
    moves_away_from(&source, running, "tern", &["--verify=full"]);
}

#[test]
fn when_the_source_hangs_the_destination_gives_up_and_the_guest_can_move_later() {
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &LONG);
    running.signal(libc::SIGSTOP);
    receiving.process.says(SILENCE);
    destination.lets_go_of("tern");

    running.signal(libc::SIGCONT);
    migrating.wait().expect_code(10);
    runs_on(&source, "tern");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

#[test]
fn a_side_that_stands_still_for_a_moment_only_delays_the_migration() {
    // Only a cancel ends this migration: a side that obeys it is alive.
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &LONG);
    for stopped in [&receiving.process, &running] {
        stopped.signal(libc::SIGSTOP);
        std::thread::sleep(std::time::Duration::from_secs(3));
        stopped.signal(libc::SIGCONT);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    migrating.signal(libc::SIGINT);
    migrating.wait().expect_code(130).says("cancelled");
    runs_on(&source, "tern");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

fn cancelled_by(signal: i32, code: i32) {
    let UnderWay { source, running, destination, receiving, migrating } = UnderWay::new(&[], &ENDLESS);
    migrating.signal(signal);
    let ended = migrating.wait().expect_code(code);
    assert!(ended.json()["guest"].as_str().expect("it says where").contains("at the source"));
    runs_on(&source, "tern");
    receiving.process.says("the source gave up: cancelled");
    destination.lets_go_of("tern");
    source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0);
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
}

#[test]
fn an_interrupt_cancels_and_the_guest_runs_on() {
    cancelled_by(libc::SIGINT, 130);
}

#[test]
fn a_termination_cancels_and_the_guest_runs_on() {
    cancelled_by(libc::SIGTERM, 143);
}
