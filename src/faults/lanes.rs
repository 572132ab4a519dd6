//! Lanes that drop, delay, repeat and reorder their writes, or are cut.

use std::num::NonZeroU64;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use sterna_rdma::CompletionStatus;

use super::guest::BUSY_PAGES;
use super::{Faults, Moment, Outcome, Scene, Watch, each, pairs, wait_until};
use crate::convergence::Limits;
use crate::destination::ReceiveError;
use crate::progress::Event;
use crate::source::{MigrationFailure, Options};
use crate::transport::TransportError;
use crate::transport::faulty::{FenceFault, ReceiverFaults, WriteFault};
use crate::verify::Verify;

fn verifying(verify: Verify) -> Scene {
    Scene::with(Options { verify, ..Options::default() })
}

/// Loses the last write to a page of the second region. All busy pages of the region come before it.
fn drop_one(scene: &Scene, moment: Moment) -> Outcome {
    let faults = Faults::default();
    let lose = || faults.lanes.arm_write(1, BUSY_PAGES, WriteFault::Drop);
    let outcome = if moment == Moment::LaterRound {
        scene.attempt(&faults, |event| match event {
            // Harvested after the second round, and sent in the third.
            Event::Round { number: 1, .. } => scene.guest.write_spare_page(1),
            Event::Round { number: 2, .. } => lose(),
            _ => {}
        })
    } else {
        scene.attempt_at(moment, &faults, lose)
    };
    assert_eq!(faults.lanes.struck(), 1);
    outcome
}

#[test]
fn a_write_that_is_lost_is_found_by_comparing_and_the_guest_runs_on() {
    each(pairs(&[Verify::Full, Verify::Final], &Moment::ALL), |&(verify, moment)| {
        let scene = verifying(verify);
        let (cause, there) = scene.stayed(drop_one(&scene, moment));
        let MigrationFailure::DestinationFailed(why) = &cause else { panic!("{cause}") };
        assert!(why.contains("1 of 4 blocks of memory differ from the source's"), "{why}");
        assert!(matches!(there, ReceiveError::MemoryDiffers { blocks: 1, of: 4, region: 1, .. }), "{there}");
    });
}

/// Proves that a write is lost: without comparing, the loss is not detected.
#[test]
fn a_write_that_is_lost_is_not_found_where_nothing_is_compared() {
    each(Moment::ALL, |&moment| {
        let scene = Scene::new();
        let (report, pages) = scene.moved_with(drop_one(&scene, moment));
        assert_eq!((report.transport.as_str(), pages), ("rdma", 1));
    });
}

/// An old copy of a page is written after the last fence, over newer content.
fn write_old(scene: &Scene) -> Outcome {
    let faults = Faults::default();
    let outcome = scene.attempt(&faults, |event| match event {
        Event::Round { number: 2, .. } => faults.lanes.arm_write(0, 0, WriteFault::KeepOld),
        Event::Paused => faults.lanes.arm_fence(0, FenceFault::WriteOld),
        _ => {}
    });
    assert_eq!(faults.lanes.struck(), 2);
    outcome
}

#[test]
fn a_page_that_an_older_write_overtakes_is_found_by_comparing_all_of_memory() {
    let scene = Scene::new();
    let (_, pages) = scene.moved_with(write_old(&scene));
    assert_eq!(pages, 1, "nothing is compared");
    let scene = verifying(Verify::Full);
    let (cause, there) = scene.stayed(write_old(&scene));
    assert!(matches!(cause, MigrationFailure::DestinationFailed(_)), "{cause}");
    assert!(matches!(there, ReceiveError::MemoryDiffers { blocks: 1, region: 0, .. }), "{there}");
}

#[test]
fn delays_repetitions_and_another_order_of_pages_change_nothing() {
    let writes: [fn() -> WriteFault; 4] = [
        || WriteFault::Delay(Duration::from_millis(50)),
        || WriteFault::Repeat,
        || WriteFault::Late(5),
        || WriteFault::Late(u32::MAX),
    ];
    each(pairs(&writes, &Moment::ALL), |&(fault, moment)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let outcome = scene.attempt_at(moment, &faults, || {
            (0..2).for_each(|lane| faults.lanes.arm_write(lane, 3, fault()));
            faults.lanes.arm_write(0, 2, fault());
        });
        assert_eq!(faults.lanes.struck(), 3);
        assert_eq!(scene.moved(outcome).transport, "rdma");
    });
    let fences: [fn() -> FenceFault; 2] =
        [|| FenceFault::Delay(Duration::from_millis(50)), || FenceFault::Repeat];
    each(pairs(&fences, &Moment::ALL), |&(fault, moment)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let outcome = scene.attempt_at(moment, &faults, || faults.lanes.arm_fence(1, fault()));
        assert_eq!(faults.lanes.struck(), 1);
        assert_eq!(scene.moved(outcome).transport, "rdma");
    });
}

fn impatient() -> Faults {
    let lane_receiver = Arc::new(ReceiverFaults::impatient(Duration::from_millis(300)));
    Faults { lane_receiver, ..Faults::default() }
}

#[test]
fn a_later_fence_of_the_lane_stands_for_one_that_is_lost() {
    let (scene, faults) = (Scene::new(), Faults::default());
    let outcome =
        scene.attempt_at(Moment::FirstRound, &faults, || faults.lanes.arm_fence(0, FenceFault::Drop));
    assert_eq!(faults.lanes.struck(), 1);
    assert_eq!(scene.moved(outcome).transport, "rdma");
}

#[test]
fn a_destination_does_not_go_on_without_the_last_fence_of_each_lane() {
    for lane in [0, 1] {
        let (scene, faults) = (Scene::new(), impatient());
        let outcome =
            scene.attempt_at(Moment::Paused, &faults, || faults.lanes.arm_fence(lane, FenceFault::Drop));
        assert_eq!(faults.lanes.struck(), 1);
        let (cause, there) = scene.stayed(outcome);
        assert!(matches!(cause, MigrationFailure::Transport(TransportError::FailedThere(_))), "{cause}");
        assert!(cause.to_string().contains(&format!("lane {lane} has made no progress")), "{cause}");
        assert!(matches!(there, ReceiveError::SourceGaveUp(_)), "{there}");
    }
}

#[test]
fn a_lane_of_which_no_fence_comes_makes_way_for_tcp_while_the_guest_runs() {
    let (scene, faults) = (Scene::new(), impatient());
    (0..10).for_each(|_| faults.lanes.arm_fence(0, FenceFault::Drop));
    let outcome = scene.attempt(&faults, |event| {
        if matches!(event, Event::Round { .. }) {
            wait_until("the destination waits no more", || faults.lane_receiver.has_struck());
        }
    });
    scene.fell_back(outcome, &CompletionStatus::RetryExceeded.to_string());
}

#[test]
fn a_lane_that_is_cut_makes_way_for_tcp_while_the_guest_runs_and_ends_the_migration_after() {
    let cuts: [fn(&Faults); 2] = [
        |faults| faults.lanes.arm_write(0, 4, WriteFault::Cut),
        |faults| faults.lanes.arm_fence(1, FenceFault::Cut),
    ];
    let choices: [fn() -> Scene; 3] = [Scene::new, || Scene::by_name(&["rdma"]), || Scene::by_name(&["tcp"])];
    each(pairs(&pairs(&choices, &Moment::ALL), &cuts), |&((scene, moment), cut)| {
        let scene = scene();
        let faults = Faults::default();
        let outcome = scene.attempt_at(moment, &faults, || cut(&faults));
        assert_eq!(faults.lanes.struck(), 1);
        if scene.schemes.len() > 1 && moment != Moment::Paused {
            scene.fell_back(outcome, &CompletionStatus::RetryExceeded.to_string());
            return;
        }
        let (cause, _) = scene.stayed(outcome);
        let MigrationFailure::Transport(error) = &cause else { panic!("{cause}") };
        let as_tcp_says = matches!(error, TransportError::Stream { .. } | TransportError::Closed { .. });
        assert_eq!(as_tcp_says, scene.schemes == ["tcp"], "{cause}");
    });
}

#[test]
fn lanes_that_are_cut_behind_the_last_fence_have_brought_all_there_is() {
    let (scene, faults) = (Scene::new(), Faults::default());
    let outcome = scene.attempt_at(Moment::Paused, &faults, || {
        (0..2).for_each(|lane| faults.lanes.arm_fence(lane, FenceFault::CutAfter));
    });
    assert_eq!(faults.lanes.struck(), 2);
    assert_eq!(scene.moved(outcome).transport, "rdma");
}

#[test]
fn rdma_that_was_asked_for_by_name_makes_way_for_nothing() {
    let scene = Scene::by_name(&["rdma"]);
    let faults = Faults::default();
    let outcome = scene.attempt_at(Moment::LaterRound, &faults, || {
        faults.lanes.arm_write(0, 0, WriteFault::Fail(CompletionStatus::RetryExceeded));
    });
    let (cause, _) = scene.stayed(outcome);
    assert!(matches!(cause, MigrationFailure::Transport(TransportError::Write { .. })), "{cause}");
}

#[test]
fn what_memory_protection_stopped_on_one_lane_counts_more_than_what_failed_on_another() {
    each(pairs(&Moment::ALL, &[0, 1]), |&(moment, first)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let together = Arc::new(Barrier::new(2));
        let outcome = scene.attempt_at(moment, &faults, || {
            for (lane, status) in [(0, CompletionStatus::Flushed), (1, CompletionStatus::RemoteAccess)] {
                // So that neither is stopped before it has failed.
                faults.lanes.arm_write(lane, 0, WriteFault::Meet(together.clone()));
                if lane != first {
                    faults.lanes.arm_write(lane, 0, WriteFault::Delay(Duration::from_millis(50)));
                }
                faults.lanes.arm_write(lane, 0, WriteFault::Fail(status));
            }
        });
        assert_eq!(faults.lanes.struck(), 5);
        let (cause, _) = scene.stayed(outcome);
        assert!(cause.to_string().contains(&CompletionStatus::RemoteAccess.to_string()), "{cause}");
    });
}

/// A link so slow that the guest is throttled.
#[test]
fn a_guest_that_was_slowed_is_not_when_its_lanes_fail_whatever_comes_of_it() {
    let causes = [CompletionStatus::RetryExceeded, CompletionStatus::RemoteAccess];
    each(pairs(&causes, &[false, true]), |&(status, has_quota)| {
        let scene = Scene::with(Options { limits: slow_link().into(), ..Options::default() });
        if has_quota {
            scene.guest.seen.have_quota();
        }
        let faults = Faults::default();
        let watch = Watch(|event: &Event| match event {
            Event::Throttled { percent: 1.., write_limit_mbps } => {
                assert_eq!(
                    (write_limit_mbps.is_some(), scene.guest.throttle_percent() == 0),
                    (has_quota, has_quota)
                );
                assert_eq!(scene.guest.seen.write_limit().is_some(), has_quota);
                faults.lanes.arm_write(1, 5, WriteFault::Fail(status));
            }
            Event::FellBack { .. } => {
                scene.options.limits.change(|limits| limits.downtime = Duration::from_secs(60));
            }
            Event::Connected { .. } => {
                assert_eq!((scene.guest.throttle_percent(), scene.guest.seen.write_limit()), (0, None));
            }
            _ => {}
        });
        let outcome = scene.attempt_by(&faults, &scene.options, &watch);
        assert_eq!(faults.lanes.struck(), 1);
        if status == CompletionStatus::RetryExceeded {
            scene.fell_back(outcome, &status.to_string());
        } else {
            scene.stayed(outcome);
        }
    });
}

/// Throttles, whatever it costs, and only that.
fn slow_link() -> Limits {
    Limits {
        // More than a switch takes with nothing to send, less than one with all busy pages.
        downtime: Duration::from_millis(150),
        bandwidth_max: NonZeroU64::new(1_000_000),
        rounds_max: 1000,
        if_stuck: "throttle".parse().unwrap(),
        ..Limits::default()
    }
}

#[test]
fn a_guest_has_a_share_of_the_time_if_its_writes_cannot_be_limited_or_counted() {
    each(["limit", "writes", "write_quota"], |&call| {
        let scene = Scene::with(Options { limits: slow_link().into(), ..Options::default() });
        scene.guest.seen.have_quota();
        if call == "limit" {
            scene.guest.seen.err_in(&[call]);
        } else {
            scene.guest.seen.panic_in(&[call]);
        }
        let watch = Watch(|event: &Event| {
            if let Event::Throttled { percent: 1.., write_limit_mbps } = event {
                assert_eq!(*write_limit_mbps, None);
                assert!(scene.guest.throttle_percent() > 0);
                assert_eq!(scene.guest.seen.write_limit(), None);
                scene.options.limits.change(|limits| limits.downtime = Duration::from_secs(60));
            }
        });
        let report = scene.moved(scene.attempt_by(&Faults::default(), &scene.options, &watch));
        assert!(report.lost_to_throttling_ms > 0.0);
        assert!(report.rounds.iter().all(|round| round.write_limit_mbps.is_none()));
    });
}
