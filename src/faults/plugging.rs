//! Memory that is plugged, unplugged or replaced while its guest migrates.

use super::guest::Replug;
use super::{Faults, Moment, Scene, each, pairs};
use crate::memory::RamChange;
use crate::progress::Event;
use crate::source::MigrationFailure;

#[test]
fn memory_that_changes_on_the_way_ends_the_attempt_and_the_guest_runs_on() {
    let cases = pairs(&[Replug::Plug, Replug::Unplug, Replug::Replace], &Moment::ALL);
    each(cases, |&(how, moment)| {
        let scene = Scene::new();
        let outcome = scene.attempt(&Faults::default(), |event| match (moment, event) {
            (Moment::FirstRound, Event::Connected { .. })
            | (Moment::LaterRound, Event::Round { number: 3, .. })
            | (Moment::Paused, Event::Paused) => scene.guest.replug(how),
            (Moment::Paused | Moment::LaterRound, _) => {}
            (Moment::FirstRound, Event::Round { number: 2.., .. }) => panic!("it was to end after a round"),
            (Moment::FirstRound, _) => {}
        });
        scene.guest.replug(Replug::Restore);
        let (cause, _) = scene.stayed(outcome);
        let MigrationFailure::RamChanged(change) = &cause else { panic!("{cause}") };
        let as_it_was = match how {
            Replug::Plug => matches!(change, RamChange::Plugged(region) if region.guest_address == 8 << 30),
            Replug::Unplug => {
                matches!(change, RamChange::Unplugged(region) if region.guest_address == 4 << 30)
            }
            Replug::Replace => {
                matches!(change, RamChange::Replaced(region) if region.guest_address == 4 << 30)
            }
            Replug::Restore => false,
        };
        assert!(as_it_was, "{change}");
    });
}
