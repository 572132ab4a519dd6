//! The saved state of vCPUs and devices: a long one, one that is too long, and one that is damaged on the
//! way.
#![cfg(feature = "cli")]

mod common;

use std::net::SocketAddr;
use std::thread;

use common::{Fate, Host, TestGuest, TestHost, moves_away_from, relay, runs_on};
use sterna::convergence::SwitchCost;
use sterna::destination::{ReceiveError, Receiver};
use sterna::source::{GuestIs, MigrationError, MigrationFailure, Options, StateLimit, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use sterna::wire::Message;

/// The time that a slow build of the test guest takes to save does not matter.
const PATIENT: &str = "--downtime-limit=60000";

/// A guest with more state than the source keeps in flight, and with a last frame that is not full.
const LONG: &str = "--device-state=5000001";

#[test]
fn a_long_state_arrives_as_it_was_saved_also_within_a_bandwidth_limit() {
    let (source, destination) = (Host::new(), Host::new());
    let running = source.run("tern", &[LONG]);
    let receiving = destination.receive(&["--state-max=5M"]);
    let how = ["--transport=tcp", "--verify=full", "--bandwidth-limit=50", PATIENT];
    let report = source.migrate("tern", receiving.address, &how).wait().expect_code(0).json();
    running.wait().expect_code(0);
    runs_on(&destination, "tern");
    destination.checks_clean("tern");
    let save_ms = report["downtime_measured"]["save_ms"].as_f64().expect("it is measured");
    // At least three of the five megabytes, less the burst that the limit allows.
    assert!(save_ms > 3e6 / 50e3 - 15.0, "{save_ms} ms are faster than the limit allows");
    let predicted_ms = report["downtime_predicted"]["save_ms"].as_f64().expect("it is predicted");
    assert!(predicted_ms > 2.9e6 / 50e3 - 1.0, "{predicted_ms} ms for 2.9 MB at 50 MB/s");
}

#[test]
fn a_state_that_is_known_to_be_too_long_is_refused_before_anything_is_sent() {
    for (receive, migrate, says) in [
        (&["--state-max=4M"][..], &[][..], "the destination takes at most 4 MiB"),
        (&[], &["--state-max=3M"], "this side sends at most 3 MiB"),
    ] {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &[LONG]);
        let receiving = destination.receive(receive);
        let ended = source.migrate("tern", receiving.address, migrate).wait().expect_code(11);
        ended.says(says).says("a larger `--state-max`").says("where: the guest");
        receiving.process.says(says);
        runs_on(&source, "tern");
        moves_away_from(&source, running, "tern", &["--verify=full", PATIENT]);
    }
}

#[test]
fn a_state_of_which_a_part_is_damaged_or_lost_is_not_loaded_and_the_guest_runs_on() {
    for (fate, says) in [
        (Fate::Damage, "a message was damaged on its way"),
        (Fate::Lose, "the source sent the saved state from byte 1048576 on where byte 786432 was due"),
    ] {
        let (source, destination) = (Host::new(), Host::new());
        let running = source.run("tern", &[LONG, "--dirty-rate=50"]);
        let receiving = destination.receive(&[]);
        let via = relay(receiving.address, move |number, _, message| match message {
            Message::State(part) if number == 0 && part.offset == 786_432 => fate.clone(),
            _ => Fate::Pass,
        });
        let ended = source.migrate("tern", via, &["--transport=tcp", PATIENT]).wait().expect_code(10);
        ended.says(says).says("where: the guest runs on at the source");
        receiving.process.says(says);
        runs_on(&source, "tern");
        source.checks_clean("tern");
        source.migrate("tern", via, &["--transport=tcp", "--verify=full", PATIENT]).wait().expect_code(0);
        running.wait().expect_code(0);
        destination.checks_clean("tern");
    }
}

#[test]
fn a_state_that_is_found_to_be_too_long_while_it_is_saved_ends_the_attempt_and_the_guest_runs_on() {
    let guest = TestGuest::started();
    for limit in [StateLimit::Source(100), StateLimit::Destination(99)] {
        let (ours, theirs) = match limit {
            StateLimit::Source(bytes) => (bytes, bytes),
            StateLimit::Destination(bytes) => (bytes + 1, bytes),
        };
        let switch_cost = SwitchCost { state_bytes: 0, ..SwitchCost::default() };
        let transports = TcpProvider.into();
        let options = Options { transports, state_max_bytes: Some(ours), switch_cost, ..Options::default() };
        let (error, there) = fails(&guest, &options, theirs);
        assert_eq!(error.guest, GuestIs::RunningAtSource, "{error}");
        let MigrationFailure::StateTooLong { state_bytes, limit: told } = error.cause else {
            panic!("{error}")
        };
        assert!(told == limit && state_bytes > limit.bytes(), "{error}");
        assert!(matches!(there, ReceiveError::SourceGaveUp(_)), "{there}");
        guest.runs_whole();
    }
}

/// Tries to move a guest to a destination that takes at most `state_max` bytes of state.
fn fails(guest: &TestGuest, options: &Options, state_max: u64) -> (MigrationError, ReceiveError) {
    let receiver = Receiver::bind(SocketAddr::from(([127, 0, 0, 1], 0)), HostState::lost_with_this_process())
        .expect("a free port");
    let claim = HostState::lost_with_this_process().start("tern", false).expect("the name is free");
    let taking = sterna::destination::Options { state_max_bytes: Some(state_max), ..Default::default() };
    let to = receiver.local_address().expect("it is bound").to_string();
    thread::scope(|scope| {
        let source = scope.spawn(|| migrate(guest, &claim, &to, options, &()));
        let there = receiver
            .receive(&TestHost::default(), &taking, &())
            .map(drop)
            .expect_err("the destination fails");
        (source.join().expect("the source does not panic").expect_err("the source fails"), there)
    })
}
