use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use super::*;
use crate::handover::JOURNAL_LEN;
use crate::wire::AttemptId;

const ATTEMPT_ID: AttemptId = AttemptId([1; 16]);

/// A private folder, whatever the file system of the host's temporary files.
fn folder() -> (tempfile::TempDir, HostState) {
    let private = fs::Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().permissions(private).tempdir().unwrap();
    let state = HostState::in_folder(&folder.path().join("state"), StorageCheck::Accept).unwrap();
    (folder, state)
}

fn record(mark: RecordKind, side: Side, attempt_id: AttemptId) -> Record {
    Record {
        mark,
        side,
        attempt_id,
        peer: "host-b:7837".into(),
        address: Some(([192, 0, 2, 1], 7837).into()),
        identity: None,
    }
}

fn committed() -> Record {
    record(RecordKind::Committed, Side::Source, ATTEMPT_ID)
}

#[test]
fn what_is_recorded_is_there_for_the_next_claim_in_one_sequence_for_both_roles() {
    let (_folder, files) = folder();
    for state in [files, HostState::lost_with_this_process()] {
        assert!(state.look("tern").unwrap().is_none());
        let claim = state.start("tern", false).unwrap();
        for mark in [RecordKind::Committed, RecordKind::Done] {
            claim.append(record(mark, Side::Source, ATTEMPT_ID)).unwrap();
        }
        drop(claim);
        let claim = state.claim("tern").unwrap();
        claim.append(record(RecordKind::Prepared, Side::Destination, AttemptId([2; 16]))).unwrap();
        claim.append(record(RecordKind::Running, Side::Destination, AttemptId([2; 16]))).unwrap();
        let marks: Vec<_> = claim.journal().records().iter().map(|record| record.mark).collect();
        assert_eq!(
            marks,
            [
                RecordKind::Started,
                RecordKind::Committed,
                RecordKind::Done,
                RecordKind::Prepared,
                RecordKind::Running
            ]
        );
        assert_eq!(
            claim.journal().of(ATTEMPT_ID).unwrap(),
            &record(RecordKind::Done, Side::Source, ATTEMPT_ID)
        );
        assert_eq!(state.find(ATTEMPT_ID, Side::Source).unwrap().0, "tern");
        assert!(state.find(ATTEMPT_ID, Side::Destination).is_none());
        assert!(state.find(AttemptId([3; 16]), Side::Source).is_none());
    }
}

#[test]
fn a_name_is_claimed_once_for_as_long_as_the_claim_or_a_clone_of_it_lives() {
    let (_folder, files) = folder();
    for state in [files, HostState::lost_with_this_process()] {
        let claim = state.start("tern", false).unwrap();
        assert!(matches!(state.claim("tern"), Err(StateError::Claimed { .. })));
        assert!(matches!(state.start("tern", true), Err(StartError::State(StateError::Claimed { .. }))));
        assert!(state.look("tern").unwrap().unwrap().holder.is_some(), "its process lives");
        assert!(state.claim("gull").is_ok());
        let clone = claim.clone();
        drop(claim);
        assert!(state.claim("tern").is_err());
        drop(clone);
        assert!(state.look("tern").unwrap().unwrap().holder.is_none());
        state.claim("tern").unwrap();
    }
}

#[test]
fn of_many_that_start_one_name_at_once_one_wins_also_while_others_look() {
    const STARTS: usize = 4;
    let (_folder, state) = folder();
    for round in 0..20 {
        let name = format!("tern-{round}");
        let barrier = Barrier::new(STARTS + 1);
        let won = thread::scope(|scope| {
            let starts: Vec<_> = (0..STARTS)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        state.start(&name, false)
                    })
                })
                .collect();
            barrier.wait();
            for _ in 0..20 {
                let _ = state.look(&name).unwrap();
            }
            // Hold all claims until the last attempt is done.
            let claims: Vec<_> = starts.into_iter().map(|start| start.join().unwrap()).collect();
            claims.iter().filter(|claim| claim.is_ok()).count()
        });
        assert_eq!(won, 1, "round {round}");
    }
}

#[test]
fn looking_at_a_state_keeps_no_one_from_claiming_it() {
    let (_folder, state) = folder();
    drop(state.start("tern", false).unwrap());
    let over = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    state.look("tern").unwrap();
                }
            });
        }
        let claimed = (0..50).map(|_| state.claim("tern").map(drop)).collect::<Result<Vec<_>, _>>();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        claimed.unwrap();
    });
}

#[test]
fn a_guest_that_may_be_elsewhere_is_started_only_as_another_one() {
    let (_folder, files) = folder();
    for state in [files, HostState::lost_with_this_process()] {
        let claim = state.start("tern", false).unwrap();
        claim.append(committed()).unwrap();
        drop(claim);
        assert!(matches!(state.start("tern", false), Err(StartError::InDoubt { .. })));
        state.claim("tern").unwrap().append(record(RecordKind::Done, Side::Source, ATTEMPT_ID)).unwrap();
        assert!(matches!(state.start("tern", false), Err(StartError::Elsewhere { .. })));
        drop(state.start("tern", true).unwrap());
        let journal = state.look("tern").unwrap().unwrap().journal;
        assert_eq!(journal.last().unwrap().mark, RecordKind::Started, "now it is another guest's name");
        // After that guest was ended on purpose, the other one is still elsewhere.
        state.start("tern", false).unwrap().retire();
        assert!(matches!(state.start("tern", false), Err(StartError::Elsewhere { .. })));
    }
}

#[test]
fn a_guest_that_a_dead_process_left_ready_is_refused_for_good_by_the_next_claim() {
    let (_folder, state) = folder();
    let ready = record(RecordKind::Prepared, Side::Destination, ATTEMPT_ID);
    state.claim("tern").unwrap().append(ready.clone()).unwrap();
    assert_eq!(state.look("tern").unwrap().unwrap().journal.last(), Some(&ready));
    assert!(matches!(state.start("tern", false), Err(StartError::Elsewhere { .. })));
    assert_eq!(
        state.find(ATTEMPT_ID, Side::Destination).unwrap().1,
        Record { mark: RecordKind::Refused, ..ready }
    );
}

#[test]
fn how_long_a_record_takes_is_known_before_there_is_one_and_costs_none() {
    let (_folder, state) = folder();
    let claim = state.claim("tern").unwrap();
    assert!(claim.writer().unwrap().record_time() > Duration::ZERO);
    claim.append(committed()).unwrap();
    drop(claim);
    let again = state.claim("tern").unwrap();
    assert_eq!(again.journal().records(), [committed()]);
    let memory = HostState::lost_with_this_process().claim("tern").unwrap();
    assert_eq!(memory.writer().unwrap().record_time(), Duration::ZERO);
}

#[test]
fn a_state_that_says_nothing_goes_with_its_claim_and_one_with_a_record_stays() {
    let (folder, files) = folder();
    let path = |name: &str| folder.path().join("state").join(format!("{name}.state"));
    for state in [files, HostState::lost_with_this_process()] {
        drop(state.claim("tern").unwrap());
        assert!(state.look("tern").unwrap().is_none());
        assert!(!path("tern").exists());
        // A guest that was ended on purpose and never migrated.
        state.start("tern", false).unwrap().retire();
        assert!(state.look("tern").unwrap().is_none());
        let claim = state.start("gull", false).unwrap();
        claim.append(committed()).unwrap();
        claim.retire();
        drop(claim);
        assert!(state.look("gull").unwrap().is_some());
    }
    let failing = GuestClaim::failing(&[RecordKind::Started]);
    assert!(failing.append(record(RecordKind::Started, Side::Source, ATTEMPT_ID)).is_err());
    failing.retire();
    assert!(failing.journal().last().is_none());
    // It removes only the file that it made: that file was moved away, and another has its name.
    let state = HostState::in_folder(&folder.path().join("state"), StorageCheck::Accept).unwrap();
    let claim = state.claim("tern").unwrap();
    fs::remove_file(path("tern")).unwrap();
    fs::write(path("tern"), b"another").unwrap();
    drop(claim);
    assert_eq!(fs::read(path("tern")).unwrap(), b"another");
}

#[test]
fn one_attempt_at_a_time_writes_records() {
    let (_folder, state) = folder();
    let claim = state.start("tern", false).unwrap();
    let writer = claim.writer().unwrap();
    assert!(matches!(claim.clone().writer(), Err(StateError::Claimed { .. })));
    drop(writer);
    claim.writer().unwrap();
}

#[test]
fn its_space_is_reserved_and_it_is_this_users_alone() {
    let (folder, state) = folder();
    let claim = state.claim("tern").unwrap();
    for number in 0..40 {
        claim.append(record(RecordKind::Refused, Side::Destination, AttemptId([number; 16]))).unwrap();
    }
    let found = fs::metadata(folder.path().join("state/tern.state")).unwrap();
    assert_eq!(found.len(), JOURNAL_LEN as u64);
    assert!(found.blocks() * 512 >= JOURNAL_LEN as u64, "{} blocks", found.blocks());
    assert_eq!(found.mode() & 0o777, 0o600);
}

#[test]
fn a_state_says_how_the_process_that_has_the_guest_can_be_reached() {
    let (_folder, state) = folder();
    let claim = state.start("tern", false).unwrap();
    let holder = || state.look("tern").unwrap().unwrap().holder.unwrap();
    assert_eq!(holder(), LockHolder { process: Some(std::process::id()), contact: None });
    claim.announce("/run/sterna/tern.sock");
    assert_eq!(holder().contact.as_deref(), Some("/run/sterna/tern.sock"));
    // The contact is a hint and not a record: one that does not fit is left out.
    claim.announce(&"x".repeat(5000));
    assert_eq!(holder().contact, None);
    claim.append(committed()).unwrap();
    assert_eq!(state.look("tern").unwrap().unwrap().journal.records().len(), 2);
}

#[test]
fn what_is_no_state_of_this_version_is_refused_by_name_and_left_alone() {
    let (folder, state) = folder();
    let path = |name: &str| folder.path().join("state").join(name);
    fs::write(path("gull.state"), b"not a state").unwrap();
    fs::write(path("skua.state"), vec![0; JOURNAL_LEN]).unwrap();
    for name in ["gull", "skua"] {
        assert!(matches!(state.claim(name), Err(StateError::Content { .. })), "{name}");
        assert!(matches!(state.look(name), Err(StateError::Content { .. })), "{name}");
    }
    assert_eq!(fs::read(path("gull.state")).unwrap(), b"not a state");
    assert!(state.find(ATTEMPT_ID, Side::Source).is_none());
    for earlier in ["auk.source.journal", "tern.destination.journal"] {
        fs::write(path(earlier), b"of version 1").unwrap();
        let name = earlier.split('.').next().unwrap();
        for error in [state.claim(name).unwrap_err(), state.look(name).unwrap_err()] {
            assert!(matches!(error, StateError::Earlier(_)), "{error}");
            assert!(error.to_string().contains(earlier), "{error}");
        }
    }
    for name in ["", ".", "..", "a/b", ".hidden", "a\0b"] {
        assert!(matches!(state.claim(name), Err(StateError::Name(_))), "{name:?}");
        assert!(matches!(state.look(name), Err(StateError::Name(_))), "{name:?}");
    }
}
