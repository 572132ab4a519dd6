//! A source that keeps writing when it no longer may: after FINAL, while the destination still has all of RAM
//! registered, and while the guest already runs at the destination. On a real device: soft-RoCE in the labs,
//! otherwise an adapter.

mod common;

use std::thread;

use common::{PATIENCE, TestGuest, TestHost, in_a_lab};
use sterna::control::ControlChannel;
use sterna::destination::Receiver;
use sterna::dirty::DirtyBitmap;
use sterna::guest::{Guest, SourceGuest};
use sterna::memory::{GuestRam, PAGE_BYTES, PageRun};
use sterna::saved_state::StateWriter;
use sterna::state::HostState;
use sterna::transport::rdma::{RdmaPath, RdmaProvider};
use sterna::transport::{Lane, Source, Transport, TransportError, TransportProvider};
use sterna::trust::Security;
use sterna::wire::{AttemptId, Final, Hello, LaneOffer, Message, StateFrame};
use sterna_rdma::CompletionStatus;
use vm_memory::{Bytes, GuestAddress};

const ATTEMPT_ID: AttemptId = AttemptId([7; 16]);
const LANES: u8 = 4;

/// Pages of RAM that the built-in guest never touches, one for each lane: any content is from another writer.
const UNTOUCHED: [u64; LANES as usize] = [5 << 20, 9 << 20, 11 << 20, 13 << 20];

/// The lanes that write before GO; the others write once the guest runs.
const EARLY: usize = 2;

const MARK: u64 = 0x6c61_7465_2121_2121;

#[test]
fn a_source_that_writes_on_cannot_change_a_byte_of_the_guest_that_runs_at_the_destination() {
    let Some(address) = RdmaPath::any_address() else {
        assert!(!in_a_lab(), "a lab has an RDMA device");
        println!(
            "skipped: no RDMA device on this machine. With one: `ci/lab uml cargo test --test late_write`"
        );
        return;
    };
    let receiver =
        Receiver::bind((address, 0).into(), HostState::lost_with_this_process()).expect("a free port");
    let receiver = receiver.protected_by(Security::insecure());
    let to = receiver.local_address().expect("a bound socket has an address").to_string();
    let host = TestHost::default();
    let guest = TestGuest::started();
    let (arrival, mut transport, mut written) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receiver.receive(&host, &sterna::destination::Options::default(), &()).expect("the guest arrives")
        });
        let (transport, written) = hand_over(&guest, &to);
        (receiving.join().expect("the destination does not panic"), transport, written)
    });
    arrival.guest.beats_on();
    assert_eq!(host.times_resumed(), 1);

    let ram = guest.ram().expect("it has RAM");
    let (lanes, _) = transport.begin_round();
    written.extend(write_late(&mut lanes[EARLY..], &UNTOUCHED[EARLY..], &ram));
    assert_eq!(written.len(), UNTOUCHED.len());

    let there = arrival.guest.machine.memory();
    for address in UNTOUCHED {
        let after: u64 = there.read_obj(GuestAddress(address)).expect("the address is in RAM");
        assert_eq!(after, 0, "a late write has arrived, {written:?}");
    }
    for result in written {
        let Err(TransportError::Write { error, .. }) = result else {
            panic!("it was not refused: {result:?}")
        };
        // No device answers: the queue pair is gone.
        assert_eq!(error.status, CompletionStatus::RetryExceeded, "{error:?}");
    }
    arrival.guest.runs_whole();
}

/// A migration in one round, as a source does it, except for the writes of the first lanes between PREPARED
/// and GO; returns the lanes once the guest runs at the destination.
fn hand_over(guest: &TestGuest, to: &str) -> (Box<dyn Transport>, Vec<Written>) {
    let ram = guest.ram().expect("it has RAM");
    let mut control = ControlChannel::connect(to, &Security::insecure()).expect("the destination listens");
    let source = Source { control: &control, ram: &ram, lanes: Some(LANES), by_name: true };
    let offer = RdmaProvider::default().offer(&source).expect("there is a device");
    let body = offer.body().expect("it is bounded");
    let hello = Hello {
        attempt_id: ATTEMPT_ID,
        name: guest.name().into(),
        ram: ram.layout(),
        details: guest.details().expect("it can be told"),
        lanes: LaneOffer { scheme: RdmaProvider::SCHEME.into(), lanes: LANES, body },
        lock: None,
        state_bytes: 0,
    };
    control.send(&Message::Hello(hello)).expect("the destination hears");
    let Message::Ready(ready, ..) = hear(&mut control) else { panic!("the destination is not ready") };
    let mut transport = offer.connect(&ready.body, &control, &ram).expect("the lanes connect");

    guest.pause().expect("it can be paused");
    let mut bytes = Vec::new();
    let mut state = StateWriter::new(&mut bytes);
    guest.save(&mut state).expect("it can be saved");
    state.finish().expect("a buffer takes it");
    let state_bytes = bytes.len() as u64;
    send_all(transport.as_mut(), &ram, &mut control);
    control.send(&Message::RoundClosed(1)).expect("the destination hears");
    let registered = pinned_kib();
    // It fits into one frame.
    control.send(&Message::State(StateFrame { offset: 0, bytes })).expect("the destination hears");
    let last = Final { attempt_id: ATTEMPT_ID, round: 1, compare_blocks: 0, state_bytes };
    control.send(&Message::Final(last)).expect("the destination hears");
    assert!(matches!(hear(&mut control), Message::Prepared(ATTEMPT_ID, _)));
    // Both ends are in this process.
    assert_eq!(pinned_kib(), registered, "the destination has its memory registered until the guest runs");
    // All of the source's memory is stale now, and these pages get a content that they never had.
    for address in UNTOUCHED {
        guest.machine.memory().write_obj(MARK, GuestAddress(address)).expect("the address is in RAM");
    }
    let (lanes, _) = transport.begin_round();
    let written = write_late(&mut lanes[..EARLY], &UNTOUCHED[..EARLY], &ram);
    control.send(&Message::Go(ATTEMPT_ID)).expect("the destination hears");
    assert_eq!(hear(&mut control), Message::Running(ATTEMPT_ID));
    control.send(&Message::Done(ATTEMPT_ID)).expect("the destination hears");
    (transport, written)
}

/// Sends all of RAM on the first lane; the others only fence.
fn send_all(transport: &mut dyn Transport, ram: &GuestRam, control: &mut ControlChannel) {
    let mut dirty = DirtyBitmap::new(&ram.layout());
    dirty.fill();
    let (lanes, registration) = transport.begin_round();
    let registration = registration.expect("RDMA has memory registered while it sends");
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let regions = ram.layout().regions;
            let all = (0..).zip(&regions).map(|(region, layout)| PageRun {
                region,
                first_page: 0,
                pages: layout.len_bytes / PAGE_BYTES,
            });
            let sent = all
                .map(|run| lanes[0].write(run))
                .chain([Ok(())])
                .collect::<Result<Vec<_>, _>>()
                .and_then(|_| lanes.iter_mut().try_for_each(|lane| lane.fence(1)));
            registration.end();
            sent
        });
        registration.run(&dirty, control).expect("memory is registered");
        sending.join().expect("sending does not panic").expect("all of it is sent");
    });
}

/// The result of a write.
type Written = Result<(), TransportError>;

/// Writes on each lane all pages that the guest works on, and one that it does not.
fn write_late(lanes: &mut [Box<dyn Lane>], untouched: &[u64], ram: &GuestRam) -> Vec<Written> {
    let write = |lane: &mut dyn Lane, untouched: u64| {
        lane.write(PageRun { region: 0, first_page: untouched / PAGE_BYTES, pages: 1 })?;
        let pages = ram.layout().regions[0].len_bytes / PAGE_BYTES;
        lane.write(PageRun { region: 0, first_page: 0, pages })?;
        // Returns once the device has reported the result of the write.
        lane.fence(2)
    };
    lanes.iter_mut().zip(untouched).map(|(lane, &untouched)| write(lane.as_mut(), untouched)).collect()
}

/// How much memory this process has pinned for devices.
fn pinned_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).expect("a line of pinned memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn hear(control: &mut ControlChannel) -> Message {
    control.receive("the destination's word", Some(PATIENCE)).expect("the destination answers")
}
