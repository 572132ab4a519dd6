//! A VMM that lets its guest run, and cannot say whether it does.

use super::{Faults, Outcome, Scene};
use crate::guest::RunOutcome;
use crate::progress::Event;
use crate::source::GuestIs;

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
    // It did run on, and nothing keeps it from moving.
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
