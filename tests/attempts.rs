//! An attempt belongs to the host that began it. Other hosts, trusted for themselves, take no part in it: a
//! GO of theirs starts no guest, and an answer of theirs settles no doubt.

mod common;

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use common::{TestGuest, TestHost};
use sterna::control::{ControlChannel, ControlError};
use sterna::destination::{Arrival, Options, Receiver};
use sterna::guest::{Guest, SourceGuest};
use sterna::saved_state::StateWriter;
use sterna::source::Cancel;
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use sterna::transport::{Source, Transport, TransportProvider};
use sterna::trust::{Peer, Rights, Security, TrustStore};
use sterna::wire::{AttemptId, Final, Hello, LaneOffer, Message, Outcome, Refusal, StateFrame};
use tempfile::TempDir;

const ATTEMPT_ID: AttemptId = AttemptId([7; 16]);
const PATIENCE: Duration = Duration::from_secs(60);

/// Hosts that all trust each other, in folders of their own.
fn hosts<const COUNT: usize>() -> (TempDir, [TrustStore; COUNT]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |number: usize| TrustStore::at(&folder.path().join(number.to_string()));
    let stores: [TrustStore; COUNT] = std::array::from_fn(at);
    for store in &stores {
        for (number, other) in stores.iter().enumerate() {
            let fingerprint = other.host_key().expect("a key is made").fingerprint();
            let peer = Peer { name: format!("host-{number}"), fingerprint, rights: Rights::all() };
            store.add(peer).expect("it can be trusted");
        }
    }
    (folder, stores)
}

fn by_tls(store: &TrustStore) -> Security {
    Security::trusting_everywhere(store.clone())
}

fn connect(to: SocketAddr, security: &Security) -> ControlChannel {
    ControlChannel::connect(&to.to_string(), security).expect("the destination listens")
}

/// The answer to a message on a new connection.
fn say(to: SocketAddr, security: &Security, message: &Message) -> Message {
    let mut control = connect(to, security);
    control.send(message).expect("the destination hears");
    control.receive("an answer", Some(PATIENCE)).expect("the destination answers")
}

/// A source that comes as far as PREPARED. Its lanes stay open, and its channel too.
fn come_as_far_as_prepared(
    guest: &TestGuest,
    mut control: ControlChannel,
) -> (ControlChannel, Box<dyn Transport>) {
    let ram = guest.ram().expect("it has RAM");
    let source = Source { control: &control, ram: &ram, lanes: Some(2), by_name: true };
    let offer = TcpProvider.offer(&source).expect("TCP is always there");
    let hello = Hello {
        attempt_id: ATTEMPT_ID,
        name: guest.name().into(),
        ram: ram.layout(),
        details: guest.details().expect("it can be told"),
        lanes: LaneOffer { scheme: TcpProvider::SCHEME.into(), lanes: 2, body: Vec::new() },
        lock: None,
        state_bytes: 0,
    };
    control.send(&Message::Hello(hello)).expect("the destination hears");
    let ready = control.receive("READY", Some(PATIENCE)).expect("the destination answers");
    let Message::Ready(ready, ..) = ready else { panic!("the destination is not ready: {ready:?}") };
    let mut transport = offer.connect(&ready.body, &control, &ram).expect("the lanes connect");
    guest.pause().expect("it can be paused");
    let mut bytes = Vec::new();
    let mut state = StateWriter::new(&mut bytes);
    guest.save(&mut state).expect("it can be saved");
    state.finish().expect("a buffer takes it");
    let state_bytes = bytes.len() as u64;
    let (lanes, _) = transport.begin_round();
    lanes.iter_mut().for_each(|lane| lane.fence(1).expect("the lane is open"));
    control.send(&Message::RoundClosed(1)).expect("the destination hears");
    control.send(&Message::State(StateFrame { offset: 0, bytes })).expect("the destination hears");
    let last = Final { attempt_id: ATTEMPT_ID, round: 1, compare_blocks: 0, state_bytes };
    control.send(&Message::Final(last)).expect("the destination hears");
    let prepared = control.receive("PREPARED", Some(PATIENCE)).expect("the destination answers");
    assert!(matches!(prepared, Message::Prepared(ATTEMPT_ID, _)), "{prepared:?}");
    (control, transport)
}

#[test]
fn go_and_questions_of_another_host_are_refused_and_the_hosts_own_are_heard() {
    let (_folder, [source, destination, other]) = hosts();
    let state = HostState::lost_with_this_process();
    let bind = || {
        let receiver = Receiver::bind("127.0.0.1:0".parse().expect("an address"), state.clone());
        receiver.expect("a free port").protected_by(by_tls(&destination))
    };
    let refused = Message::Refused(Refusal::OtherHost);
    let [go, ask] = [Message::Go(ATTEMPT_ID), Message::Ask(ATTEMPT_ID)];
    let receiver = bind();
    let to = receiver.local_address().expect("it is bound");
    let (host, guest) = (TestHost::default(), TestGuest::started());
    let arrival: Arrival<_> = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(&host, &Options::default(), &()));
        let (control, transport) = come_as_far_as_prepared(&guest, connect(to, &by_tls(&source)));
        // The source is lost from now on, and the destination holds the guest for it.
        drop((control, transport));
        for message in [&go, &ask, &go] {
            assert_eq!(say(to, &by_tls(&other), message), refused);
            // A connection without TLS comes no further than the greeting.
            let plain = ControlChannel::connect(&to.to_string(), &Security::default());
            assert!(matches!(plain, Err(ControlError::TlsRequired)), "{plain:?}");
        }
        assert_eq!(host.times_resumed(), 0);
        assert!(!receiving.is_finished());
        let mut own = connect(to, &by_tls(&source));
        own.send(&ask).expect("the destination hears");
        let outcome = own.receive("the outcome", Some(PATIENCE)).expect("it answers");
        assert_eq!(outcome, Message::Outcome(ATTEMPT_ID, Outcome::Prepared));
        own.send(&go).expect("the destination hears");
        assert_eq!(own.receive("RUNNING", Some(PATIENCE)).expect("it runs"), Message::Running(ATTEMPT_ID));
        receiving.join().expect("the destination does not panic").expect("the guest arrives")
    });
    assert_eq!(host.times_resumed(), 1);
    drop((receiver, arrival));

    // Another process of the same host answers by the records.
    let receiver = bind();
    let to = receiver.local_address().expect("it is bound");
    let cancel = Cancel::default();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| receiver.accept(&cancel).map(drop));
        assert_eq!(say(to, &by_tls(&other), &ask), refused);
        let mut own = connect(to, &by_tls(&source));
        own.send(&ask).expect("the destination hears");
        let outcome = own.receive("the outcome", Some(PATIENCE)).expect("it answers");
        assert_eq!(outcome, Message::Outcome(ATTEMPT_ID, Outcome::Running));
        own.send(&Message::Done(ATTEMPT_ID)).expect("the destination hears");
        cancel.cancel();
        waiting.join().expect("it does not panic").expect_err("no guest came");
    });
}
