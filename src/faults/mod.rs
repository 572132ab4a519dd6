//! Faults of the transport and their consequences: the production code of both ends in one process, a guest
//! that goes on writing, and lanes that fail on demand ([`faulty`](crate::transport::faulty)).
//!
//! In every scene the guest ends up at one host, whole, and a later migration succeeds: whatever part of the
//! dirty log a failed attempt has consumed, no page is forgotten.

mod answers;
mod ends;
mod guest;
mod lanes;
mod naming;
mod panics;
mod plugging;
mod statuses;
mod waiting;

use std::collections::VecDeque;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use self::guest::{TestGuest, TestHost};
use crate::destination::{self, Arrival, ReceiveError, Receiver};
use crate::poison::IgnorePoison;
use crate::progress::{Event, Observer, Report};
use crate::source::{GuestIs, MigrationError, MigrationFailure, Options, migrate};
use crate::state::{GuestClaim, HostState};
use crate::transport::Transports;
use crate::transport::faulty::{FaultyProvider, LaneFaults, ReceiverFaults};
use crate::transport::tcp::TcpProvider;

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// In the first round: all pages are sent.
    FirstRound,
    /// In the third: most pages that were sent are clean again, and all busy pages are dirty.
    LaterRound,
    /// In the last round, in which the guest is paused.
    Paused,
}

impl Moment {
    const ALL: [Self; 3] = [Self::FirstRound, Self::LaterRound, Self::Paused];
}

/// The faults of an attempt.
#[derive(Debug, Default)]
struct Faults {
    lanes: Arc<LaneFaults>,
    lane_receiver: Arc<ReceiverFaults>,
}

impl Faults {
    /// Whether any fault has struck.
    fn have_struck(&self) -> bool {
        self.lanes.struck() > 0 || self.lane_receiver.has_struck()
    }
}

/// A guest that is to migrate, and its destination.
struct Scene {
    guest: TestGuest,
    claim: GuestClaim,
    receiver: Receiver,
    host: TestHost,
    options: Options,
    /// The names of the source's transports. The first is the faulty one.
    schemes: &'static [&'static str],
}

/// The results of an attempt at both ends.
struct Outcome {
    source: Result<Report, MigrationError>,
    destination: Result<Arrival<TestGuest>, ReceiveError>,
}

impl Scene {
    /// Two lanes, by the faulty transport in the place of RDMA, else by TCP.
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let receiver =
            Receiver::bind(SocketAddr::from(([127, 0, 0, 1], 0)), HostState::lost_with_this_process())
                .expect("a free port");
        let claim = HostState::lost_with_this_process().start("tern", false).expect("the name is free");
        let options = Options { lanes: Some(2), ..options };
        let (guest, host) = (TestGuest::started(), TestHost::default());
        Self { guest, claim, receiver, host, options, schemes: &["rdma", "tcp"] }
    }

    /// By one transport alone.
    fn by_name(scheme: &'static [&'static str; 1]) -> Self {
        Self { schemes: scheme, ..Self::new() }
    }

    /// The transports of the source and of the destination, which has them all.
    fn transports(&self, faults: &Faults) -> (Transports, Transports) {
        let faulty = |scheme| FaultyProvider::new(scheme, faults.lanes.clone(), faults.lane_receiver.clone());
        let (first, all) = (faulty(self.schemes[0]), Transports::from(faulty("rdma")).then(TcpProvider));
        (if self.schemes.len() == 1 { first.into() } else { Transports::from(first).then(TcpProvider) }, all)
    }

    /// Migrates with faults that are armed at the moment, and strike before the next round.
    fn attempt_at(&self, moment: Moment, faults: &Faults, arm: impl Fn() + Sync) -> Outcome {
        if moment == Moment::FirstRound {
            arm();
        }
        let armed = AtomicBool::new(moment == Moment::FirstRound);
        self.attempt(faults, |event| {
            if matches!(event, Event::Round { .. }) && armed.load(Ordering::Relaxed) {
                wait_until("a fault strikes", || faults.have_struck());
            }
            let now = match event {
                Event::Round { number: 2, .. } => moment == Moment::LaterRound,
                Event::Paused => moment == Moment::Paused,
                _ => false,
            };
            if now && !armed.swap(true, Ordering::Relaxed) {
                arm();
            }
        })
    }

    /// Migrates, with four rounds while the guest runs. In each the guest writes all its busy pages.
    fn attempt(&self, faults: &Faults, watch: impl Fn(&Event) + Sync) -> Outcome {
        let allow = |downtime| drop(self.options.limits.change(|limits| limits.downtime = downtime));
        // A limit that no switch meets, and that differs after each round: verdicts by one limit do not count
        // for another.
        allow(Duration::ZERO);
        let watch = Watch(|event: &Event| {
            watch(event);
            if let Event::Round { number, .. } = event {
                allow(if *number >= 3 {
                    Duration::from_secs(60)
                } else {
                    Duration::from_nanos((*number).into())
                });
                if !self.guest.is_paused() {
                    self.guest.writes_on();
                }
            }
        });
        self.attempt_by(faults, &self.options, &watch)
    }

    /// Checks the observer's assertions: a panic in an observer alone does not end the migration.
    fn attempt_by(&self, faults: &Faults, options: &Options, observer: &dyn Observer) -> Outcome {
        let failed = Mutex::new(None);
        let watch = Watch(|event: &Event| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| observer.event(event))) {
                *failed.lock().ignore_poison() = Some(panic);
                panic!("the observer failed");
            }
        });
        let outcome = self.attempt_watched(faults, options, &watch);
        match failed.into_inner().ignore_poison() {
            Some(panic) => resume_unwind(panic),
            None => outcome,
        }
    }

    fn attempt_watched(&self, faults: &Faults, options: &Options, observer: &dyn Observer) -> Outcome {
        let to = self.receiver.local_address().expect("it is bound").to_string();
        let (transports, of_destination) = self.transports(faults);
        let options = Options { transports, ..options.clone() };
        thread::scope(|scope| {
            let source = scope.spawn(|| migrate(&self.guest, &self.claim, &to, &options, observer));
            let receiving = destination::Options { transports: of_destination, ..Default::default() };
            let destination = self.receiver.receive(&self.host, &receiving, &());
            Outcome { source: source.join().expect("the source does not panic"), destination }
        })
    }

    /// Asserts that the guest has migrated, with every byte of its memory as it was when it was paused.
    #[track_caller]
    fn moved(&self, outcome: Outcome) -> Report {
        let (report, pages) = self.moved_with(outcome);
        assert_eq!(pages, 0, "pages that are not the source's");
        report
    }

    /// The same, and how many pages have changed.
    #[track_caller]
    fn moved_with(&self, Outcome { source, destination }: Outcome) -> (Report, usize) {
        let arrived = destination.expect("the guest arrives").guest;
        let report = source.expect("the guest moves");
        assert!(self.guest.is_paused(), "it runs there, so not here");
        assert_eq!(self.host.times_resumed(), 1);
        arrived.writes_on();
        (report, arrived.arrived_with().differing_pages(&self.guest.contents()))
    }

    /// Asserts that the guest has migrated over TCP after the RDMA lanes failed for this reason.
    #[track_caller]
    fn fell_back(&self, outcome: Outcome, why: &str) {
        let report = self.moved(outcome);
        assert_eq!(report.transport, "tcp");
        let fell_back = report.fell_back.expect("it fell back");
        assert!(fell_back.contains(why), "{fell_back}");
    }

    /// Asserts that the attempt failed and the guest runs on at the source at full speed; then that it
    /// migrates without the fault. Returns why the attempt failed, at either end.
    #[track_caller]
    fn stayed(&self, Outcome { source, destination }: Outcome) -> (MigrationFailure, ReceiveError) {
        let source = source.expect_err("the source fails");
        let destination = destination.map(|_| ()).expect_err("the destination fails");
        assert_eq!(source.guest, GuestIs::RunningAtSource, "{source}");
        assert_eq!(self.host.times_resumed(), 0, "{source}");
        assert!(!self.guest.is_paused(), "{source}");
        assert_eq!(self.guest.throttle_percent(), 0, "{source}");
        assert_eq!(self.guest.seen.write_limit(), None, "{source}");
        self.guest.writes_on();

        let report = self.moved(self.attempt(&Faults::default(), |_| {}));
        assert_eq!(report.fell_back, None);
        (source.cause, destination)
    }
}

/// Calls the function with each event.
struct Watch<F>(F);

impl<F: Fn(&Event) + Sync> Observer for Watch<F> {
    fn event(&self, event: &Event) {
        (self.0)(event);
    }
}

/// Plays a scene for each case, many at once: a source that failed waits for a second for the destination's
/// reason.
#[track_caller]
fn each<T: Debug + Send>(cases: impl IntoIterator<Item = T>, play: impl Fn(&T) + Sync) {
    // Few enough that each finishes in time.
    const AT_ONCE_BY_PROCESSOR: usize = 6;
    let at_once = AT_ONCE_BY_PROCESSOR * thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let cases = Mutex::new(cases.into_iter().collect::<VecDeque<_>>());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let next = cases.lock().ignore_poison().pop_front();
                    let Some(case) = next else { return };
                    if catch_unwind(AssertUnwindSafe(|| play(&case))).is_err() {
                        failed.lock().ignore_poison().push(case);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().ignore_poison();
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

/// Waits until a condition holds; `what` names it if it never does.
#[track_caller]
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "in {} s it did not come to this: {what}", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(1));
    }
}

/// How long anything may take before a test counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// All pairs.
fn pairs<A: Clone, B: Clone>(some: &[A], others: &[B]) -> Vec<(A, B)> {
    some.iter().flat_map(|a| others.iter().map(move |b| (a.clone(), b.clone()))).collect()
}
