use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use sterna_trust::Fingerprint;

use super::room::{KEPT_FOR, KEPT_MAX};
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

/// A guest that comes from a host, as far as PREPARED, and is dropped.
fn left_by(state: &HostState, sender: (std::net::IpAddr, Option<Fingerprint>), number: u16) -> AttemptId {
    let mut attempt_id = AttemptId([sender.1.map_or(9, |key| key.0[0]); 16]);
    attempt_id.0[..2].copy_from_slice(&number.to_le_bytes());
    let claim = state.claim_from(sender, &format!("{}-{number}", attempt_id.0[15])).unwrap();
    for mark in [RecordKind::Prepared, RecordKind::Refused] {
        let peer = std::net::SocketAddr::new(sender.0, 1000 + number).to_string();
        let prepared = record(mark, Side::Destination, attempt_id);
        claim.append(Record { peer, address: None, identity: sender.1, ..prepared }).unwrap();
    }
    attempt_id
}

#[test]
fn a_source_leaves_so_many_guests_that_never_ran_and_pushes_out_no_answer() {
    let (folder, state) = folder();
    let address = |last| std::net::IpAddr::from([192, 0, 2, last]);
    let key = |byte| Some(Fingerprint([byte; 32]));
    let max = u16::try_from(KEPT_MAX).unwrap();
    for hostile in [(address(1), key(1)), (address(2), None)] {
        let left: Vec<_> = (0..max).map(|number| left_by(&state, hostile, number)).collect();
        let error = state.claim_from(hostile, "one-more").unwrap_err();
        assert!(matches!(error, StateError::Crowded { left: KEPT_MAX, .. }), "{error}");
        // Another port or address of the same host changes nothing, and a name of before may come again.
        let elsewhere = (if hostile.1.is_some() { address(77) } else { hostile.0 }, hostile.1);
        assert!(state.claim_from(elsewhere, "one-more").is_err());
        let known = format!("{}-0", left[0].0[15]);
        state.claim_from(hostile, &known).unwrap();
        for attempt_id in left {
            assert_eq!(state.find(attempt_id, Side::Destination).unwrap().1.mark, RecordKind::Refused);
        }
    }
    left_by(&state, (address(1), key(3)), 0);
    left_by(&state, (address(3), None), 0);
    // Guests that ran count for no source.
    let ran = state.claim_from((address(1), key(3)), "ran").unwrap();
    ran.append(record(RecordKind::Running, Side::Destination, AttemptId([5; 16]))).unwrap();
    let files = fs::read_dir(folder.path().join("state")).unwrap();
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!(bytes < (2 * KEPT_MAX as u64 + 3) * (200 << 10), "{bytes} bytes");
}

#[test]
fn what_never_ran_is_forgotten_after_its_time_and_what_settles_a_doubt_is_not() {
    let (folder, state) = folder();
    let sender = (std::net::IpAddr::from([192, 0, 2, 1]), Some(Fingerprint([1; 32])));
    let refused = left_by(&state, sender, 0);
    let held = left_by(&state, sender, 1);
    let young = left_by(&state, sender, 2);
    let kinds = [
        (RecordKind::Started, Side::Source),
        (RecordKind::Committed, Side::Source),
        (RecordKind::Done, Side::Source),
        (RecordKind::Refused, Side::Source),
        (RecordKind::Running, Side::Destination),
    ];
    for (number, (mark, side)) in (20..).zip(kinds) {
        let claim = state.claim(&format!("kept-{number}")).unwrap();
        claim.append(record(mark, side, AttemptId([number; 16]))).unwrap();
        // The guest left or ran, and a later attempt was refused.
        claim.append(record(RecordKind::Refused, Side::Destination, AttemptId([number + 40; 16]))).unwrap();
    }
    let _alive = state.claim("1-1").unwrap();
    for file in fs::read_dir(folder.path().join("state")).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "1-2.state" {
            let file = fs::File::options().write(true).open(file.path()).unwrap();
            file.set_modified(std::time::SystemTime::now() - KEPT_FOR - Duration::from_secs(60)).unwrap();
        }
    }
    drop(state.claim_from(sender, "new").unwrap());
    assert!(state.find(refused, Side::Destination).is_none());
    assert!(state.look("1-0").unwrap().is_none());
    for kept in [held, young] {
        assert!(state.find(kept, Side::Destination).is_some());
    }
    for (number, (mark, side)) in (20..).zip(kinds) {
        assert_eq!(state.find(AttemptId([number; 16]), side).unwrap().1.mark, mark);
    }
}

#[test]
fn a_question_reads_only_files_that_changed_and_sees_each_change() {
    let (_folder, state) = folder();
    let index = || match &state.0 {
        host_state::Place::Folder(_, index) => index.len(),
        host_state::Place::Memory(_) => 0,
    };
    for number in 0..4 {
        drop(state.start(&format!("tern-{number}"), false).unwrap());
    }
    let asked = || state.find(ATTEMPT_ID, Side::Source);
    assert!(asked().is_none());
    assert_eq!(index(), 0, "a file that was just written is not believed to stay");
    thread::sleep(Duration::from_millis(2100));
    assert!(asked().is_none());
    assert_eq!(index(), 4);
    let claim = state.claim("tern-2").unwrap();
    claim.append(committed()).unwrap();
    assert_eq!(asked().unwrap(), ("tern-2".into(), committed()));
    let done = record(RecordKind::Done, Side::Source, ATTEMPT_ID);
    claim.append(done.clone()).unwrap();
    assert_eq!(asked().unwrap().1, done);
}
