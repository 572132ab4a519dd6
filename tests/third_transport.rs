//! A transport that the library does not know: it copies pages from RAM to RAM within this process. This file
//! is all that a new transport needs.

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use common::{PATIENCE, TestGuest, TestHost, Watch};
use sterna::control::ControlChannel;
use sterna::destination::{Arrival, ReceiveError, Receiver};
use sterna::dirty::DirtyBitmap;
use sterna::memory::{GuestRam, PAGE_BYTES, PageRun};
use sterna::progress::{Event, Report};
use sterna::source::{MigrationError, MigrationFailure, Options, migrate};
use sterna::state::HostState;
use sterna::transport::tcp::TcpProvider;
use sterna::transport::{
    Destination, Lane, LaneReceiver, Registration, Remains, Source, SourceOffer, Transport, TransportError,
    TransportProvider, Transports, await_answer, send_request,
};
use sterna::verify::Verify;
use sterna::wire::{LaneOffer, Refusal};
use vm_memory::{Bytes, GuestAddress};

const COPY: &str = "copy";

/// A page of RAM that the built-in guest never touches.
const UNTOUCHED: u64 = 9 << 20;

#[test]
fn a_guest_moves_by_a_transport_that_is_written_in_a_test() {
    let (guest, copy) = (TestGuest::started(), CopyProvider::default());
    let begun_at_first = Mutex::new(None);
    let (source, arrival) = attempt(&guest, copy.clone().into(), copy.clone().into(), &|event| {
        if let Event::Connected { .. } = event {
            *begun_at_first.lock().expect("no thread panics") =
                Some(copy.rounds_begun.load(Ordering::SeqCst));
        }
    });
    // A transport may send less in its first round, so the engine must not begin one to no purpose.
    assert_eq!(*begun_at_first.lock().expect("no thread panics"), Some(0));
    let (report, arrived) = (source.expect("the guest moves"), arrival.expect("the guest arrives").guest);
    assert_eq!((report.transport.as_str(), report.fell_back), (COPY, None));
    assert_eq!(report.verified_pages, (16 << 20) / PAGE_BYTES);
    arrived.runs_whole();

    // After revocation a late write changes nothing.
    guest.machine.memory().write_obj(1u8, GuestAddress(UNTOUCHED)).expect("the address is in RAM");
    let page = PageRun { region: 0, first_page: UNTOUCHED / PAGE_BYTES, pages: 1 };
    let mut lanes = copy.made();
    assert_eq!(lanes.len(), 3);
    for lane in lanes.iter_mut() {
        let refused = lane.write(page).expect_err("the guest runs at the destination");
        assert!(refused.to_string().contains("revoked"), "{refused}");
    }
    let there: u8 =
        arrived.machine.memory().read_obj(GuestAddress(UNTOUCHED)).expect("the address is in RAM");
    assert_eq!(there, 0, "a late write has arrived");
}

#[test]
fn a_destination_without_it_says_so_and_the_source_takes_the_next_in_its_list() {
    let (guest, copy) = (TestGuest::started(), CopyProvider::default());
    let via = Mutex::new(String::new());
    let note = |event: &Event| {
        if let Event::Connected { via: by, .. } = event {
            by.clone_into(&mut via.lock().expect("it is only set"));
        }
    };
    let list = Transports::from(copy).then(TcpProvider);
    let (source, arrival) = attempt(&guest, list, Transports::default(), &note);
    let report = source.expect("the guest moves");
    assert_eq!((report.transport.as_str(), report.fell_back), ("tcp", None));
    let via = via.into_inner().expect("it is only set");
    assert!(via.contains("there is no transport named copy here, but rdma, tcp"), "{via}");
    arrival.expect("the guest arrives").guest.runs_whole();
}

#[test]
fn a_choice_by_name_that_the_destination_has_not_is_refused_by_name() {
    let (guest, copy) = (TestGuest::started(), CopyProvider::default());
    let (source, arrival) = attempt(&guest, copy.into(), TcpProvider.into(), &|_| {});
    let error = source.expect_err("the destination cannot receive it");
    assert!(error.refused, "{error}");
    assert!(matches!(error.cause, MigrationFailure::Refused(Refusal::Transport(_))), "{error:?}");
    assert!(error.to_string().contains("copy"), "{error}");
    assert!(arrival.is_err());
    guest.beats_on();
}

#[test]
fn lanes_that_fail_while_the_guest_runs_make_way_for_the_next_in_the_list() {
    let guest = TestGuest::started();
    let copy = CopyProvider { fails: true, ..CopyProvider::default() };
    let seen = Mutex::new(Vec::new());
    let note = |event: &Event| {
        if let Event::FellBack { from, to, .. } = event {
            seen.lock().expect("it is only set").push((from.clone(), to.clone()));
        }
    };
    let list = Transports::from(copy).then(TcpProvider);
    let (source, arrival) = attempt(&guest, list.clone(), list, &note);
    let report = source.expect("the guest moves");
    assert_eq!(report.transport, "tcp");
    assert!(report.fell_back.is_some_and(|why| why.contains("the copier broke")));
    assert_eq!(seen.into_inner().expect("it is only set"), [(COPY.to_owned(), "tcp".to_owned())]);
    arrival.expect("the guest arrives").guest.runs_whole();
}

/// Moves a guest from one thread of this process to another, with these transports at the two ends.
fn attempt(
    guest: &TestGuest,
    source: Transports,
    destination: Transports,
    watch: &(dyn Fn(&Event) + Sync),
) -> (Result<Report, MigrationError>, Result<Arrival<TestGuest>, ReceiveError>) {
    let receiver = Receiver::bind(SocketAddr::from(([127, 0, 0, 1], 0)), HostState::lost_with_this_process())
        .expect("a free port");
    let claim = HostState::lost_with_this_process().start("tern", false).expect("the name is free");
    let to = receiver.local_address().expect("it is bound").to_string();
    let options = Options { transports: source, lanes: Some(3), verify: Verify::Full, ..Options::default() };
    thread::scope(|scope| {
        let receiving = sterna::destination::Options {
            transports: destination,
            ..sterna::destination::Options::default()
        };
        let arriving = scope.spawn(move || receiver.receive(&TestHost::default(), &receiving, &()));
        let moved = migrate(guest, &claim, &to, &options, &Watch(watch));
        (moved, arriving.join().expect("the destination does not panic"))
    })
}

/// Copies pages within a process.
#[derive(Clone, Debug, Default)]
struct CopyProvider {
    /// Whether the lanes break in the first round.
    fails: bool,
    /// Copies of the lanes that were made, for late writes.
    made: Arc<Mutex<Vec<CopyLane>>>,
    rounds_begun: Arc<AtomicU64>,
}

impl CopyProvider {
    fn made(&self) -> MutexGuard<'_, Vec<CopyLane>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransportProvider for CopyProvider {
    fn scheme(&self) -> &str {
        COPY
    }

    fn offer(&self, source: &Source<'_>) -> Result<Box<dyn SourceOffer>, TransportError> {
        Ok(Box::new(CopyOffer { provider: self.clone(), lanes: source.lanes.unwrap_or(1) }))
    }

    fn receive(
        &self,
        offer: &LaneOffer,
        destination: &Destination<'_>,
    ) -> Result<Box<dyn LaneReceiver>, TransportError> {
        static TOKENS: AtomicU64 = AtomicU64::new(1);
        assert_eq!(offer.body, b"by copying");
        let token = TOKENS.fetch_add(1, Ordering::Relaxed);
        let window = Arc::new(Window {
            state: Mutex::new(Access {
                ram: Some(destination.ram.clone()),
                opened: false,
                over: false,
                fenced: vec![None; offer.lanes.into()],
            }),
            changed: Condvar::new(),
        });
        windows().insert(token, window.clone());
        Ok(Box::new(CopyReceiver { token, window }))
    }
}

/// The receivers of this process, by the token in READY.
fn windows() -> MutexGuard<'static, BTreeMap<u64, Arc<Window>>> {
    static WINDOWS: Mutex<BTreeMap<u64, Arc<Window>>> = Mutex::new(BTreeMap::new());
    WINDOWS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A source's access to RAM.
#[derive(Debug)]
struct Window {
    state: Mutex<Access>,
    changed: Condvar,
}

#[derive(Debug)]
struct Access {
    /// The RAM that may be written to; `None` after revocation.
    ram: Option<GuestRam>,
    /// Whether the source has asked to write.
    opened: bool,
    /// The lanes need not wait any longer.
    over: bool,
    /// The last round that each lane has fenced.
    fenced: Vec<Option<u32>>,
}

impl Window {
    fn change(&self, change: impl FnOnce(&mut Access)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn when(&self, holds: impl Fn(&Access) -> bool) -> Result<MutexGuard<'_, Access>, TransportError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |access| !holds(access));
        let (access, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() { Err(broke("nothing came", false)) } else { Ok(access) }
    }
}

fn broke(why: &str, may_fall_back: bool) -> TransportError {
    TransportError::Provider { scheme: COPY.into(), may_fall_back, error: why.into() }
}

#[derive(Debug)]
struct CopyOffer {
    provider: CopyProvider,
    lanes: u8,
}

impl SourceOffer for CopyOffer {
    fn lanes(&self) -> u8 {
        self.lanes
    }

    fn body(&self) -> Result<Vec<u8>, TransportError> {
        Ok(b"by copying".to_vec())
    }

    fn connect(
        self: Box<Self>,
        ready: &[u8],
        _control: &ControlChannel,
        ram: &GuestRam,
    ) -> Result<Box<dyn Transport>, TransportError> {
        let token = ready.try_into().map(u64::from_le_bytes);
        let token = token.map_err(|_| TransportError::Disagreement("no token".into()))?;
        let window = windows().get(&token).cloned().ok_or_else(|| broke("another process", true))?;
        let lane =
            |index| CopyLane { index, ram: ram.clone(), window: window.clone(), fails: self.provider.fails };
        self.provider.made().extend((0..self.lanes.into()).map(lane));
        let lanes = (0..self.lanes.into()).map(|index| Box::new(lane(index)) as Box<dyn Lane>).collect();
        let rounds_begun = self.provider.rounds_begun.clone();
        Ok(Box::new(CopyTransport { lanes, opening: Opening(window.clone()), rounds_begun }))
    }
}

#[derive(Debug)]
struct CopyTransport {
    lanes: Vec<Box<dyn Lane>>,
    opening: Opening,
    rounds_begun: Arc<AtomicU64>,
}

impl Transport for CopyTransport {
    fn count(&self) -> usize {
        self.lanes.len()
    }

    fn via(&self) -> String {
        format!("{} copying lanes", self.lanes.len())
    }

    fn begin_round(&mut self) -> (&mut [Box<dyn Lane>], Option<&dyn Registration>) {
        self.rounds_begun.fetch_add(1, Ordering::SeqCst);
        (&mut self.lanes, Some(&self.opening))
    }
}

/// Asks the destination, beside the lanes of each round, to open its window: the lanes wait for that.
#[derive(Debug)]
struct Opening(Arc<Window>);

impl Registration for Opening {
    fn run(&self, _dirty: &DirtyBitmap, control: &mut ControlChannel) -> Result<(), TransportError> {
        let opened = send_request(b"open".to_vec(), control)
            .and_then(|()| await_answer("the window's state", PATIENCE, control))
            .map(|body| assert_eq!(body, b"opened"));
        opened.inspect_err(|_| self.0.change(|access| access.over = true))
    }

    fn end(&self) {}
}

#[derive(Debug)]
struct CopyLane {
    index: usize,
    ram: GuestRam,
    window: Arc<Window>,
    fails: bool,
}

impl Lane for CopyLane {
    fn write(&mut self, run: PageRun) -> Result<(), TransportError> {
        let access = self.window.when(|access| access.opened || access.over)?;
        let there = access.ram.as_ref().ok_or_else(|| broke("access was revoked", false))?;
        let mut bytes = Vec::new();
        for (from, to) in self.ram.slice(run)?.pages().zip(there.slice(run)?.pages()) {
            bytes.resize(from.len(), 0);
            from.copy_to(&mut bytes);
            to.copy_from(&bytes);
        }
        Ok(())
    }

    fn fence(&mut self, round: u32) -> Result<(), TransportError> {
        if self.fails && round == 1 {
            return Err(broke("the copier broke", true));
        }
        self.window.change(|access| access.fenced[self.index] = Some(round));
        Ok(())
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

#[derive(Debug)]
struct CopyReceiver {
    token: u64,
    window: Arc<Window>,
}

impl LaneReceiver for CopyReceiver {
    fn ready(&self) -> Result<Vec<u8>, TransportError> {
        Ok(self.token.to_le_bytes().to_vec())
    }

    fn handle(&mut self, request: &[u8]) -> Result<Option<Vec<u8>>, TransportError> {
        match request {
            b"open" => {
                self.window.change(|access| access.opened = true);
                Ok(Some(b"opened".to_vec()))
            }
            _ => Err(TransportError::Disagreement("not a request to copying lanes".into())),
        }
    }

    fn await_round(&mut self, round: u32) -> Result<(), TransportError> {
        self.window.when(|access| access.fenced.iter().all(|&fenced| fenced >= Some(round))).map(drop)
    }

    fn revoke_time(&self) -> Duration {
        Duration::ZERO
    }

    fn revoke(self: Box<Self>) -> Result<Box<dyn Remains>, TransportError> {
        drop(self);
        Ok(Box::new(()))
    }
}

impl Drop for CopyReceiver {
    /// A copying lane holds the lock of the state, so this waits for it.
    fn drop(&mut self) {
        windows().remove(&self.token);
        self.window.change(|access| access.ram = None);
    }
}
