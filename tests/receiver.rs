//! A destination as a VMM's author uses it: its own socket or connection, several guests at once,
//! cancellation, and events.

mod common;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Barrier, Mutex};
use std::thread;

use common::{PATIENCE, TestGuest, TestHost, Watch};
use sterna::convergence::Limits;
use sterna::destination::{Options, ReceiveError, Receiver};
use sterna::progress::{Event, Observer, Report};
use sterna::source::{self, Cancel, GuestIs, LimitsHandle, MigrationError, MigrationFailure, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use sterna::wire::Refusal;

fn receiver() -> (Receiver, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    (Receiver::from_listener(listener, HostState::lost_with_this_process()), address)
}

/// Moves a guest over TCP lanes, with as much downtime as a busy machine may need.
fn moves(guest: &TestGuest, name: &str, to: SocketAddr) -> Result<Report, MigrationError> {
    let claim = HostState::lost_with_this_process().start(name, false).expect("the name is free");
    let limits = LimitsHandle::new(Limits { downtime: PATIENCE, ..Limits::default() });
    let options = source::Options {
        transports: TcpProvider.into(),
        lanes: Some(2),
        limits,
        ..source::Options::default()
    };
    migrate(guest, &claim, &to.to_string(), &options, &())
}

#[test]
fn several_guests_arrive_at_once_at_one_socket_each_on_a_thread_of_its_own() {
    let (receiver, to) = receiver();
    let host = TestHost::default();
    let names = ["tern", "gull", "skua"];
    let guests = names.map(|name| TestGuest::started().named(name));
    // No guest passes its first round before all have reached it.
    let all_come = Barrier::new(names.len());
    let watch = Watch(|event: &Event| {
        if matches!(event, Event::RoundClosed { number: 1 }) {
            all_come.wait();
        }
    });
    let cancel = Cancel::default();
    let arrived = thread::scope(|scope| {
        let leaving: Vec<_> = guests
            .iter()
            .zip(names)
            .map(|(guest, name)| scope.spawn(move || moves(guest, name, to)))
            .collect();
        let arriving: Vec<_> = names
            .iter()
            .map(|_| {
                let incoming = receiver.accept(&cancel).expect("a guest comes");
                scope.spawn(|| incoming.receive(&host, &Options::default(), &watch).expect("it arrives"))
            })
            .collect();
        for source in leaving {
            source.join().expect("the source does not panic").expect("the guest moves");
        }
        arriving.into_iter().map(|arriving| arriving.join().expect("no panic").guest).collect::<Vec<_>>()
    });
    assert_eq!(host.times_resumed(), names.len());
    for guest in &arrived {
        guest.runs_whole();
    }
}

#[test]
fn a_guest_that_wants_to_come_may_be_looked_at_and_refused() {
    let (receiver, to) = receiver();
    let guest = TestGuest::started();
    let refused = thread::scope(|scope| {
        let source = scope.spawn(|| moves(&guest, "tern", to));
        let incoming = receiver.accept(&Cancel::default()).expect("a guest comes");
        assert_eq!(incoming.name(), "tern");
        incoming.refuse(Refusal::Incompatible("no room for it".into()));
        source.join().expect("the source does not panic").expect_err("it is refused")
    });
    assert!(refused.refused, "{refused}");
    assert!(matches!(&refused.cause, MigrationFailure::Refused(Refusal::Incompatible(_))), "{refused}");
    guest.runs_whole();
}

#[test]
fn events_come_in_the_order_of_the_steps() {
    let (receiver, to) = receiver();
    let (guest, host) = (TestGuest::started(), TestHost::default());
    let told = Mutex::new(Vec::new());
    let watch = Watch(|event: &Event| {
        let name = match event {
            Event::Incoming { name, ram_bytes, .. } => format!("{name} wants to come: {}", *ram_bytes > 0),
            Event::LanesConnected => "lanes".into(),
            Event::RoundClosed { number } => format!("round {number}"),
            Event::Prepared => "prepared".into(),
            Event::Running => "running".into(),
            other => format!("{other:?}"),
        };
        told.lock().expect("no panic").push(name);
    });
    let report = thread::scope(|scope| {
        let source = scope.spawn(|| moves(&guest, "tern", to));
        receiver.receive(&host, &Options::default(), &watch).expect("it arrives");
        source.join().expect("the source does not panic").expect("the guest moves")
    });
    let mut expected = vec!["tern wants to come: true".to_owned(), "lanes".into()];
    expected.extend((1..=report.rounds.len()).map(|number| format!("round {number}")));
    expected.extend(["prepared".to_owned(), "running".into()]);
    assert_eq!(told.into_inner().expect("no panic"), expected);
}

#[test]
fn a_wait_for_a_guest_ends_when_it_is_cancelled() {
    let (receiver, _) = receiver();
    let options = Options::default();
    let waited = thread::scope(|scope| {
        let waiting = scope.spawn(|| receiver.receive(&TestHost::default(), &options, &()).map(drop));
        assert!(options.cancel.cancel());
        waiting.join().expect("no panic")
    });
    assert!(matches!(waited, Err(ReceiveError::Cancelled)), "{waited:?}");
}

#[test]
fn an_arrival_can_be_cancelled_until_the_guest_is_ready_and_not_after() {
    for (moment, in_time) in [("lanes", true), ("round", true), ("prepared", false)] {
        let (receiver, to) = receiver();
        let (guest, host, options) = (TestGuest::started(), TestHost::default(), Options::default());
        let ended = Mutex::new(None);
        let watch = Watch(|event: &Event| {
            let now = match event {
                Event::LanesConnected => "lanes",
                Event::RoundClosed { number: 1 } => "round",
                Event::Prepared => "prepared",
                _ => return,
            };
            if now == moment {
                *ended.lock().expect("no panic") = Some(options.cancel.cancel());
            }
        });
        let observer: &dyn Observer = &watch;
        let (left, arrived) = thread::scope(|scope| {
            let source = scope.spawn(|| moves(&guest, "tern", to));
            let arrived = receiver.receive(&host, &options, observer);
            (source.join().expect("the source does not panic"), arrived)
        });
        assert_eq!(ended.into_inner().expect("no panic"), Some(in_time), "{moment}");
        if in_time {
            let error = left.expect_err("the destination gave up");
            assert_eq!(error.guest, GuestIs::RunningAtSource, "{moment}: {error}");
            assert!(matches!(arrived, Err(ReceiveError::Cancelled)), "{moment}: {:?}", arrived.map(drop));
            guest.runs_whole();
        } else {
            left.expect("the guest moves");
            arrived.expect("it arrives").guest.runs_whole();
            // The next guest may be cancelled again.
            let waited = thread::scope(|scope| {
                let waiting = scope.spawn(|| receiver.receive(&host, &options, &()).map(drop));
                while !options.cancel.cancel() {
                    thread::yield_now();
                }
                waiting.join().expect("no panic")
            });
            assert!(matches!(waited, Err(ReceiveError::Cancelled)), "{waited:?}");
        }
    }
}

#[test]
fn a_guest_comes_over_a_connection_that_the_vmm_has_accepted_itself() {
    let (receiver, lanes) = receiver();
    let (guest, host) = (TestGuest::started(), TestHost::default());
    // Like a service on the host that hands connections on: its port is not the receiver's, and lanes come to
    // the same port.
    let front = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let to = front.local_addr().expect("it is bound");
    let arrived = thread::scope(|scope| {
        let source = scope.spawn(|| moves(&guest, "tern", to));
        let (stream, _) = front.accept().expect("the source connects");
        scope.spawn(|| hand_on(&front, lanes));
        let arrived = receiver.receive_on(stream, &host, &Options::default(), &()).expect("it arrives");
        source.join().expect("the source does not panic").expect("the guest moves");
        arrived
    });
    arrived.guest.runs_whole();
}

/// Passes two lane connections on to the receiver's socket.
fn hand_on(front: &TcpListener, to: SocketAddr) {
    for _ in 0..2 {
        let (lane, _) = front.accept().expect("a lane connects");
        let on = std::net::TcpStream::connect(to).expect("the receiver listens");
        for (mut from, mut to) in [
            (lane.try_clone().expect("a copy"), on.try_clone().expect("a copy")),
            (on.try_clone().expect("a copy"), lane.try_clone().expect("a copy")),
        ] {
            thread::spawn(move || std::io::copy(&mut from, &mut to));
        }
    }
}
