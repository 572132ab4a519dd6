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

mod error;
mod link;
mod rounds;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use error::{GuestIs, MigrationError, MigrationFailure};

pub(crate) use self::link::{Link, new_epoch, unexpected};
use crate::control::STEP_MAX;
use crate::convergence::{self, Decision, Limits, Round};
use crate::digest;
use crate::dirty::{DirtyBitmap, DirtyLog, Stripes};
use crate::guest::Guest;
use crate::handover::{HandoverError, SourceAction, SourceEvent, SourceHandover, SourceState};
use crate::memory::PAGE_BYTES;
use crate::progress::{Event, Observer, Report, RoundReport};
use crate::transport::TransportChoice;
use crate::wire::{Completion, DIGESTS_MAX, Final, Hello, Message};

/// How a migration is to be done.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// By which transport.
    pub transport: TransportChoice,
    /// Over how many lanes; `None` chooses by the number of processors.
    pub lanes: Option<u8>,
    /// When to switch, and when to give up.
    pub limits: Limits,
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
    Ok((Link::make(ram, to, (options.transport, options.lanes), &options.cancel, hello)?, log))
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
    throttle_percent: u8,
    dirty: DirtyBitmap,
    stripes: Stripes,
    /// What the rounds while the guest ran were like: the ground for every decision.
    history: Vec<Round>,
    rounds: Vec<RoundReport>,
    pages_zero: u64,
}

/// What the switch took.
struct Switched {
    downtime: Duration,
    compare: Duration,
    completion: Completion,
    /// When the guest last beat here, counted back from the moment GO left.
    last_beat_before_go: Option<(u64, Duration)>,
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
            throttle_percent: 0,
            dirty: DirtyBitmap::new(&layout),
            stripes: Stripes::new(&layout, link.lanes.into()),
            history: Vec::new(),
            rounds: Vec::new(),
            pages_zero: 0,
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

    /// Steps 2 and 3: sends what is dirty until the rest fits the downtime, all of RAM to begin with.
    fn converge(&mut self) -> Result<(), MigrationFailure> {
        loop {
            let began = Instant::now();
            let sent_bytes = self.send_round()?;
            let duration = began.elapsed();
            self.dirty.clear();
            self.harvest()?;
            let dirty_pages = self.dirty.count();
            self.history.push(Round { sent_bytes, duration, dirty_pages });
            self.tell_round(began.elapsed());
            match convergence::decide(&self.options.limits, &self.history, self.throttle_percent) {
                Decision::Switch => return Ok(()),
                Decision::AnotherRound => {}
                Decision::Throttle(percent) => self.throttle(percent),
                Decision::GiveUp => return Err(self.not_converging()),
            }
        }
    }

    /// Step 4: nobody runs the guest from here until the destination does, or until this side takes it back.
    fn switch(&mut self) -> Result<Switched, MigrationFailure> {
        self.advance(SourceEvent::Pausing, SourceAction::Continue)?;
        let paused_at = Instant::now();
        self.guest.pause()?;
        self.paused = true;
        self.observer.event(&Event::Paused);
        // Saving may write to guest RAM, so the last harvest comes after it; what is dirty already stays so.
        let state = self.guest.save()?;
        self.harvest()?;
        self.send_round()?;
        self.tell_round(Duration::ZERO);
        let comparing = Instant::now();
        let compare_blocks = if self.options.compare { self.send_digests()? } else { 0 };
        let compare = comparing.elapsed();
        let round = self.round_number();
        let epoch = self.link.epoch;
        self.link.control.send(&Message::Final(Final { epoch, round, compare_blocks, state }))?;
        self.advance(SourceEvent::FinalSent, SourceAction::Continue)?;
        let completion = self.await_prepared()?;
        self.options.cancel.check()?;
        let beat = self.guest.heartbeat().filter(|beat| beat.count > 0).map(|beat| (beat.count, beat.age));
        // From this line on the guest may run there, whatever becomes of the send.
        self.advance(SourceEvent::GoAttempted, SourceAction::Continue)?;
        self.link.control.send(&Message::Go(epoch))?;
        self.await_running()?;
        let downtime = paused_at.elapsed();
        let compare = compare + Duration::from_micros(completion.verify_us);
        Ok(Switched { downtime, compare, completion, last_beat_before_go: beat })
    }

    /// Step 5: the guest is the destination's. What is left is to learn how it does there, if it says.
    fn complete(&mut self, setup: Duration, switched: &Switched) -> Report {
        let total = self.started.elapsed();
        self.observer.event(&Event::Switched { downtime_ms: ms(switched.downtime) });
        let guest_downtime = switched.last_beat_before_go.and_then(|(count, age)| {
            match self.link.control.receive("the guest's heartbeat", Some(ALIVE_MAX)) {
                Ok(Message::Alive(epoch, there, after_go_us))
                    if epoch == self.link.epoch && there > count =>
                {
                    Some(age + Duration::from_micros(after_go_us))
                }
                _ => None,
            }
        });
        let sum = |of: fn(&RoundReport) -> u64| self.rounds.iter().map(of).sum();
        let (bytes_sent, pages_sent): (u64, u64) = (sum(|round| round.bytes), sum(|round| round.pages));
        let sending_ms: f64 = self.rounds.iter().map(|round| round.ms).sum();
        Report {
            transport: self.link.transport.kind(),
            total_ms: ms(total),
            setup_ms: ms(setup),
            downtime_ms: ms(switched.downtime),
            compare_ms: ms(switched.compare),
            guest_downtime_ms: guest_downtime.map(ms),
            rounds: self.rounds.clone(),
            bytes_sent,
            pages_sent,
            pages_zero: self.pages_zero,
            throughput_mbps: mbps(bytes_sent, Duration::from_secs_f64(sending_ms / 1e3)),
            verified_pages: switched.completion.verified_pages,
        }
    }

    /// Tells the handover what happened; what it wants done must be what comes next here.
    fn advance(&mut self, event: SourceEvent, next: SourceAction) -> Result<(), MigrationFailure> {
        if self.handover.on(event)? == next { Ok(()) } else { Err(HandoverError::OtherAction.into()) }
    }

    /// After a failure: lets the guest run here again, if it is this side's to run.
    fn fail(&mut self, cause: MigrationFailure) -> MigrationError {
        let cause = self.explain(cause);
        let refused_there = matches!(cause, MigrationFailure::DestinationFailed(_));
        let event = if refused_there { SourceEvent::Refused(self.link.epoch) } else { SourceEvent::Failed };
        let action = self.handover.on(event);
        // Neither can make anything worse, and the cause matters more than they do.
        if let Err(error) = self.log.stop() {
            tracing::warn!("the dirty log stays on: {error}");
        }
        if self.throttle_percent > 0 {
            self.throttle(0);
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

    /// Sends what is dirty and closes the round; returns the bytes of the pages.
    fn send_round(&mut self) -> Result<u64, MigrationFailure> {
        let began = Instant::now();
        let number = self.round_number() + 1;
        let what = (&self.dirty, &self.stripes);
        let sent = self.link.send_round(number, what, &*self.log, &self.options.cancel)?;
        self.pages_zero += sent.zero_pages;
        let bytes = sent.pages * PAGE_BYTES;
        let ms = ms(began.elapsed());
        self.rounds.push(RoundReport { pages: sent.pages, bytes, ms, dirty_rate_mbps: 0.0 });
        Ok(bytes)
    }

    fn harvest(&mut self) -> Result<(), MigrationFailure> {
        for region in 0..self.dirty.regions() {
            self.log.harvest(region, self.dirty.words_mut(region))?;
        }
        Ok(())
    }

    /// Hashes all of RAM and sends the digests; returns how many there are.
    fn send_digests(&mut self) -> Result<u64, MigrationFailure> {
        let blocks = digest::blocks(&self.link.ram.layout());
        let digests = self.link.pool.install(|| digest::digests(&self.link.ram, &blocks))?;
        for part in digests.chunks(DIGESTS_MAX) {
            self.link.control.send(&Message::Digests(part.to_vec()))?;
        }
        Ok(digests.len() as u64)
    }

    fn await_prepared(&mut self) -> Result<Completion, MigrationFailure> {
        // The destination may hash all of its RAM in this time; 16 MiB/s is slow for that.
        let hashing = Duration::from_secs(self.link.ram.layout().total_bytes() >> 24);
        // And it deregisters all of it; 1 GiB/s is slow for that.
        let revoking = Duration::from_secs(self.link.ram.layout().total_bytes() >> 30);
        let limit = STEP_MAX + revoking + if self.options.compare { hashing } else { Duration::ZERO };
        match self.link.control.receive("PREPARED", Some(limit))? {
            Message::Prepared(epoch, completion) => {
                self.advance(SourceEvent::Prepared(epoch), SourceAction::SendGo)?;
                Ok(completion)
            }
            other => Err(unexpected("PREPARED", self.link.epoch, other)),
        }
    }

    fn await_running(&mut self) -> Result<(), MigrationFailure> {
        match self.link.control.receive("RUNNING", Some(STEP_MAX))? {
            Message::Running(epoch) => self.advance(SourceEvent::Running(epoch), SourceAction::Release),
            other => Err(unexpected("RUNNING", self.link.epoch, other)),
        }
    }

    fn throttle(&mut self, percent: u8) {
        match self.guest.throttle(percent) {
            Ok(()) => {
                self.throttle_percent = percent;
                self.observer.event(&Event::Throttled { percent });
            }
            Err(error) => tracing::warn!("the guest cannot be throttled to {percent} %: {error}"),
        }
    }

    /// Tells of the round that was sent last. While the guest runs, `since_began` is how long it had to write what is dirty now.
    fn tell_round(&mut self, since_began: Duration) {
        let number = self.round_number();
        let dirty_bytes = self.history.last().map_or(0, |round| round.dirty_pages * PAGE_BYTES);
        let Some(report) = self.rounds.last_mut() else { return };
        report.dirty_rate_mbps = mbps(dirty_bytes, since_began);
        let predicted_downtime_ms = convergence::predicted_downtime(&self.history).map_or(0.0, ms);
        self.observer.event(&Event::Round { number, round: *report, predicted_downtime_ms });
    }

    fn round_number(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    fn not_converging(&self) -> MigrationFailure {
        MigrationFailure::NotConverging {
            dirty_rate_mbps: self.rounds.last().map_or(0.0, |round| round.dirty_rate_mbps),
            throughput_mbps: convergence::bandwidth(&self.history).unwrap_or(0.0) / 1e6,
            rounds: self.round_number(),
            predicted_downtime_ms: convergence::predicted_downtime(&self.history).map_or(0.0, ms),
        }
    }
}

/// How long to wait for word of the guest's first heartbeat at the destination.
const ALIVE_MAX: Duration = Duration::from_secs(5);

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

pub(crate) fn mbps(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = bytes as f64;
    if time.is_zero() { 0.0 } else { bytes / 1e6 / time.as_secs_f64() }
}
