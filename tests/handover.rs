//! Which host has the guest when a VMM fails at the switch, and whether all writes arrive: tests of the
//! library itself.

mod common;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use common::{Fault, PATIENCE, TestGuest, TestHost, Watch, in_a_lab, machine_kind};
use sterna::convergence::Limits;
use sterna::destination::{Arrival, ReceiveError, Receiver};
use sterna::progress::{Event, Observer, Report};
use sterna::source::{GuestIs, MigrationError, MigrationFailure, Options, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use sterna::verify::Verify;
use sterna_vmm::{MachineKind, Phase};

/// The result of a migration, at either end.
struct Outcome {
    source: thread::Result<Result<Report, MigrationError>>,
    destination: Result<Arrival<TestGuest>, ReceiveError>,
}

fn options() -> Options {
    Options { transports: TcpProvider.into(), verify: Verify::Full, ..Options::default() }
}

/// Moves a guest to `host`, which is another thread of this process.
fn attempt(guest: &TestGuest, host: &TestHost, options: &Options, observer: &dyn Observer) -> Outcome {
    let receiver = Receiver::bind(SocketAddr::from(([127, 0, 0, 1], 0)), HostState::lost_with_this_process())
        .expect("a free port");
    let claim = HostState::lost_with_this_process().start("tern", false).expect("the name is free");
    let to = receiver.local_address().expect("it is bound").to_string();
    // Passes an observer's failed assertion on: the migration alone would continue without it.
    let failed = Mutex::new(None);
    let watch = Watch(|event: &Event| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| observer.event(event))) {
            *failed.lock().expect("it is only set") = Some(panic);
            panic!("the observer failed");
        }
    });
    let outcome = thread::scope(|scope| {
        let source = scope.spawn(|| migrate(guest, &claim, &to, options, &watch));
        let destination = receiver.receive(host, &sterna::destination::Options::default(), &());
        Outcome { source: source.join(), destination }
    });
    match failed.into_inner().expect("it is only set") {
        Some(panic) => resume_unwind(panic),
        None => outcome,
    }
}

impl Outcome {
    #[track_caller]
    fn failed(self) -> (MigrationError, ReceiveError) {
        let source = self.source.expect("the source does not panic").expect_err("the source fails");
        (source, self.destination.expect_err("the destination fails"))
    }

    #[track_caller]
    fn succeeded(self) -> (Report, TestGuest) {
        let arrival = self.destination.expect("the guest arrives");
        (self.source.expect("the source does not panic").expect("the guest moves"), arrival.guest)
    }
}

/// Asserts that a guest moves now and is whole, and that it stands still at the source.
#[track_caller]
fn moves_at_last(guest: &TestGuest) {
    let (report, arrived) = attempt(guest, &TestHost::default(), &options(), &()).succeeded();
    assert_eq!(report.verified_pages, (16 << 20) / 4096);
    assert_eq!(guest.machine.status().phase, Phase::Paused, "it runs there, so not here");
    arrived.runs_whole();
    assert!(arrived.machine.heartbeat().count >= guest.machine.heartbeat().count);
}

/// Lets the guest beat between the first round and the switch, so that the VMM writes into its RAM.
fn beats_after_the_first_round(guest: &TestGuest) -> impl Fn(&Event) + Sync {
    |event| {
        if matches!(event, Event::Round { number: 1, .. }) {
            guest.beats_on();
        }
    }
}

#[test]
fn what_the_vmm_itself_writes_arrives() {
    let guest = TestGuest::started();
    let watch = Watch(beats_after_the_first_round(&guest));
    let (_, arrived) = attempt(&guest, &TestHost::default(), &options(), &watch).succeeded();
    arrived.runs_whole();
}

#[test]
fn most_of_a_quiet_guest_is_compared_while_it_runs_and_what_is_written_later_while_it_is_paused() {
    let guest = TestGuest::started();
    guest.write_when_saved.store(true, Ordering::Relaxed);
    let options = Options { verify: Verify::Final, ..options() };
    let hashed = Mutex::new(0);
    let watch = Watch(|event: &Event| {
        if let Event::Hashed { blocks, of, .. } = event {
            assert_eq!(*of, 8);
            *hashed.lock().expect("nobody panicked") = *blocks;
            // Possibly into a block that was just hashed.
            guest.beats_on();
        }
    });
    let (report, arrived) = attempt(&guest, &TestHost::default(), &options, &watch).succeeded();
    assert_eq!(report.verified_pages, (16 << 20) / 4096);
    assert_eq!(report.blocks_hashed_running + report.blocks_hashed_paused, 8);
    assert!(report.blocks_hashed_paused >= 1, "what was written while it was saved");
    assert!(*hashed.lock().expect("nobody panicked") >= report.blocks_hashed_running);
    assert_eq!(arrived.unused_word(), 1);
    arrived.runs_whole();
}

#[test]
fn what_the_vmm_writes_while_it_saves_arrives() {
    let guest = TestGuest::started();
    guest.write_when_saved.store(true, Ordering::Relaxed);
    let (_, arrived) = attempt(&guest, &TestHost::default(), &options(), &()).succeeded();
    assert_eq!(arrived.unused_word(), 1);
    arrived.runs_whole();
}

#[test]
fn rounds_that_do_not_get_smaller_slow_the_guest_and_its_new_host_runs_it_at_full_speed() {
    let guest = TestGuest::started_at(0);
    guest.busy.store(true, Ordering::Relaxed);
    // The device's writes before each harvest take nearly three times as long to send as the downtime limit
    // allows. Far less is enough for a switch with nothing to send, even under other load.
    let limits = Limits {
        downtime: Duration::from_millis(300),
        bandwidth_max: NonZeroU64::new(10_000_000),
        rounds_max: 1000,
        if_stuck: "throttle".parse().expect("a policy"),
        ..Limits::default()
    };
    let options = Options { limits: limits.into(), ..options() };
    let slowed = Mutex::new(Vec::new());
    let watch = Watch(|event: &Event| {
        if let Event::Throttled { percent, .. } = event {
            slowed.lock().expect("nobody panicked").push((*percent, guest.machine.status().throttle_percent));
            // The device writes no more once the guest is slow.
            guest.busy.store(false, Ordering::Relaxed);
        }
    });
    let (report, arrived) = attempt(&guest, &TestHost::default(), &options, &watch).succeeded();
    let slowed = slowed.into_inner().expect("nobody panicked");
    assert!(slowed.iter().any(|(percent, _)| *percent > 0), "{slowed:?}");
    for (percent, in_the_machine) in slowed {
        assert_eq!(in_the_machine, percent);
    }
    assert!(report.rounds.len() > 3, "{report:?}");
    assert_eq!(report.verified_pages, (16 << 20) / 4096);
    assert_eq!(arrived.unused_word(), guest.unused_word());
    assert!(arrived.unused_word() >= 3, "it was written in every round until the guest was slow");
    arrived.runs_whole();
}

/// Proves that the test of the VMM's own writes can fail: without the software bitmap it does.
#[test]
fn without_the_software_bitmap_the_vmms_writes_are_missed_and_the_destination_refuses() {
    if machine_kind() == MachineKind::Synthetic {
        assert!(
            !in_a_lab() || std::env::var("STERNA_LAB_KIND").as_deref() == Ok("uml"),
            "the VM lab has KVM"
        );
        println!("skipped: a synthetic guest has no log but the software bitmap; with KVM: `ci/lab vm`");
        return;
    }
    for verify in [Verify::Full, Verify::Final] {
        missed_and_refused(&Options { verify, ..options() });
    }
}

fn missed_and_refused(options: &Options) {
    let guest = TestGuest::started();
    guest.forget_own_writes.store(true, Ordering::Relaxed);
    let host = TestHost::default();
    let watch = Watch(beats_after_the_first_round(&guest));
    let (source, destination) = attempt(&guest, &host, options, &watch).failed();
    assert!(matches!(destination, ReceiveError::MemoryDiffers { blocks: 1, region: 0, .. }), "{destination}");
    assert_eq!(source.guest, GuestIs::RunningAtSource);
    assert!(!source.refused);
    let MigrationFailure::DestinationFailed(reason) = &source.cause else { panic!("{source}") };
    assert!(reason.contains("differ from the source's"), "{reason}");
    assert_eq!(host.times_resumed(), 0);
    guest.runs_whole();

    guest.forget_own_writes.store(false, Ordering::Relaxed);
    moves_at_last(&guest);
}

#[test]
fn a_destination_that_cannot_load_the_state_says_so_and_the_source_resumes() {
    let guest = TestGuest::started();
    let host = TestHost { faults: vec![Fault::Load], ..TestHost::default() };
    let (source, destination) = attempt(&guest, &host, &options(), &()).failed();
    assert!(matches!(destination, ReceiveError::Guest(_)), "{destination}");
    let MigrationFailure::DestinationFailed(reason) = &source.cause else { panic!("{source}") };
    assert!(reason.contains("Load fails for a test"), "{reason}");
    assert_eq!(source.guest, GuestIs::RunningAtSource);
    assert_eq!(host.times_resumed(), 0);
    guest.runs_whole();
    moves_at_last(&guest);
}

#[test]
fn a_destination_that_cannot_start_the_guest_hands_it_back() {
    let guest = TestGuest::started();
    let host = TestHost { faults: vec![Fault::Resume], ..TestHost::default() };
    let (source, destination) = attempt(&guest, &host, &options(), &()).failed();
    assert!(matches!(destination, ReceiveError::Start(_)), "{destination}");
    let MigrationFailure::DestinationFailed(reason) = &source.cause else { panic!("{source}") };
    assert!(reason.contains("could not start the guest"), "{reason}");
    assert_eq!(source.guest, GuestIs::RunningAtSource);
    guest.runs_whole();
    moves_at_last(&guest);
}

#[test]
fn a_defect_at_the_source_is_a_failure_and_the_guest_runs_on() {
    let guest = TestGuest::started();
    guest.fail(Fault::DefectInSave);
    let host = TestHost::default();
    let (source, destination) = attempt(&guest, &host, &options(), &()).failed();
    assert!(matches!(source.cause, MigrationFailure::Panicked(_)), "{source}");
    assert_eq!(source.guest, GuestIs::RunningAtSource);
    let ReceiveError::SourceGaveUp(why) = &destination else { panic!("{destination}") };
    assert!(why.contains("for a test"), "{why}");
    assert_eq!(host.times_resumed(), 0, "nothing runs without GO");
    guest.mend();
    guest.runs_whole();
    moves_at_last(&guest);
}

#[test]
fn a_source_that_cannot_save_its_guest_runs_it_on() {
    let guest = TestGuest::started();
    for fault in [Fault::Save, Fault::Pause] {
        guest.fail(fault);
        let host = TestHost::default();
        let (source, destination) = attempt(&guest, &host, &options(), &()).failed();
        assert!(matches!(source.cause, MigrationFailure::Guest(_)), "{source}");
        assert_eq!(source.guest, GuestIs::RunningAtSource);
        let ReceiveError::SourceGaveUp(why) = &destination else { panic!("{destination}") };
        assert!(why.contains("fails for a test"), "{why}");
        assert_eq!(host.times_resumed(), 0);
        guest.mend();
        guest.runs_whole();
    }
    moves_at_last(&guest);
}

#[test]
fn a_source_that_cannot_resume_says_that_the_guest_is_paused_there() {
    let guest = TestGuest::started();
    guest.fail(Fault::Save);
    guest.fail(Fault::Resume);
    let (source, _) = attempt(&guest, &TestHost::default(), &options(), &()).failed();
    assert_eq!(source.guest, GuestIs::PausedAtSource);
    assert_eq!(guest.machine.status().phase, Phase::Paused);
    guest.machine.resume().expect("an operator may");
    guest.runs_whole();
}

#[test]
fn a_cancel_is_heeded_even_when_the_guest_is_paused_for_the_switch() {
    let guest = TestGuest::started();
    let (host, options) = (TestHost::default(), options());
    let cancel = options.cancel.clone();
    let watch = Watch(|event: &Event| {
        if matches!(event, Event::Paused) {
            cancel.cancel();
        }
    });
    let (source, destination) = attempt(&guest, &host, &options, &watch).failed();
    assert!(matches!(source.cause, MigrationFailure::Cancelled), "{source}");
    assert_eq!(source.guest, GuestIs::RunningAtSource);
    assert!(matches!(destination, ReceiveError::SourceGaveUp(_)), "{destination}");
    assert_eq!(host.times_resumed(), 0);
    guest.runs_whole();
    moves_at_last(&guest);
}

#[test]
fn a_state_that_is_no_state_is_refused_and_the_source_resumes() {
    // The destination makes a machine that does not match the state; only `load` can detect that.
    let guest = TestGuest::started();
    let host = TestHost { vcpus: Some(2), ..TestHost::default() };
    let (source, _) = attempt(&guest, &host, &options(), &()).failed();
    let MigrationFailure::DestinationFailed(reason) = &source.cause else { panic!("{source}") };
    assert!(reason.contains("the state is of another machine"), "{reason}");
    guest.runs_whole();
    let check = guest.machine.check_from_inside(PATIENCE).expect("it answers");
    assert_eq!(check.wrong, 0);
}
