use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::durable_handover::DurableHandover;
use super::super::lane_ends::LaneEnds;
use super::super::pending::WordOutcome;
use super::*;
use crate::control::{ControlError, Security, answered};
use crate::guest::{Guest, Heartbeat};
use crate::handover::RecordKind;
use crate::memory::GuestRam;
use crate::saved_state::IncomingState;
use crate::state::GuestClaim;
use crate::transport::{LaneReceiver, Leak, Remains, TransportError};
use crate::verify::DestinationDigests;
use crate::wire::{AttemptId, Final, StateFrame};

const ATTEMPT_ID: AttemptId = AttemptId([3; 16]);

/// The events, in order, written by a lane receiver and a guest.
type Journal = Arc<Mutex<Vec<&'static str>>>;

#[derive(Debug)]
struct NotedReceiver {
    journal: Journal,
    lets_go: bool,
    /// When the remains are released: on a signal, or at once if the sender is gone.
    releases: mpsc::Receiver<()>,
}

#[derive(Debug)]
struct NotedRemains {
    journal: Journal,
    releases: mpsc::Receiver<()>,
}

impl Remains for NotedRemains {
    fn release(self: Box<Self>) -> Result<(), Leak> {
        let word = self.releases.recv_timeout(Duration::from_secs(10));
        let waited_for = word == Err(mpsc::RecvTimeoutError::Timeout);
        self.journal.lock().unwrap().push(if waited_for { "release, waited for" } else { "release" });
        Ok(())
    }
}

impl LaneReceiver for NotedReceiver {
    fn ready(&self) -> Result<Vec<u8>, TransportError> {
        Ok(Vec::new())
    }

    fn await_round(&mut self, _round: u32) -> Result<(), TransportError> {
        Ok(())
    }

    fn revoke_time(&self) -> Duration {
        Duration::ZERO
    }

    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError> {
        let Self { journal, lets_go, releases } = *self;
        journal.lock().unwrap().push("revoke");
        if lets_go {
            return Ok(Box::new(NotedRemains { journal, releases }));
        }
        Err(TransportError::Disagreement("the device does not let go".into()))
    }
}

struct NotedGuest(Journal);

fn arriving<'options>(
    guest: NotedGuest,
    lane_receiver: Box<dyn LaneReceiver>,
    handover: DurableHandover,
    options: &'options Options,
) -> Arriving<'options, NotedGuest> {
    Arriving { guest, lanes: LaneEnds::new(lane_receiver), handover, options, observer: &() }
}

fn filling(ram: &GuestRam, last: Final) -> Filling {
    let state = empty_state().complete(last.state_bytes).unwrap();
    Filling { digests: DestinationDigests::new(ram), state, last }
}

/// A state without sections.
fn empty_state() -> IncomingState {
    let mut state = IncomingState::new(1);
    state.push(StateFrame { offset: 0, bytes: vec![0] }).unwrap();
    state
}

impl Guest for NotedGuest {
    fn name(&self) -> &str {
        "tern"
    }

    fn ram(&self) -> Result<GuestRam, GuestError> {
        let memory: GuestMemoryMmap<()> =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).map_err(GuestError::new)?;
        GuestRam::from_vm_memory(&memory).map_err(GuestError::new)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }
}

impl DestinationGuest for NotedGuest {
    fn can_arrive(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn load(&self, _state: &mut StateReader<'_>) -> Result<(), GuestError> {
        self.0.lock().unwrap().push("load");
        Ok(())
    }

    fn start(&self) -> Result<RunOutcome, GuestError> {
        self.0.lock().unwrap().push("run");
        Ok(RunOutcome::Running)
    }

    fn discard(self) -> Result<(), GuestError> {
        self.0.lock().unwrap().push("discard");
        Ok(())
    }
}

/// The switch with a source that answers GO to every message; returns the events, in order, and the result.
fn switch(
    lets_go: bool,
    fails: &[RecordKind],
    releases: mpsc::Receiver<()>,
) -> (Journal, Result<bool, ReceiveError>, Vec<&'static str>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let source = thread::spawn(move || {
        let mut control = ControlChannel::connect(&address, &Security::default()).unwrap();
        let mut heard = Vec::new();
        while let Ok(message) = control.receive("anything", None) {
            heard.push(message.name());
            match message {
                Message::Prepared(..) => control.send(&Message::Go(ATTEMPT_ID)).unwrap(),
                Message::Running(_) => control.send(&Message::Done(ATTEMPT_ID)).unwrap(),
                _ => {}
            }
        }
        heard
    });
    let mut control = answered(listener.accept().unwrap().0, Duration::from_secs(5));
    let journal = Journal::default();
    let guest = NotedGuest(journal.clone());
    let ram = guest.ram().unwrap();
    let lane_receiver = Box::new(NotedReceiver { journal: journal.clone(), lets_go, releases });
    let handover =
        DurableHandover::new(GuestClaim::failing(fails), ("source".into(), None), ATTEMPT_ID).unwrap();
    let options = Options { takeover_timeout: Duration::from_secs(5), ..Options::default() };
    let last = Final { attempt_id: ATTEMPT_ID, round: 1, compare_blocks: 0, state_bytes: 1 };
    let filled =
        Filled { arriving: arriving(guest, lane_receiver, handover, &options), filling: filling(&ram, last) };
    let (_visits, coming) = mpsc::channel();
    let result = filled.switch(&mut control, &coming).map(|running| running.complete(&mut control).settled);
    drop(control);
    (journal, result, source.join().unwrap())
}

/// Releases without a signal.
fn at_once() -> mpsc::Receiver<()> {
    mpsc::channel().1
}

/// A source that was too slow for its first chance, and sends this on its open connection.
fn held_by_a_slow_source(says: &Message) -> (Vec<&'static str>, Result<(), ReceiveError>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let source = thread::spawn(move || ControlChannel::connect(&address, &Security::default()).unwrap());
    let mut control = answered(listener.accept().unwrap().0, Duration::from_secs(5));
    let mut slow = source.join().unwrap();
    let journal = Journal::default();
    let guest = NotedGuest(journal.clone());
    let ram = guest.ram().unwrap();
    let lane_receiver =
        Box::new(NotedReceiver { journal: journal.clone(), lets_go: true, releases: at_once() });
    let handover =
        DurableHandover::new(GuestClaim::failing(&[]), ("source".into(), None), ATTEMPT_ID).unwrap();
    let options = Options { takeover_timeout: Duration::from_secs(3600), ..Options::default() };
    let pending = &options.pending;
    let mut arriving = arriving(guest, lane_receiver, handover, &options);
    for event in [DestinationEvent::Final(ATTEMPT_ID), DestinationEvent::Revoked, DestinationEvent::Loaded] {
        arriving.handover.on(event).unwrap();
    }
    let last = Final { attempt_id: ATTEMPT_ID, round: 1, compare_blocks: 0, state_bytes: 1 };
    let (_visits, coming) = mpsc::channel();
    let result = thread::scope(|scope| {
        let word = scope.spawn(|| {
            while pending.phase().left().is_none() {
                thread::yield_now();
            }
            // The source lives: its connection stands.
            let outcome = pending.source_is_fenced().unwrap();
            slow.send(says).unwrap();
            outcome
        });
        let error = ControlError::Timeout { awaited: "GO", limit: GO_MAX };
        let mut switch = Switch::new(arriving, filling(&ram, last), (&mut control, &coming));
        switch.hold = Some(Hold::new(Instant::now(), error, &options));
        let result = switch.run(DestinationAction::SendPrepared);
        assert_eq!(word.join().unwrap(), WordOutcome::Contradicted);
        result
    });
    let noted = journal.lock().unwrap().clone();
    (noted, result)
}

#[test]
fn a_slow_source_is_still_heard_on_its_first_connection_and_voids_an_operators_word() {
    let (noted, result) = held_by_a_slow_source(&Message::Go(ATTEMPT_ID));
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(noted, ["run"]);
    let (noted, result) = held_by_a_slow_source(&Message::Abort(ATTEMPT_ID, "cancelled".into()));
    assert!(matches!(result, Err(ReceiveError::SourceGaveUp(_))), "{result:?}");
    assert!(noted.is_empty());
}

#[test]
fn remote_access_is_taken_away_before_the_state_is_loaded_and_memory_is_released_beside_the_guest() {
    let (word, releases) = mpsc::channel();
    let (noted, result, heard) = switch(true, &[], releases);
    assert!(matches!(result, Ok(true)), "{result:?}");
    assert_eq!(heard, ["Prepared", "Running"]);
    assert_eq!(*noted.lock().unwrap(), ["revoke", "load", "run"]);
    word.send(()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while noted.lock().unwrap().len() < 4 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(*noted.lock().unwrap(), ["revoke", "load", "run", "release"]);
}

#[test]
fn a_guest_that_a_device_may_still_write_to_is_not_run() {
    let (noted, result, _) = switch(false, &[], at_once());
    assert!(matches!(result, Err(ReceiveError::Transport(_))));
    assert_eq!(*noted.lock().unwrap(), ["revoke", "discard"]);
}

#[test]
fn what_cannot_be_recorded_is_not_said_and_not_run() {
    for (fails, said) in [
        (&[RecordKind::Prepared][..], &["Abort"][..]),
        (&[RecordKind::Running], &["Prepared", "Abort"]),
        // No source may learn that the guest never ran on this host unless the journal says so.
        (&[RecordKind::Running, RecordKind::Refused], &["Prepared"]),
    ] {
        let (noted, result, heard) = switch(true, fails, at_once());
        assert!(matches!(result, Err(ReceiveError::State(_))), "{result:?}");
        let mut noted = noted.lock().unwrap().clone();
        // Memory is released at the same time.
        noted[2..].sort_unstable();
        assert_eq!(noted, ["revoke", "load", "discard", "release"], "{fails:?}");
        assert_eq!(heard, said, "{fails:?}");
    }
}
