//! The source's side of a migration, in five steps.
//!
//! | step | here | the destination |
//! |---|---|---|
//! | 1 prepare | connect, describe the guest, connect the lanes | reserve all RAM, or refuse |
//! | 2 bulk | send every touched page while the guest runs | nothing, under RDMA |
//! | 3 rounds | send what was written meanwhile, again and again | the same |
//! | 4 switch | pause, send the rest and the state, GO | revoke, compare, load, run |
//! | 5 complete | release the guest | show that it lives |
//!
//! Whatever fails before GO is attempted, the guest runs on here. What fails after leaves it paused and in doubt, and the
//! destination is asked what became of it: for a while here, then by whoever holds the [`Doubt`].

mod blackout;
mod converge;
mod durable_handover;
mod error;
mod fallback;
mod limits_handle;
mod saving;
mod switch;
mod verify_source;

use std::time::{Duration, Instant};

#[doc(hidden)]
pub use blackout::Blackout;
pub use durable_handover::{Doubt, OpenError, StillInDoubt, Verdict};
pub use error::{GuestIs, MigrationError, MigrationFailure, StateLimit};
pub use limits_handle::LimitsHandle;

use self::durable_handover::{DurableHandover, Peer, open_records};
use self::switch::Switched;
use crate::convergence::{Downtime, History, Limits, SwitchCost};
use crate::dirty::{DirtyBitmap, DirtyLog, Stripes};
use crate::guest::{RunOutcome, SourceGuest};
use crate::handover::{HandoverError, SourceAction, SourceEvent, SourceState};
use crate::lock::Lock;
use crate::memory::RamLayout;
use crate::panics::{Panicked, caught, caught_or};
use crate::progress::{Event, Observer, Report, RoundReport};
use crate::saved_state::StateSender;
pub use crate::session::Cancel;
use crate::session::{HeartbeatAt, Link, Sheltered};
use crate::state::{GuestClaim, RecordWriter};
use crate::transport::TransportChoice;
use crate::transport::rdma::RdmaTuning;
use crate::verify::{SourceDigests, Verify};
use crate::wire::{AttemptId, Hello, LaneOffer, LockToken, Message};

/// How a migration is to be done.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// By which transport.
    pub transport: TransportChoice,
    /// Over how many lanes, at most 64; `None`: 4 for RDMA, as many as processors and at most 4 for TCP.
    pub lanes: Option<u8>,
    /// How RDMA lanes post their writes, and how much memory they may have pinned.
    pub rdma: RdmaTuning,
    /// When to switch, what to do when it does not come to that, and when to give up.
    pub limits: LimitsHandle,
    /// What a switch is expected to cost where that cannot be measured beforehand.
    pub switch_cost: SwitchCost,
    /// The longest state of vCPUs and devices that is sent, in bytes; `None`: 1 GiB. The destination has a limit of its own.
    pub state_max_bytes: Option<u64>,
    /// How much of RAM both ends compare. What it adds to the downtime is in the report.
    pub verify: Verify,
    /// What arbitrates between the two hosts. It must be held already, and the destination must have it too. After the migration the
    /// guest runs here exactly if it is held here.
    pub lock: Option<Lock>,
    /// Ends the migration when asked to.
    pub cancel: Cancel,
}

/// Moves a running guest to the destination that listens at `to` (`HOST:PORT`), and returns once it runs there: the guest
/// here is paused for good then, and its VMM should destroy it.
///
/// `claim` is that of the guest's name on this host, which its VMM has had since before the guest started:
/// [`HostState::start`](crate::state::HostState::start) gives one for a new guest, an [`Arrival`](crate::destination::Arrival)
/// brings one. It is recorded there that the guest is given away, before it is.
///
/// It does not panic: a panic in it, in the VMM's code or in the lanes is a [failure](MigrationFailure::Panicked) like any other. An
/// observer that panics gets no more events, and the migration goes on.
///
/// # Errors
/// [`MigrationError`], which says where the guest is. Unless that is in doubt, migrating again may succeed.
pub fn migrate(
    guest: &dyn SourceGuest,
    claim: &GuestClaim,
    to: &str,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Report, MigrationError> {
    let started = Instant::now();
    let observer = &Sheltered::new(observer);
    let first_beat = HeartbeatAt::now(guest);
    let (link, log, records) = caught_or(|| prepare(guest, claim, to, options)).map_err(|cause| {
        let cause = cause.explained(|cause| options.cancel.explain(cause));
        let refused = !matches!(cause, MigrationFailure::Cancelled);
        MigrationError { guest: GuestIs::RunningAtSource, refused, cause, doubt: None }
    })?;
    if let Some(why) = link.fell_back.clone() {
        observer.event(&Event::FellBack { why });
    }
    observer.event(&link.connected());
    let peer = Peer { name: to.to_owned(), address: Some(link.control.peer_address()) };
    let handover = DurableHandover::new(records, peer, link.attempt_id, options.lock.clone());
    let mut attempt = Attempt::new(guest, options, observer, (link, log, handover), started);
    attempt.heartbeats_per_second = first_beat.rate_until(HeartbeatAt::now(guest));
    // A defect of ours or of the VMM's must not leave a guest slowed or paused that is this side's.
    match caught_or(|| attempt.run()) {
        Ok((setup, switched)) => Ok(attempt.complete(setup, &switched)),
        Err(cause) => Err(attempt.fail(cause)),
    }
}

/// Step 1: finds the destination, tells it what would come, and connects the lanes if it is willing.
fn prepare(
    guest: &dyn SourceGuest,
    claim: &GuestClaim,
    to: &str,
    options: &Options,
) -> Result<(Link, Box<dyn DirtyLog>, RecordWriter), MigrationFailure> {
    let records = open_records(claim)?;
    let (ram, log) = (guest.ram()?, guest.dirty_log()?);
    let lock = options.lock.as_ref().map(Lock::token).transpose()?;
    let hello = hello(guest, ram.layout(), lock, options.switch_cost.state_bytes)?;
    let mut link =
        Link::make(ram, to, (options.transport, options.lanes, options.rdma), &options.cancel, hello)?;
    saving::check_expected(&mut link, options)?;
    Ok((link, log, records))
}

/// What tells a destination which guest would come.
fn hello(
    guest: &dyn SourceGuest,
    layout: RamLayout,
    lock: Option<LockToken>,
    state_bytes: u64,
) -> Result<impl Fn(AttemptId, LaneOffer) -> Message, MigrationFailure> {
    let (name, details) = (guest.name().to_owned(), guest.details()?);
    Ok(move |attempt_id, lanes| {
        let (name, ram, details) = (name.clone(), layout.clone(), details.clone());
        Message::Hello(Hello { attempt_id, name, ram, details, lanes, lock, state_bytes })
    })
}

/// One attempt, from the first page on.
struct Attempt<'migration> {
    guest: &'migration dyn SourceGuest,
    options: &'migration Options,
    observer: &'migration dyn Observer,
    link: Link,
    log: Box<dyn DirtyLog>,
    handover: DurableHandover,
    started: Instant,
    paused: bool,
    dirty: DirtyBitmap,
    stripes: Stripes,
    /// What the rounds while the guest ran were like: the ground for every decision.
    history: History,
    /// The limits that the last decision was made by.
    limits: Limits,
    /// The downtime as it was last predicted.
    predicted: Downtime,
    /// Which blocks of RAM the destination has digests of.
    source_digests: SourceDigests,
    /// Whether more of them are to be hashed before the next round.
    hash_next: bool,
    /// Whether the operator was told that it will not converge.
    warned: bool,
    /// Whether they were told that no switch keeps the limit.
    warned_of_limit: bool,
    /// Beats a second before the first round.
    heartbeats_per_second: Option<f64>,
    rounds: Vec<RoundReport>,
    /// What takes the saved state, once it is made.
    saving: Option<StateSender>,
    pages_zero: u64,
    /// When a lane had taken the first page.
    first_page: Option<Instant>,
}

impl<'migration> Attempt<'migration> {
    fn new(
        guest: &'migration dyn SourceGuest,
        options: &'migration Options,
        observer: &'migration dyn Observer,
        (link, log, handover): (Link, Box<dyn DirtyLog>, DurableHandover),
        started: Instant,
    ) -> Self {
        let layout = link.ram.layout();
        Self {
            guest,
            options,
            observer,
            handover,
            started,
            paused: false,
            dirty: DirtyBitmap::new(&layout),
            stripes: Stripes::new(link.lanes.into()),
            history: History::new(link.control.round_trip()),
            limits: options.limits.limits(),
            predicted: Downtime::default(),
            source_digests: SourceDigests::new(&layout, options.verify),
            hash_next: false,
            warned: false,
            warned_of_limit: false,
            heartbeats_per_second: None,
            rounds: Vec::new(),
            saving: None,
            pages_zero: 0,
            first_page: None,
            link,
            log,
        }
    }

    /// Steps 2 to 4; how long setting up took, and what the switch did.
    fn run(&mut self) -> Result<(Duration, Switched), MigrationFailure> {
        self.dirty.fill();
        self.log.start()?;
        // All pages are dirty as it is; but now it is known what a harvest takes.
        let harvesting = Instant::now();
        self.dirty.by(&self.link.pool, |dirty| dirty.harvest(&*self.log))?;
        self.history.harvested(harvesting.elapsed());
        let setup = self.started.elapsed();
        self.converge_over_any_lanes()?;
        Ok((setup, self.switch()?))
    }

    /// The destination has made the guest with the RAM that it had at the beginning, and the dirty log knows of no other.
    fn check_ram(&self) -> Result<(), MigrationFailure> {
        match self.link.ram.change_to(&self.guest.ram()?) {
            None => Ok(()),
            Some(change) => Err(MigrationFailure::RamChanged(change)),
        }
    }

    /// Tells the handover what happened; what it wants done must be what comes next here.
    fn advance(&mut self, event: SourceEvent, next: SourceAction) -> Result<(), MigrationFailure> {
        if self.handover.on(event)? == next { Ok(()) } else { Err(HandoverError::OtherAction.into()) }
    }

    /// After a failure: lets the guest run here again, if it is this side's to run.
    fn fail(mut self, cause: MigrationFailure) -> MigrationError {
        let cause = cause.explained(|cause| self.options.cancel.explain(cause));
        // Before anything else: to learn why may take a moment.
        if self.history.throttle_percent() > 0 {
            self.throttle(0);
        }
        let event = event_of(&cause, self.link.attempt_id);
        let action = caught(|| match self.handover.state() {
            SourceState::Kept => Ok(SourceAction::Resume),
            _ => self.handover.on(event),
        });
        let (guest, cause) = match action {
            Ok(Ok(SourceAction::Resume)) => match self.handover.take_lock() {
                Ok(()) => (self.resume(), cause),
                Err(error) => {
                    (GuestIs::InDoubt, MigrationFailure::LockLost { cause: cause.to_string(), error })
                }
            },
            // One that was never paused has not been given away, whatever failed in saying so.
            Ok(Err(_)) | Err(_) if !self.paused => (GuestIs::RunningAtSource, cause),
            _ => (GuestIs::InDoubt, cause),
        };
        // It cannot make anything worse, and the cause matters more than it does.
        match caught(|| self.log.stop()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the dirty log stays on: {error}"),
            Err(Panicked(text)) => tracing::error!("the dirty log panicked when it was stopped: {text}"),
        }
        let Self { handover, mut link, log, options, .. } = self;
        let (cause, doubt) = if guest == GuestIs::InDoubt {
            (cause, Some(Box::new(handover.into_doubt())))
        } else {
            options.cancel.reopen();
            let explained = caught(|| {
                let cause = cause.explained(|cause| link.explain(cause));
                if !matches!(cause, MigrationFailure::DestinationFailed(_)) {
                    // The destination may be gone, which is what this message is about.
                    let _ = link.control.send(&Message::Abort(link.attempt_id, cause.to_string()));
                }
                cause
            });
            (explained.unwrap_or_else(MigrationFailure::from), None)
        };
        let_go((link, log));
        MigrationError { guest, refused: false, cause, doubt }
    }

    fn resume(&self) -> GuestIs {
        if !self.paused {
            return GuestIs::RunningAtSource;
        }
        let why = match caught(|| self.guest.resume()) {
            Ok(Ok(RunOutcome::Running)) => return GuestIs::RunningAtSource,
            Ok(Ok(RunOutcome::Unknown { reason })) => {
                tracing::error!("the VMM does not say whether the guest runs on: {reason}");
                return GuestIs::UnknownAtSource;
            }
            Ok(Err(error)) => error.to_string(),
            Err(Panicked(text)) => format!("the VMM panicked: {text}"),
        };
        tracing::error!("the guest could not be resumed: {why}");
        GuestIs::PausedAtSource
    }
}

/// Ends the connection and the VMM's log. What becomes of the guest is settled by then, so a panic changes nothing.
fn let_go(ends: (Link, Box<dyn DirtyLog>)) {
    if let Err(Panicked(text)) = caught(|| drop(ends)) {
        tracing::error!("the end of a migration panicked: {text}");
    }
}

/// What a failure means for the handover.
fn event_of(cause: &MigrationFailure, attempt_id: AttemptId) -> SourceEvent {
    match cause {
        MigrationFailure::DestinationFailed(_) => SourceEvent::Refused(attempt_id),
        _ => SourceEvent::Failed,
    }
}
