//! The answers of a VMM: that it does not know whether its guest runs, and errors of its own.

use std::num::NonZeroU64;
use std::time::Duration;

use super::{Faults, Outcome, Scene};
use crate::convergence::Limits;
use crate::destination::ReceiveError;
use crate::dirty::DirtyError;
use crate::guest::RunOutcome;
use crate::progress::Event;
use crate::source::{GuestIs, MigrationFailure, Options};

#[test]
fn a_source_whose_vmm_does_not_say_whether_the_guest_runs_claims_neither() {
    let scene = Scene::new();
    let outcome = scene.attempt(&Faults::default(), |event| {
        if matches!(event, Event::Paused) {
            scene.guest.seen.panic_in(&["save"]);
            scene.guest.seen.be_unsure(true);
        }
    });
    scene.guest.seen.panic_in(&[]);
    scene.guest.seen.be_unsure(false);
    let error = outcome.source.unwrap_err();
    assert_eq!((error.guest, error.refused), (GuestIs::UnknownAtSource, false), "{error}");
    assert!(error.to_string().contains("does not say whether it runs"), "{error}");
    assert!(error.doubt.is_none(), "it is the source's");
    assert_eq!(scene.host.times_resumed(), 0);
    // The guest did run on, and nothing prevents its migration.
    scene.guest.writes_on();
    scene.moved(scene.attempt(&Faults::default(), |_| {}));
}

#[test]
fn a_guest_of_which_the_destinations_vmm_does_not_say_whether_it_runs_never_runs_at_the_source_again() {
    let scene = Scene::new();
    scene.host.seen.be_unsure(true);
    let Outcome { source, destination } = scene.attempt(&Faults::default(), |_| {});
    let arrival = destination.expect("it is the destination's");
    assert!(matches!(&arrival.started, RunOutcome::Unknown { reason } if reason == "its answer was lost"));
    assert!(arrival.settled);
    scene.moved(Outcome { source, destination: Ok(arrival) });
}

#[test]
fn a_dirty_log_of_the_vmms_own_that_fails_ends_the_attempt_with_the_vmms_error() {
    let scene = Scene::new();
    let outcome = scene.attempt(&Faults::default(), |event| {
        if matches!(event, Event::Round { number: 2, .. }) {
            scene.guest.seen.err_in(&["harvest"]);
        }
    });
    scene.guest.seen.err_in(&[]);
    let (cause, _) = scene.stayed(outcome);
    let MigrationFailure::Dirty(DirtyError::Vmm(error)) = &cause else { panic!("{cause}") };
    assert_eq!(error.to_string(), "harvest fails for a test");
}

/// The rounds would go on for ever.
#[test]
fn a_destination_whose_vmm_ends_in_the_rounds_says_so_at_once() {
    let limits = Limits {
        downtime: Duration::from_millis(1),
        bandwidth_max: NonZeroU64::new(1_000_000),
        rounds_max: 1_000_000,
        if_stuck: "throttle".parse().unwrap(),
        ..Limits::default()
    };
    let scene = Scene::with(Options { limits: limits.into(), ..Options::default() });
    let outcome = scene.attempt(&Faults::default(), |event| {
        if matches!(event, Event::Round { number: 1, .. }) {
            scene.host.seen.err_in(&["can_arrive"]);
        }
    });
    scene.host.seen.err_in(&[]);
    scene.options.limits.change(|limits| limits.downtime = Duration::from_secs(60));
    let (cause, there) = scene.stayed(outcome);
    assert!(matches!(&there, ReceiveError::Guest(_)), "{there}");
    let MigrationFailure::DestinationFailed(why) = &cause else { panic!("{cause}") };
    assert!(why.contains("can_arrive fails for a test"), "{why}");
}

#[test]
fn a_state_that_is_not_read_to_its_end_is_not_run_and_the_section_is_named() {
    let scene = Scene::new();
    scene.host.seen.err_in(&["load"]);
    let outcome = scene.attempt(&Faults::default(), |_| {});
    scene.host.seen.err_in(&[]);
    let (cause, there) = scene.stayed(outcome);
    assert!(matches!(&there, ReceiveError::Guest(_)), "{there}");
    assert!(
        matches!(&cause, MigrationFailure::DestinationFailed(why) if why.contains(r#"section "passes""#)),
        "{cause}"
    );
}

#[test]
fn a_destination_that_cannot_free_a_guest_does_not_say_that_the_attempt_is_over() {
    let scene = Scene::new();
    scene.host.seen.panic_in(&["load"]);
    scene.host.seen.err_in(&["discard"]);
    let outcome = scene.attempt(&Faults::default(), |_| {});
    scene.host.seen.panic_in(&[]);
    scene.host.seen.err_in(&[]);
    let (cause, there) = scene.stayed(outcome);
    assert!(matches!(&there, ReceiveError::Panicked(_)), "{there}");
    assert!(matches!(&cause, MigrationFailure::Control(_)), "{cause}");
}
