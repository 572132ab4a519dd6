//! `sterna run`, `receive` and `migrate` by hand: a guest moves from process to process and stays itself.
#![cfg(feature = "cli")]

mod common;

use common::{BUSY, ENDLESS, Host, moves_away_from, runs_on, wait_until};

#[test]
fn a_guest_moves_to_another_process_and_the_first_ends() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &["--dirty-rate=50"]);
    let receiving = destination.receive(&["--once"]);
    let before = source.status("tern");

    let report = source.migrate("tern", receiving.address, &["--verify=full"]).wait().expect_code(0).json();
    assert_eq!(report["status"], "completed");
    assert_eq!(report["verified_pages"], (16 << 20) / 4096);
    assert_eq!(report["wrong_pages"], 0);
    assert!(report["rounds"].as_u64() > Some(1), "{report}");

    assert_eq!(running.event("moved")["name"], "tern");
    running.wait().expect_code(0);
    source.lets_go_of("tern");

    let arrived = receiving.process.event("arrived");
    assert_eq!(arrived["name"], "tern");
    let after = runs_on(&destination, "tern");
    assert!(after["heartbeats"].as_u64() > before["heartbeats"].as_u64(), "{before} {after}");
    for same in ["kind", "memory_bytes", "vcpus"] {
        assert_eq!(after[same], before[same]);
    }
    destination.checks_clean("tern");
}

#[test]
fn a_guest_moves_on_from_where_it_arrived() {
    let source = Host::new();
    let running = source.run("tern", &["--cpus=2"]);
    let (second, held) = moves_away_from(&source, running, "tern", &["--verify=full"]);
    let beats = second.status("tern")["heartbeats"].as_u64();
    let (third, _held) = moves_away_from(&second, held, "tern", &["--verify=full"]);
    assert!(third.status("tern")["heartbeats"].as_u64() > beats);
    second.lets_go_of("tern");
}

#[test]
fn pages_arrive_over_any_number_of_lanes() {
    for lanes in ["--lanes=1", "--lanes=2", "--lanes=4", "--lanes=7"] {
        let source = Host::new();
        let running = source.run("tern", &["--dirty-rate=100"]);
        moves_away_from(&source, running, "tern", &[lanes, "--verify=full", "--transport=tcp"]);
    }
}

#[test]
fn a_guest_can_take_another_name_at_the_destination() {
    let host = Host::new();
    let running = host.run("tern", &[]);
    let receiving = host.receive(&["--name=tern-two"]);
    host.migrate("tern", receiving.address, &[]).wait().expect_code(0);
    running.wait().expect_code(0);
    assert_eq!(receiving.process.event("arrived")["name"], "tern-two");
    assert_eq!(runs_on(&host, "tern-two")["name"], "tern-two");
}

#[test]
fn a_migration_goes_on_when_nobody_watches_it() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[BUSY]);
    let receiving = destination.receive(&[]);
    let watching = source.migrate("tern", receiving.address, &ENDLESS);
    watching.says("round 1:");
    watching.signal(libc::SIGKILL);
    assert_eq!(watching.wait().signal, Some(libc::SIGKILL));
    assert_eq!(source.status("tern")["migrating"], true);

    assert_eq!(source.ask("tern", "stop")["answer"], "failed", "not while it migrates");
    assert_eq!(source.ask("tern", "cancel")["answer"], "done");
    wait_until("the migration is over", || source.status("tern")["migrating"] == false);
    runs_on(&source, "tern");
    moves_away_from(&source, running, "tern", &[]);
}

#[test]
fn a_guest_that_is_told_to_stop_is_gone() {
    let host = Host::new();
    let running = host.run("tern", &[]);
    assert_eq!(host.ask("tern", "stop")["answer"], "done");
    running.event("stopped");
    running.wait().expect_code(0);
    host.lets_go_of("tern");
    let ended = host.migrate("tern", "127.0.0.1:1", &[]).wait().expect_code(11);
    ended.says("no guest named tern runs on this host");
}
