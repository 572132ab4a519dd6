//! Step 4: no host runs the guest until the destination does, or until the source takes it back.
//!
//! [`SourceHandover`](crate::handover::SourceHandover) answers each event with the next action, and this
//! module carries it out.

use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use super::complete::{Measured, Switched};
use super::error::{MigrationError, MigrationFailure};
use super::give_up::{Undo, event_of};
use super::hash_paused::verify_max;
use super::laps::Laps;
use super::migration::{Connected, Migration};
use super::pages::Pages;
use super::saving;
use super::steering::Steering;
use super::verdict::Verdict;
use crate::control::{ControlError, STEP_MAX};
use crate::convergence::Downtime;
use crate::dirty::{CaughtUp, DirtyBitmap};
use crate::guest::heartbeat_of;
use crate::handover::{HandoverError, SourceAction, SourceEvent};
use crate::memory::PAGE_BYTES;
use crate::panics::caught_or;
use crate::progress::{Event, ms};
use crate::saved_state::{SentState, StateSender};
use crate::session::unexpected;
use crate::wire::{AttemptId, Final, Message, WireError};

/// A running guest with so little left to send that it may be paused.
pub(super) struct Converged<'migration> {
    pub(super) migration: Migration<'migration>,
    pub(super) connected: Connected,
    pub(super) pages: Pages,
    /// The sender of the saved state.
    pub(super) saving: StateSender,
    pub(super) steering: Steering,
    /// The duration of the set-up.
    pub(super) setup: Duration,
    /// Since when the guest is paused, if its VMM has paused it by itself.
    pub(super) paused_since: Option<Instant>,
    pub(super) heartbeats_per_second: Option<f64>,
}

impl<'migration> Converged<'migration> {
    /// Pauses the guest and gives it away. After a failure the guest runs on at the source, or its owner is
    /// in doubt.
    pub(super) fn switch(self) -> Result<Switched<'migration>, MigrationError> {
        let Self {
            migration,
            connected,
            pages,
            saving,
            mut steering,
            setup,
            paused_since,
            heartbeats_per_second,
        } = self;
        let throttle_percent = steering.history.throttle_percent();
        // From the pause on the guest loses all of its time.
        steering.stands_still(migration);
        let mut switch = Switch {
            migration,
            connected,
            pages,
            predicted: steering.predicted,
            throttle_percent,
            may_be_paused: paused_since.is_some(),
            paused_since,
            clock: Laps::since(Instant::now()),
            parts: Downtime::default(),
            state_bytes: 0,
            compared_pages: 0,
            last_beat: None,
            go_sent: None,
            lost: None,
        };
        let ended = caught_or(|| switch.run(saving));
        let Switch {
            connected, pages, clock, parts, compared_pages, last_beat, go_sent, may_be_paused, ..
        } = switch;
        match ended {
            Ok(()) => {
                let last_beat_before_go = last_beat;
                let downtime = clock.total();
                let measured =
                    Measured { setup, downtime, parts, compared_pages, last_beat_before_go, go_sent };
                Ok(Switched { migration, connected, pages, steering, heartbeats_per_second, measured })
            }
            Err(cause) => Err(connected.give_up(migration, Undo { throttle_percent, may_be_paused }, cause)),
        }
    }
}

/// The context for carrying out the handover's actions.
struct Switch<'migration> {
    migration: Migration<'migration>,
    connected: Connected,
    pages: Pages,
    /// The predicted downtime.
    predicted: Downtime,
    throttle_percent: u8,
    may_be_paused: bool,
    paused_since: Option<Instant>,
    /// Starts with the pause.
    clock: Laps,
    /// The downtime by parts.
    parts: Downtime,
    /// The length of the saved state.
    state_bytes: u64,
    /// How many pages the destination has to compare.
    compared_pages: u64,
    /// When the guest last beat at the source, counted back from the moment GO was sent.
    last_beat: Option<(u64, Duration)>,
    go_sent: Option<Instant>,
    /// Why RUNNING was not received.
    lost: Option<MigrationFailure>,
}

impl Switch<'_> {
    /// Carries out the handover's actions until the guest belongs to the destination. After an error,
    /// [`Connected::give_up`] decides about the guest.
    fn run(&mut self, saving: StateSender) -> Result<(), MigrationFailure> {
        let mut saving = Some(saving);
        let mut action = self.on(SourceEvent::Pausing)?;
        loop {
            action = match action {
                SourceAction::SendFinal => {
                    let saving = saving.take().ok_or(HandoverError::OtherAction)?;
                    self.send_final(saving)?;
                    self.on(SourceEvent::FinalSent)?
                }
                SourceAction::AwaitPrepared => {
                    let prepared = self.await_prepared()?;
                    self.on(SourceEvent::Prepared(prepared))?
                }
                SourceAction::SendGo => self.send_go()?,
                SourceAction::Release => {
                    // Only now, because readers of events may need the processor that the switch needs.
                    self.report_last_round();
                    self.connected.handover.send_done(&mut self.connected.link.control);
                    return Ok(());
                }
                SourceAction::Ask => return self.ask(),
                SourceAction::Withdraw => self.withdraw()?,
                SourceAction::Resume => return Err(self.why_kept()),
                SourceAction::Record(_) | SourceAction::AskOnly => {
                    return Err(HandoverError::OtherAction.into());
                }
            };
        }
    }

    fn on(&mut self, event: SourceEvent) -> Result<SourceAction, HandoverError> {
        self.connected.handover.on(event)
    }

    /// Pauses the guest, and sends its last pages, its state and FINAL.
    fn send_final(&mut self, saving: StateSender) -> Result<(), MigrationFailure> {
        let Migration { guest, options, observer, .. } = self.migration;
        self.clock = Laps::since(self.paused_since.unwrap_or_else(Instant::now));
        // Set even if the pause fails, because the guest may then be paused: resuming it does no harm.
        self.may_be_paused = true;
        guest.pause()?;
        // A VMM that names pages comes to the pause in its own time, and its guest runs until then.
        if let (true, CaughtUp::Paused { since }) = (self.pages.are_named(), self.connected.log.catch_up()?) {
            self.clock = Laps::since(since);
        }
        self.parts.pause = self.clock.lap();
        observer.event(&Event::Paused);
        options.cancel.check()?;
        self.pages.begin_round();
        // Saving may write to guest RAM, so the last harvest comes after it; dirty pages stay dirty.
        let state = match self.pages.set_aside(&self.connected)? {
            Some(named_before) => self.save_while_sending(saving, named_before)?,
            None => saving::save(guest, saving::limit(&self.connected.link, options), saving)?,
        };
        self.connected.check_ram(self.migration)?;
        self.parts.save += self.clock.lap();
        self.pages.harvest(&self.connected)?;
        self.pages.digests.harvested(&self.pages.dirty);
        self.parts.harvest = self.clock.lap();
        self.send_pages()?;
        self.parts.register = self.connected.link.transport.waited();
        self.parts.send = (self.parts.send + self.clock.lap()).saturating_sub(self.parts.register);
        let compare_blocks = self.pages.send_digests(self.migration, &mut self.connected)?;
        if compare_blocks > 0 {
            self.compared_pages = self.connected.link.ram.layout().total_pages();
        }
        self.parts.verify = self.clock.lap();
        let (round, attempt_id) = (self.pages.passes(), self.connected.link.attempt_id);
        self.state_bytes = state.wait()?;
        let state_bytes = self.state_bytes;
        let last = Final { attempt_id, round, compare_blocks, state_bytes };
        self.connected.link.control.send(&Message::Final(last))?;
        Ok(())
    }

    /// Saves the state of a guest whose VMM names its last pages meanwhile, and sends those. The pages named
    /// before stay dirty: many of them are named again.
    fn save_while_sending(
        &mut self,
        saving: StateSender,
        mut named_before: DirtyBitmap,
    ) -> Result<SentState, MigrationFailure> {
        let Migration { guest, options, .. } = self.migration;
        let limit = saving::limit(&self.connected.link, options);
        let state = thread::scope(|scope| {
            let saved = thread::Builder::new()
                .name("save".into())
                .spawn_scoped(scope, || saving::save(guest, limit, saving))
                .map_err(|error| MigrationFailure::System { what: "threads", error: error.to_string() })?;
            while !saved.is_finished() {
                self.pages.harvest(&self.connected)?;
                if self.pages.dirty.count() * PAGE_BYTES < SENT_EARLY_MIN {
                    thread::sleep(NAMES_EVERY);
                    continue;
                }
                self.pages.digests.harvested(&self.pages.dirty);
                self.parts.save += self.clock.lap();
                self.send_pages()?;
                self.parts.send += self.clock.lap();
                named_before.remove(&self.pages.dirty);
                self.pages.dirty.clear();
            }
            saved.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        self.pages.dirty.join(&named_before);
        Ok(state)
    }

    fn send_pages(&mut self) -> Result<(), MigrationFailure> {
        let how = (None, self.throttle_percent);
        self.pages.send_pass(self.migration, &mut self.connected, how).map(drop)
    }

    fn report_last_round(&self) {
        let Some(round) = self.pages.rounds.last().cloned() else { return };
        let number = self.pages.round_number();
        let predicted_downtime_ms = self.predicted.known().map(ms);
        self.migration.observer.event(&Event::Round { number, round, predicted_downtime_ms });
    }

    /// Waits until the destination has revoked, compared and loaded. The last moment at which the operator
    /// may cancel.
    fn await_prepared(&mut self) -> Result<AttemptId, MigrationFailure> {
        let Migration { guest, options, .. } = self.migration;
        let link = &mut self.connected.link;
        // 16 MiB/s is slow for loading the state.
        let loading = Duration::from_secs(self.state_bytes >> 24);
        let limit = STEP_MAX + loading + verify_max(link, options.verify);
        let (prepared, completion) = match link.control.receive("PREPARED", Some(limit))? {
            Message::Prepared(attempt_id, completion) => (attempt_id, completion),
            other => return Err(unexpected("PREPARED", link.attempt_id, other).into()),
        };
        if completion.verified_pages != self.compared_pages {
            return Err(ControlError::Wire(WireError::Malformed("number of compared pages")).into());
        }
        let mut rest = self.clock.lap();
        // The destination's figures are parts of what was measured at this end, whatever it sends.
        let [verify, revoke, load] =
            [completion.verify_us, completion.revoke_us, completion.load_us].map(|part_us| {
                let part = Duration::from_micros(part_us).min(rest);
                rest -= part;
                part
            });
        let parts = &mut self.parts;
        (parts.revoke, parts.load, parts.transfer) = (revoke, load, rest);
        parts.verify += verify;
        self.last_beat = heartbeat_of(guest).filter(|beat| beat.count > 0).map(|beat| (beat.count, beat.age));
        options.cancel.close()?;
        Ok(prepared)
    }

    /// COMMITTED is recorded: sends GO, and waits for RUNNING.
    fn send_go(&mut self) -> Result<SourceAction, MigrationFailure> {
        self.connected.handover.give_lock_up();
        let link = &mut self.connected.link;
        let attempt_id = link.attempt_id;
        self.go_sent = Some(Instant::now());
        // From this line on the guest may run at the destination, whatever the result of the send.
        let sent = link.control.send(&Message::Go(attempt_id)).map_err(MigrationFailure::from);
        let heard = sent.and_then(|()| match link.control.receive("RUNNING", Some(STEP_MAX))? {
            Message::Running(of) => Ok(of),
            other => Err(unexpected("RUNNING", attempt_id, other).into()),
        });
        // Recording the release is no part of the guest's downtime.
        self.parts.start = self.clock.lap();
        match heard.and_then(|running| Ok(self.on(SourceEvent::Running(running))?)) {
            Ok(action) => Ok(action),
            Err(cause) => {
                self.last_beat = None;
                let event = event_of(&cause, attempt_id);
                self.lost = Some(cause);
                Ok(self.on(event)?)
            }
        }
    }

    /// RUNNING did not come: asks the destination for a while. An error, unless the answer is that the guest
    /// runs.
    fn ask(&mut self) -> Result<(), MigrationFailure> {
        let cause = self.lost.take().unwrap_or(HandoverError::OtherAction.into());
        self.migration.observer.event(&Event::Asking { why: cause.to_string() });
        match self.connected.handover.ask_for(ASKING_MAX) {
            Verdict::Moved => {
                self.parts.start += self.clock.lap();
                Ok(())
            }
            Verdict::Kept => Err(cause),
            Verdict::Open(why) => {
                tracing::warn!("{why}");
                Err(cause)
            }
        }
    }

    /// Neither COMMITTED nor REFUSED could be recorded, so the destination has to refuse.
    fn withdraw(&mut self) -> Result<SourceAction, MigrationFailure> {
        let Connected { handover, link, .. } = &mut self.connected;
        handover.withdraw_over(&mut link.control).map_err(|why| {
            tracing::warn!("{why}");
            match handover.take_unrecorded() {
                Some(error) => MigrationFailure::Unrecorded(error),
                None => HandoverError::OtherAction.into(),
            }
        })
    }

    /// Why the guest belongs to the source after all.
    fn why_kept(&mut self) -> MigrationFailure {
        // The record that the guest is given away failed, so it is not given away.
        let unrecorded = self.connected.handover.take_unrecorded().map(MigrationFailure::from);
        self.lost.take().or(unrecorded).unwrap_or(HandoverError::OtherAction.into())
    }
}

/// Fewer bytes wait for the last pass: each pass ends with a wait for all lanes.
const SENT_EARLY_MIN: u64 = 1 << 20;

/// How often the thread that sends looks for named pages.
const NAMES_EVERY: Duration = Duration::from_micros(500);

/// For how long the source asks a destination that did not send RUNNING, before the migration ends in doubt.
const ASKING_MAX: Duration = Duration::from_secs(10);
