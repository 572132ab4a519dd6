//! Steps 4 and 5: the guest is paused here, given away, and runs there; or it is taken back.

use std::time::{Duration, Instant};

use super::{Attempt, MigrationFailure, Verdict, event_of, let_go};
use crate::control::STEP_MAX;
use crate::convergence::Downtime;
use crate::guest::heartbeat_of;
use crate::handover::{HandoverError, SourceAction, SourceEvent};
use crate::panics::{Panicked, caught};
use crate::progress::{Event, LimitsReport, Report, RoundReport, mbps, ms};
use crate::session::unexpected;
use crate::wire::{AttemptId, Completion, Final, Message};

/// What the switch took.
pub(super) struct Switched {
    /// All of it.
    downtime: Duration,
    /// The same by parts.
    parts: Downtime,
    completion: Completion,
    /// When the guest last beat here, counted back from the moment GO left.
    last_beat_before_go: Option<(u64, Duration)>,
}

impl Attempt<'_> {
    /// Step 4: nobody runs the guest from here until the destination does, or until this side takes it back.
    pub(super) fn switch(&mut self) -> Result<Switched, MigrationFailure> {
        let state = self.saving.take().map_or_else(|| self.ready_to_save(), Ok)?;
        self.advance(SourceEvent::Pausing, SourceAction::Continue)?;
        let mut clock = Laps::new();
        let mut parts = Downtime::default();
        // Also if it fails, which leaves open whether it is paused: to resume it does no harm.
        self.paused = true;
        self.guest.pause()?;
        parts.pause = clock.lap();
        self.observer.event(&Event::Paused);
        self.options.cancel.check()?;
        // Saving may write to guest RAM, so the last harvest comes after it; what is dirty already stays so.
        let state = self.save(state)?;
        self.check_ram()?;
        parts.save = clock.lap();
        self.dirty.by(&self.link.pool, |dirty| dirty.harvest(&*self.log))?;
        self.source_digests.harvested(&self.dirty);
        parts.harvest = clock.lap();
        self.send_round(false)?;
        self.tell_round(None);
        parts.register = self.link.transport.waited();
        parts.send = clock.lap().saturating_sub(parts.register);
        let compare_blocks = self.send_digests()?;
        parts.verify = clock.lap();
        let round = self.round_number();
        let attempt_id = self.link.attempt_id;
        let state_bytes = state.wait()?;
        self.link.control.send(&Message::Final(Final { attempt_id, round, compare_blocks, state_bytes }))?;
        self.advance(SourceEvent::FinalSent, SourceAction::Continue)?;
        let (prepared, completion) = self.await_prepared(state_bytes)?;
        let [verify, revoke, load] =
            [completion.verify_us, completion.revoke_us, completion.load_us].map(Duration::from_micros);
        (parts.revoke, parts.load) = (revoke, load);
        parts.transfer = clock.lap().saturating_sub(verify.saturating_add(revoke).saturating_add(load));
        let beat = heartbeat_of(self.guest).filter(|beat| beat.count > 0).map(|beat| (beat.count, beat.age));
        self.options.cancel.close()?;
        self.commit(prepared)?;
        // From this line on the guest may run there, whatever becomes of the send.
        let sent = self.link.control.send(&Message::Go(attempt_id)).map_err(MigrationFailure::from);
        let heard = sent.and_then(|()| self.await_running());
        // To record that it is released takes no time of the guest's any more.
        parts.start = clock.lap();
        let released =
            heard.and_then(|running| Ok(self.handover.release(running, &mut self.link.control)?));
        let last_beat_before_go = if released.is_ok() { beat } else { None };
        if let Err(cause) = released {
            self.settle(cause)?;
            parts.start += clock.lap();
        }
        parts.verify += verify;
        Ok(Switched { downtime: clock.total(), parts, completion, last_beat_before_go })
    }

    /// Step 5: the guest is the destination's. What is left is to learn how it does there, if it says.
    pub(super) fn complete(mut self, setup: Duration, switched: &Switched) -> Report {
        let total = self.started.elapsed();
        self.observer.event(&Event::Switched { downtime_ms: ms(switched.downtime) });
        let guest_downtime = caught(|| self.guest_downtime(switched)).unwrap_or_else(|Panicked(text)| {
            tracing::error!("the guest has moved, and its own downtime is not known: {text}");
            None
        });
        let report = self.report(total, setup, switched, guest_downtime);
        let_go((self.link, self.log));
        report
    }

    /// From the guest's last heartbeat here to its first at the destination.
    fn guest_downtime(&mut self, switched: &Switched) -> Option<Duration> {
        let (count, age) = switched.last_beat_before_go?;
        match self.link.control.receive("the guest's heartbeat", Some(ALIVE_MAX)) {
            Ok(Message::Alive(attempt_id, there, after_go_us))
                if attempt_id == self.link.attempt_id && there > count =>
            {
                age.checked_add(Duration::from_micros(after_go_us))
            }
            _ => None,
        }
    }

    fn report(
        &self,
        total: Duration,
        setup: Duration,
        switched: &Switched,
        guest_downtime: Option<Duration>,
    ) -> Report {
        let (blocks_hashed_paused, blocks_hashed_running) = self.blocks_hashed();
        let sum = |of: fn(&RoundReport) -> u64| self.rounds.iter().map(of).sum();
        let (bytes_sent, pages_sent): (u64, u64) = (sum(|round| round.bytes), sum(|round| round.pages));
        let sending_ms: f64 = self.rounds.iter().map(|round| round.ms).sum();
        Report {
            transport: self.link.transport.kind(),
            fell_back: self.link.fell_back.clone(),
            total_ms: ms(total),
            setup_ms: ms(setup),
            first_byte_ms: self.first_page.map(|first_page| ms(first_page - self.started)),
            downtime_ms: ms(switched.downtime),
            verify_ms: ms(switched.parts.verify),
            guest_downtime_ms: guest_downtime.map(ms),
            predicted: self.predicted.known().map(|_| self.predicted.into()),
            measured: switched.parts.into(),
            heartbeats_per_second: self.heartbeats_per_second,
            limits: LimitsReport::from(&self.limits),
            rounds: self.rounds.clone(),
            bytes_sent,
            pages_sent,
            pages_zero: self.pages_zero,
            throughput_mbps: mbps(bytes_sent, Duration::from_secs_f64(sending_ms / 1e3)),
            verify: self.options.verify,
            verified_pages: switched.completion.verified_pages,
            blocks_hashed_running,
            blocks_hashed_paused,
        }
    }

    fn await_prepared(&mut self, state_bytes: u64) -> Result<(AttemptId, Completion), MigrationFailure> {
        // 16 MiB/s is slow for loading the state.
        let loading = Duration::from_secs(state_bytes >> 24);
        let limit = STEP_MAX + loading + self.verify_max();
        match self.link.control.receive("PREPARED", Some(limit))? {
            Message::Prepared(attempt_id, completion) => Ok((attempt_id, completion)),
            other => Err(unexpected("PREPARED", self.link.attempt_id, other).into()),
        }
    }

    /// The destination is ready: the guest is given away, durably.
    fn commit(&mut self, prepared: AttemptId) -> Result<(), MigrationFailure> {
        match self.handover.on(SourceEvent::Prepared(prepared))? {
            SourceAction::SendGo => {
                self.handover.give_lock_up();
                Ok(())
            }
            // That it is given away could not be recorded, so it is not.
            SourceAction::Resume => Err(match self.handover.take_unrecorded() {
                Some(error) => error.into(),
                None => HandoverError::OtherAction.into(),
            }),
            // Nor that it is kept: then the destination's word must do.
            SourceAction::Withdraw => {
                let refused = self.handover.withdraw_over(&mut self.link.control);
                if let Err(why) = &refused {
                    tracing::warn!("{why}");
                }
                Err(match (self.handover.take_unrecorded(), refused) {
                    (Some(error), Ok(SourceAction::Resume)) => error.into(),
                    (Some(error), _) => MigrationFailure::Unrecorded(error),
                    (None, _) => HandoverError::OtherAction.into(),
                })
            }
            _ => Err(HandoverError::OtherAction.into()),
        }
    }

    fn await_running(&mut self) -> Result<AttemptId, MigrationFailure> {
        match self.link.control.receive("RUNNING", Some(STEP_MAX))? {
            Message::Running(attempt_id) => Ok(attempt_id),
            other => Err(unexpected("RUNNING", self.link.attempt_id, other).into()),
        }
    }

    /// No word that the guest runs there: asks for a while. An error, unless it turns out that it does.
    fn settle(&mut self, cause: MigrationFailure) -> Result<(), MigrationFailure> {
        if self.handover.on(event_of(&cause, self.link.attempt_id))? != SourceAction::Ask {
            return Err(cause);
        }
        self.observer.event(&Event::Asking { why: cause.to_string() });
        match self.handover.ask_for(ASKING_MAX) {
            Verdict::Moved => Ok(()),
            Verdict::Kept => Err(cause),
            Verdict::Open(why) => {
                tracing::warn!("{why}");
                Err(cause)
            }
        }
    }
}

/// A clock of steps that follow one another.
struct Laps {
    began: Instant,
    last: Instant,
}

impl Laps {
    fn new() -> Self {
        let now = Instant::now();
        Self { began: now, last: now }
    }

    /// The time since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.last, now)
    }

    /// The time of all laps.
    fn total(&self) -> Duration {
        self.last - self.began
    }
}

/// How long to wait for word of the guest's first heartbeat at the destination.
const ALIVE_MAX: Duration = Duration::from_secs(5);

/// For how long a destination that did not say RUNNING is asked before the migration ends in doubt.
const ASKING_MAX: Duration = Duration::from_secs(10);
