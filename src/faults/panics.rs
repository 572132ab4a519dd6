//! Defects: panics in the VMM, in an observer and in the lanes, at every moment of a migration.

use std::fs;
use std::net::TcpListener;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{Faults, Moment, Outcome, Scene, Watch, each, pairs};
use crate::convergence::Limits;
use crate::destination::{self, ReceiveError};
use crate::image::{self, SendFailure, Store, StoreError};
use crate::progress::Event;
use crate::session::{Cancel, SessionError};
use crate::source::{GuestIs, MigrationFailure, Options, migrate};
use crate::transport::Transports;
use crate::transport::faulty::{FaultyProvider, FenceFault, LaneFaults, WriteFault};
use crate::transport::tcp::TcpProvider;

/// Makes these calls of the guest's VMM panic from `moment` on, until the migration has failed.
fn attempt(scene: &Scene, moment: Moment, calls: &[&'static str]) -> Outcome {
    let outcome = scene.attempt(&Faults::default(), |event| {
        let now = match moment {
            Moment::FirstRound => matches!(event, Event::Connected { .. }),
            Moment::LaterRound => matches!(event, Event::Round { number: 2, .. }),
            Moment::Paused => matches!(event, Event::Paused),
        };
        if now {
            scene.guest.seen.panic_in(calls);
        }
    });
    scene.guest.seen.panic_in(&[]);
    outcome
}

#[test]
fn a_vmm_that_panics_before_anything_is_sent_keeps_its_guest_running() {
    each(["ram", "dirty_log", "details"], |&call| {
        let scene = Scene::new();
        let to = scene.receiver.local_address().unwrap().to_string();
        let moved = thread::scope(|scope| {
            // A source that has not sent its offer does not end the wait.
            let destination =
                scope.spawn(|| scene.receiver.receive(&scene.host, &destination::Options::default(), &()));
            scene.guest.seen.panic_in(&[call]);
            let error = migrate(&scene.guest, &scene.claim, &to, &scene.options, &()).unwrap_err();
            assert!(matches!(&error.cause, MigrationFailure::Panicked(why) if why.contains(call)), "{error}");
            assert_eq!((error.guest, error.refused), (GuestIs::RunningAtSource, true), "{error}");
            scene.guest.seen.panic_in(&[]);
            scene.guest.writes_on();
            let source = migrate(&scene.guest, &scene.claim, &to, &scene.options, &());
            Outcome { source, destination: destination.join().unwrap() }
        });
        scene.moved(moved);
    });
}

#[test]
fn a_vmm_that_panics_while_its_guest_moves_has_it_back_and_running() {
    let cases = [
        ("start", Moment::FirstRound),
        ("clear", Moment::FirstRound),
        ("harvest", Moment::LaterRound),
        ("clear", Moment::LaterRound),
        ("pause", Moment::LaterRound),
        ("save", Moment::LaterRound),
        ("save", Moment::Paused),
        ("harvest", Moment::Paused),
    ];
    each(cases, |&(call, moment)| {
        let scene = Scene::new();
        let (cause, _) = scene.stayed(attempt(&scene, moment, &[call]));
        assert!(matches!(&cause, MigrationFailure::Panicked(why) if why.contains(call)), "{call}: {cause}");
    });
}

#[test]
fn a_vmm_that_panics_in_one_thing_more_than_the_migration_is_not_believed_to_run_its_guest() {
    let scene = Scene::new();
    let outcome = attempt(&scene, Moment::Paused, &["save", "resume", "stop"]);
    let error = outcome.source.unwrap_err();
    assert!(matches!(&error.cause, MigrationFailure::Panicked(why) if why.contains("save")), "{error}");
    assert_eq!(error.guest, GuestIs::PausedAtSource);
    assert!(scene.guest.is_paused());
    assert!(error.doubt.is_none());
    assert_eq!(scene.host.times_resumed(), 0);
}

#[test]
fn a_migration_does_without_heartbeats_and_without_throttling_if_the_vmm_panics_over_them() {
    let (scene, faults) = (Scene::new(), Faults::default());
    scene.guest.seen.panic_in(&["heartbeat"]);
    scene.host.seen.panic_in(&["heartbeat"]);
    let outcome = scene.attempt(&faults, |_| {});
    assert!(scene.guest.seen.times_panicked() > 0 && scene.host.seen.times_panicked() > 0);
    assert!(outcome.destination.as_ref().is_ok_and(|arrival| arrival.settled));
    scene.moved(outcome);

    let limits = Limits {
        // More than a switch takes with nothing to send, less than one with all busy pages.
        downtime: Duration::from_millis(150),
        bandwidth_max: NonZeroU64::new(1_000_000),
        rounds_max: 1000,
        if_stuck: "throttle".parse().unwrap(),
        ..Limits::default()
    };
    let scene = Scene::with(Options { limits: limits.into(), ..Options::default() });
    scene.guest.seen.panic_in(&["throttle"]);
    let watch = Watch(|event: &Event| {
        if matches!(event, Event::Round { .. }) && scene.guest.seen.times_panicked() > 0 {
            scene.options.limits.change(|limits| limits.downtime = Duration::from_secs(60));
        }
    });
    scene.moved(scene.attempt_by(&faults, &scene.options, &watch));
    assert!(scene.guest.seen.times_panicked() > 0);
}

#[test]
fn a_destination_that_panics_says_so_and_the_guest_runs_on_at_the_source() {
    for call in ["prepare", "ram", "load"] {
        let scene = Scene::new();
        scene.host.seen.panic_in(&[call]);
        let outcome = scene.attempt(&Faults::default(), |_| {});
        scene.host.seen.panic_in(&[]);
        let (cause, there) = scene.stayed(outcome);
        assert!(matches!(&there, ReceiveError::Panicked(why) if why.contains(call)), "{there}");
        let MigrationFailure::DestinationFailed(why) = &cause else { panic!("{call}: {cause}") };
        assert!(why.contains(call), "{why}");
    }
}

#[test]
fn an_observer_that_panics_gets_no_more_events_and_ends_no_migration() {
    let kinds: [fn(&Event) -> bool; 4] = [
        |event| matches!(event, Event::Connected { .. }),
        |event| matches!(event, Event::Round { number: 2, .. }),
        |event| matches!(event, Event::Paused),
        |event| matches!(event, Event::Switched { .. }),
    ];
    each(kinds, |strikes| {
        let (scene, after) = (Scene::new(), AtomicUsize::new(0));
        let watch = Watch(|event: &Event| {
            if strikes(event) || after.load(Ordering::Relaxed) > 0 {
                after.fetch_add(1, Ordering::Relaxed);
                panic!("an observer fails");
            }
        });
        scene.moved(scene.attempt_watched(&Faults::default(), &scene.options, &watch));
        assert_eq!(after.into_inner(), 1);
    });
}

#[test]
fn a_lane_that_panics_ends_the_migration_at_once_and_the_guest_runs_on() {
    each(pairs(&Moment::ALL, &[false, true]), |&(moment, fence)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let outcome = scene.attempt_at(moment, &faults, || {
            if fence {
                faults.lanes.arm_fence(1, FenceFault::Panic);
            } else {
                faults.lanes.arm_write(1, 5, WriteFault::Panic);
            }
        });
        assert_eq!(faults.lanes.struck(), 1);
        let (cause, there) = scene.stayed(outcome);
        assert!(matches!(&cause, MigrationFailure::Panicked(why) if why == "a defect for a test"), "{cause}");
        assert!(matches!(&there, ReceiveError::SourceGaveUp(_)), "{there}");
    });
}

/// The other lane waits for the rate limiter, for longer than this test allows.
#[test]
fn a_lane_that_panics_ends_the_waits_of_the_others() {
    for registering in [false, true] {
        let (scene, mut faults) = (Scene::new(), Faults::default());
        if registering {
            faults.lanes = LaneFaults::registering().into();
        }
        let outcome = scene.attempt(&faults, |event| {
            if matches!(event, Event::Round { number: 2, .. }) {
                scene.options.limits.change(|limits| limits.bandwidth_max = NonZeroU64::new(1));
                faults.lanes.arm_write(0, 0, WriteFault::Panic);
                faults.lanes.arm_write(1, 0, WriteFault::Panic);
            }
        });
        assert_eq!(faults.lanes.struck(), 1, "the other lane got to nothing");
        scene.options.limits.change(|limits| limits.bandwidth_max = None);
        let (cause, _) = scene.stayed(outcome);
        assert!(matches!(&cause, MigrationFailure::Panicked(_)), "{cause}");
    }
}

#[test]
fn a_file_whose_lane_panics_is_not_stored_and_is_sent_again() {
    let place = tempfile::tempdir().unwrap();
    let (path, into) = (place.path().join("image"), place.path().join("into"));
    fs::write(&path, vec![7; 40 << 20]).unwrap();
    fs::create_dir(&into).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let store = Store::new(&into, false).unwrap();
    let faults = Arc::new(LaneFaults::default());
    let faulty = FaultyProvider::new("rdma", faults.clone(), Arc::default());
    let receiver = image::Receiver::from_listener(listener, faulty.clone().into());
    let transports = Transports::from(faulty).then(TcpProvider);
    let options = image::Options { transports, lanes: Some(2), ..image::Options::default() };
    let transfer = || {
        thread::scope(|scope| {
            let stored = scope.spawn(|| receiver.receive(&store, &Cancel::default()));
            let send = || image::send(&path, &to, &options, &image::Progress::default());
            (send(), stored.join().unwrap())
        })
    };
    faults.arm_write(1, 0, WriteFault::Panic);
    let (sent, stored) = transfer();
    assert!(matches!(sent.unwrap_err().cause, SendFailure::Transfer(SessionError::Panicked(_))));
    assert!(matches!(stored.unwrap_err(), StoreError::Transfer(SessionError::GaveUp { .. })));
    let (sent, stored) = transfer();
    assert_eq!(sent.unwrap().digest, stored.unwrap().digest);
    assert_eq!(fs::read(into.join("image")).unwrap(), fs::read(&path).unwrap());
}
