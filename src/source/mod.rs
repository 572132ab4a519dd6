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
//! Whatever fails before GO is attempted, the guest runs on here. What fails after leaves it paused and in doubt.

mod beat;
mod converge;
mod error;
mod link;
mod metered;
mod rounds;
mod switch;
mod tuning;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use error::{GuestIs, MigrationError, MigrationFailure};
pub use tuning::Tuning;

pub(crate) use self::beat::BeatAt;
pub(crate) use self::link::{Link, new_epoch, unexpected};
pub(crate) use self::rounds::Brakes;
pub(crate) use self::tuning::Pace;
use crate::convergence::{Course, Downtime, Limits, SwitchCost};
use crate::dirty::{DirtyBitmap, DirtyLog, Stripes};
use crate::guest::Guest;
use crate::handover::{HandoverError, Mark, SourceAction, SourceEvent, SourceHandover, SourceState};
pub(crate) use crate::progress::ms;
use crate::progress::{Event, Observer, Report, RoundReport};
use crate::transport::TransportChoice;
use crate::transport::rdma::RdmaTuning;
use crate::wire::{Hello, Message};

/// How a migration is to be done.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// By which transport.
    pub transport: TransportChoice,
    /// Over how many lanes; `None` chooses by the number of processors.
    pub lanes: Option<u8>,
    /// How RDMA lanes post their writes, and how much memory they may have pinned.
    pub rdma: RdmaTuning,
    /// When to switch, what to do when it does not come to that, and when to give up.
    pub tuning: Tuning,
    /// What a switch is expected to cost where that cannot be measured beforehand.
    pub switch_cost: SwitchCost,
    /// Whether both ends compare all of RAM at the switch. It takes its time while the guest is paused.
    pub compare: bool,
    /// Ends the migration when asked to.
    pub cancel: Cancel,
}

/// A request to end a migration, to be kept by whoever may make it. It is heeded until the guest is given away.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks for the end.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), MigrationFailure> {
        if self.0.load(Ordering::Relaxed) { Err(MigrationFailure::Cancelled) } else { Ok(()) }
    }
}

/// Moves a running guest to the destination that listens at `to` (`HOST:PORT`), and returns once it runs there: the guest
/// here is paused for good then, and its VMM should destroy it.
///
/// # Errors
/// [`MigrationError`], which says where the guest is. Unless that is in doubt, migrating again may succeed.
pub fn migrate(
    guest: &dyn Guest,
    to: &str,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Report, MigrationError> {
    let started = Instant::now();
    let first_beat = BeatAt::now(guest);
    let (link, log) = prepare(guest, to, options).map_err(|cause| MigrationError {
        guest: GuestIs::RunningAtSource,
        refused: !matches!(cause, MigrationFailure::Cancelled),
        cause,
    })?;
    observer.event(&Event::Connected {
        transport: link.transport.kind(),
        via: format!("{} ({})", link.transport.via(), link.reason),
        total_pages: link.ram.layout().total_pages(),
    });
    let mut attempt = Attempt::new(guest, options, observer, (link, log), started);
    attempt.heartbeats_per_second = first_beat.rate_until(BeatAt::now(guest));
    attempt.run().map_err(|cause| attempt.fail(cause))
}

/// Step 1: finds the destination, tells it what would come, and connects the lanes if it is willing.
fn prepare(
    guest: &dyn Guest,
    to: &str,
    options: &Options,
) -> Result<(Link, Box<dyn DirtyLog>), MigrationFailure> {
    let (ram, log) = (guest.ram()?, guest.dirty_log()?);
    let layout = ram.layout();
    let hello = |epoch, lanes| {
        let (name, details) = (guest.name().to_owned(), guest.details()?);
        Ok(Message::Hello(Hello { epoch, name, ram: layout.clone(), details, lanes }))
    };
    Ok((Link::make(ram, to, (options.transport, options.lanes, options.rdma), &options.cancel, hello)?, log))
}

/// One attempt, from the first page on.
struct Attempt<'migration> {
    guest: &'migration dyn Guest,
    options: &'migration Options,
    observer: &'migration dyn Observer,
    link: Link,
    log: Box<dyn DirtyLog>,
    handover: SourceHandover,
    started: Instant,
    paused: bool,
    dirty: DirtyBitmap,
    stripes: Stripes,
    /// What the rounds while the guest ran were like: the ground for every decision.
    course: Course,
    /// The limits that the last decision was made by.
    limits: Limits,
    /// The downtime as it was last predicted.
    predicted: Downtime,
    /// Whether the operator was told that it will not converge.
    warned: bool,
    /// Beats a second before the first round.
    heartbeats_per_second: Option<f64>,
    rounds: Vec<RoundReport>,
    pages_zero: u64,
    /// When a lane had taken the first page.
    first_page: Option<Instant>,
}

impl<'migration> Attempt<'migration> {
    fn new(
        guest: &'migration dyn Guest,
        options: &'migration Options,
        observer: &'migration dyn Observer,
        (link, log): (Link, Box<dyn DirtyLog>),
        started: Instant,
    ) -> Self {
        let layout = link.ram.layout();
        Self {
            guest,
            options,
            observer,
            handover: SourceHandover::new(link.epoch),
            started,
            paused: false,
            dirty: DirtyBitmap::new(&layout),
            stripes: Stripes::new(link.lanes.into()),
            course: Course::new(link.control.round_trip()),
            limits: options.tuning.limits(),
            predicted: Downtime::default(),
            warned: false,
            heartbeats_per_second: None,
            rounds: Vec::new(),
            pages_zero: 0,
            first_page: None,
            link,
            log,
        }
    }

    fn run(&mut self) -> Result<Report, MigrationFailure> {
        self.dirty.fill();
        self.log.start()?;
        let setup = self.started.elapsed();
        self.converge()?;
        let switched = self.switch()?;
        Ok(self.complete(setup, &switched))
    }

    /// Tells the handover what happened; what it wants done must be what comes next here.
    fn advance(&mut self, event: SourceEvent, next: SourceAction) -> Result<(), MigrationFailure> {
        if self.handover.on(event)? == next { Ok(()) } else { Err(HandoverError::OtherAction.into()) }
    }

    /// Writes to the journal. There is none yet: what is recorded lasts as long as this process.
    fn record(&self, mark: Mark) -> SourceEvent {
        SourceEvent::Recorded(mark)
    }

    /// After a failure: lets the guest run here again, if it is this side's to run.
    fn fail(&mut self, cause: MigrationFailure) -> MigrationError {
        // At once: to learn why may take a moment.
        if self.course.throttle_percent() > 0 {
            self.throttle(0);
        }
        let cause = self.explain(cause);
        let refused_there = matches!(cause, MigrationFailure::DestinationFailed(_));
        let event = if refused_there { SourceEvent::Refused(self.link.epoch) } else { SourceEvent::Failed };
        let mut action = self.handover.on(event);
        while let Ok(SourceAction::Record(mark)) = action {
            action = self.handover.on(self.record(mark));
        }
        // Neither can make anything worse, and the cause matters more than they do.
        if let Err(error) = self.log.stop() {
            tracing::warn!("the dirty log stays on: {error}");
        }
        let guest = match action {
            Ok(SourceAction::Resume) if !self.paused => GuestIs::RunningAtSource,
            Ok(SourceAction::Resume) => match self.guest.resume() {
                Ok(()) => GuestIs::RunningAtSource,
                Err(error) => {
                    tracing::error!("the guest could not be resumed: {error}");
                    GuestIs::PausedAtSource
                }
            },
            _ => GuestIs::InDoubt,
        };
        if guest != GuestIs::InDoubt && !refused_there {
            // The destination may be gone, which is what this message is about.
            let _ = self.link.control.send(&Message::Abort(self.link.epoch, cause.to_string()));
        }
        MigrationError { guest, refused: false, cause }
    }

    /// The destination's own reason, where it can have one and that is known to be the cause.
    fn explain(&mut self, cause: MigrationFailure) -> MigrationFailure {
        if self.handover.state() == SourceState::AwaitingRunning {
            return cause;
        }
        self.link.explain(cause)
    }
}

pub(crate) fn mbps(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    if time.is_zero() { 0.0 } else { bytes / 1e6 / time.as_secs_f64() }
}
