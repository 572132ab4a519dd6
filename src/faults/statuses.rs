//! Every status with which a write can complete, at every moment of a migration.

use sterna_rdma::CompletionStatus;

use super::{Faults, Moment, Scene, each, pairs};
use crate::destination::ReceiveError;
use crate::source::MigrationFailure;
use crate::transport::TransportError;
use crate::transport::faulty::{FenceFault, WriteFault, completed_with};

/// How a migration ends if a write fails while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// The device or the network failed: the migration continues over TCP.
    OverTcp,
    /// A defect, or an attack: the migration ends, and the guest runs on at the source.
    AtTheSource,
}

/// Without a wildcard, so that a new status requires a decision.
#[deny(clippy::wildcard_enum_match_arm, clippy::match_wildcard_for_single_variants)]
fn while_it_runs(status: CompletionStatus) -> Ends {
    match status {
        CompletionStatus::LocalLength => Ends::AtTheSource,
        CompletionStatus::LocalOperation => Ends::AtTheSource,
        CompletionStatus::LocalEndToEndContext => Ends::AtTheSource,
        CompletionStatus::LocalProtection => Ends::AtTheSource,
        CompletionStatus::Flushed => Ends::OverTcp,
        CompletionStatus::MemoryWindowBind => Ends::AtTheSource,
        CompletionStatus::BadResponse => Ends::AtTheSource,
        CompletionStatus::LocalAccess => Ends::AtTheSource,
        CompletionStatus::RemoteInvalidRequest => Ends::AtTheSource,
        CompletionStatus::RemoteAccess => Ends::AtTheSource,
        CompletionStatus::RemoteOperation => Ends::OverTcp,
        CompletionStatus::RetryExceeded => Ends::OverTcp,
        CompletionStatus::ReceiverNotReady => Ends::OverTcp,
        CompletionStatus::LocalReliableDatagramDomain => Ends::AtTheSource,
        CompletionStatus::RemoteInvalidReadRequest => Ends::AtTheSource,
        CompletionStatus::RemoteAborted => Ends::OverTcp,
        CompletionStatus::InvalidEndToEndContext => Ends::AtTheSource,
        CompletionStatus::InvalidEndToEndContextState => Ends::AtTheSource,
        CompletionStatus::Fatal => Ends::OverTcp,
        CompletionStatus::ResponseTimeout => Ends::OverTcp,
        CompletionStatus::General => Ends::OverTcp,
        CompletionStatus::TagMatching => Ends::AtTheSource,
        CompletionStatus::TagMatchingRendezvous => Ends::AtTheSource,
        CompletionStatus::Unknown(_) => Ends::AtTheSource,
    }
}

fn all() -> Vec<CompletionStatus> {
    CompletionStatus::ALL.iter().copied().chain([CompletionStatus::Unknown(99)]).collect()
}

/// The kind of request that completes with the status.
#[derive(Clone, Copy, Debug)]
enum What {
    Write,
    Fence,
}

#[test]
fn after_each_status_the_guest_moves_over_tcp_or_runs_on_and_no_page_is_forgotten() {
    let cases = pairs(&pairs(&all(), &Moment::ALL), &[What::Write, What::Fence]);
    each(cases, |&((status, moment), what)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let outcome = scene.attempt_at(moment, &faults, || match what {
            // Some pages are in flight then, and some are not.
            What::Write => faults.lanes.arm_write(1, 5, WriteFault::Fail(status)),
            What::Fence => faults.lanes.arm_fence(0, FenceFault::Fail(status)),
        });
        assert_eq!(faults.lanes.struck(), 1);
        match (while_it_runs(status), moment) {
            (Ends::OverTcp, Moment::FirstRound | Moment::LaterRound) => {
                scene.fell_back(outcome, &status.to_string());
            }
            (Ends::AtTheSource, _) | (Ends::OverTcp, Moment::Paused) => {
                let (cause, there) = scene.stayed(outcome);
                let MigrationFailure::Transport(TransportError::Write { error, .. }) = &cause else {
                    panic!("{cause}")
                };
                assert_eq!(error.status, status);
                assert!(cause.to_string().contains(&status.to_string()), "{cause}");
                assert!(matches!(&there, ReceiveError::SourceGaveUp(why) if *why == cause.to_string()));
            }
        }
    });
}

#[test]
fn after_each_status_at_the_destination_the_same_holds() {
    each(pairs(&all(), &Moment::ALL), |&(status, moment)| {
        let (scene, faults) = (Scene::new(), Faults::default());
        let outcome = scene.attempt_at(moment, &faults, || {
            faults.lane_receiver.await_round.arm(completed_with(0, status));
        });
        assert!(faults.lane_receiver.await_round.has_struck());
        match (while_it_runs(status), moment) {
            // The source's device reports that the peer does not answer.
            (Ends::OverTcp, Moment::FirstRound | Moment::LaterRound) => {
                scene.fell_back(outcome, &CompletionStatus::RetryExceeded.to_string());
            }
            (Ends::OverTcp, Moment::Paused) => {
                let (cause, _) = scene.stayed(outcome);
                assert!(
                    matches!(&cause, MigrationFailure::Transport(TransportError::FailedThere(_))),
                    "{cause}"
                );
                assert!(cause.to_string().contains(&status.to_string()), "{cause}");
            }
            (Ends::AtTheSource, _) => {
                let (cause, there) = scene.stayed(outcome);
                let MigrationFailure::DestinationFailed(why) = &cause else { panic!("{cause}") };
                assert!(why.contains(&status.to_string()), "{why}");
                assert!(matches!(&there, ReceiveError::Transport(TransportError::Write { .. })), "{there}");
            }
        }
    });
}
