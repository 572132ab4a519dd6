//! The ends of the lanes: memory that cannot be registered, lanes that do not connect, a device that does not
//! release memory.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sterna_rdma::CompletionStatus;

use super::{Faults, Moment, Scene, each, pairs};
use crate::destination::ReceiveError;
use crate::source::MigrationFailure;
use crate::transport::TransportError;
use crate::transport::faulty::{LaneFaults, WriteFault, completed_with};

/// An obstacle to registering memory, whether TCP may replace RDMA then, and the reported reason.
type Obstacle = (fn() -> TransportError, bool, &'static str);

const OBSTACLES: [Obstacle; 4] = [
    (cannot_pin, true, "cannot pin"),
    (refused, true, "ibv_reg_mr failed"),
    (out_of_range, false, "does not lie inside"),
    (disagreement, false, "do not fit what was agreed"),
];

fn cannot_pin() -> TransportError {
    let source = io::Error::from_raw_os_error(libc::ENOMEM);
    sterna_rdma::Error::Pin { len_bytes: 1 << 20, memlock_limit_bytes: Some(1 << 16), source }.into()
}

fn refused() -> TransportError {
    sterna_rdma::Error::Call { call: "ibv_reg_mr", source: io::Error::from_raw_os_error(libc::EINVAL) }.into()
}

fn out_of_range() -> TransportError {
    sterna_rdma::Error::RegionOutOfRange { offset_bytes: 0, len_bytes: 2, mapping_len_bytes: 1 }.into()
}

fn disagreement() -> TransportError {
    TransportError::Disagreement("for a test".into())
}

fn registering() -> Faults {
    Faults { lanes: Arc::new(LaneFaults::registering()), ..Faults::default() }
}

#[test]
fn memory_is_registered_before_pages_are_written() {
    let (scene, faults) = (Scene::new(), registering());
    assert_eq!(scene.moved(scene.attempt(&faults, |_| {})).transport, "rdma");
}

#[test]
fn memory_that_the_source_cannot_register_is_sent_over_tcp_or_stays() {
    each(pairs(&OBSTACLES, &Moment::ALL), |&((error, may_fall_back, says), moment)| {
        let (scene, faults) = (Scene::new(), registering());
        let outcome = scene.attempt_at(moment, &faults, || faults.lanes.registration.arm(error()));
        assert_eq!(faults.lanes.struck(), 1);
        if may_fall_back && moment != Moment::Paused {
            scene.fell_back(outcome, says);
        } else {
            let (cause, there) = scene.stayed(outcome);
            assert!(matches!(&cause, MigrationFailure::Transport(_)), "{cause}");
            assert!(cause.to_string().contains(says), "{cause}");
            assert!(matches!(there, ReceiveError::SourceGaveUp(_)), "{there}");
        }
    });
}

#[test]
fn memory_that_the_destination_cannot_register_is_sent_over_tcp_or_stays() {
    each(pairs(&OBSTACLES, &Moment::ALL), |&((error, may_fall_back, says), moment)| {
        let (scene, faults) = (Scene::new(), registering());
        let outcome = scene.attempt_at(moment, &faults, || faults.lane_receiver.register.arm(error()));
        assert!(faults.lane_receiver.register.has_struck());
        if may_fall_back && moment != Moment::Paused {
            scene.fell_back(outcome, says);
            return;
        }
        let (cause, there) = scene.stayed(outcome);
        assert!(cause.to_string().contains(says), "{cause}");
        if may_fall_back {
            assert!(matches!(&cause, MigrationFailure::Transport(TransportError::FailedThere(_))), "{cause}");
            assert!(matches!(there, ReceiveError::SourceGaveUp(_)), "{there}");
        } else {
            assert!(matches!(&cause, MigrationFailure::DestinationFailed(_)), "{cause}");
            assert!(matches!(there, ReceiveError::Transport(_)), "{there}");
        }
    });
}

#[test]
fn lanes_that_do_not_connect_make_way_for_tcp_or_end_the_migration() {
    for (error, may_fall_back, says) in OBSTACLES {
        let (scene, faults) = (Scene::new(), Faults::default());
        faults.lanes.connect.arm(error());
        let outcome = scene.attempt(&faults, |_| {});
        assert_eq!(faults.lanes.struck(), 1);
        if may_fall_back {
            scene.fell_back(outcome, says);
        } else {
            assert!(outcome.source.as_ref().is_err_and(|error| error.refused), "no page was sent");
            let (cause, there) = scene.stayed(outcome);
            assert!(cause.to_string().contains(says), "{cause}");
            assert!(matches!(there, ReceiveError::SourceGaveUp(_)), "{there}");
        }
    }
}

/// The source could still write into that memory.
#[test]
fn a_guest_of_which_a_device_does_not_let_go_is_run_at_the_source() {
    let (scene, faults) = (Scene::new(), Faults::default());
    faults.lane_receiver.revoke.arm(refused());
    let outcome = scene.attempt(&faults, |_| {});
    assert!(faults.lane_receiver.revoke.has_struck());
    let (cause, there) = scene.stayed(outcome);
    let MigrationFailure::DestinationFailed(why) = &cause else { panic!("{cause}") };
    assert!(why.contains("ibv_reg_mr failed"), "{why}");
    assert!(matches!(there, ReceiveError::Transport(_)), "{there}");
}

/// The device keeps memory of a guest that was discarded; the guest that arrives over TCP has memory of its
/// own.
#[test]
fn a_device_that_does_not_let_go_of_a_discarded_guest_harms_nobody() {
    let (scene, faults) = (Scene::new(), Faults::default());
    faults.lane_receiver.revoke.arm(refused());
    let outcome = scene.attempt_at(Moment::LaterRound, &faults, || {
        faults.lanes.arm_write(0, 3, WriteFault::Fail(CompletionStatus::RetryExceeded));
    });
    assert!(faults.lane_receiver.revoke.has_struck());
    scene.fell_back(outcome, &CompletionStatus::RetryExceeded.to_string());
}

/// No peer can reach that memory, and the guest's other memory is not affected.
#[test]
fn memory_that_a_device_keeps_without_a_queue_pair_does_not_keep_the_guest_from_running() {
    let (scene, faults) = (Scene::new(), registering());
    faults.lane_receiver.release.arm(refused());
    let outcome = scene.attempt(&faults, |_| {});
    assert_eq!(scene.moved(outcome).transport, "rdma");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !faults.lane_receiver.release.has_struck() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(faults.lane_receiver.release.has_struck(), "it is released beside the guest");
}

/// The destination fails first, then its device keeps the discarded memory.
#[test]
fn both_ends_may_fail_one_after_the_other() {
    let (scene, faults) = (Scene::new(), registering());
    faults.lane_receiver.revoke.arm(refused());
    let outcome = scene.attempt_at(Moment::LaterRound, &faults, || {
        faults.lane_receiver.await_round.arm(completed_with(1, CompletionStatus::Flushed));
        faults.lanes.registration.arm(cannot_pin());
    });
    assert!(faults.lane_receiver.revoke.has_struck());
    let report = scene.moved(outcome);
    assert_eq!(report.transport, "tcp");
}
