//! Steps 2 to 5 of one guest's arrival.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::acceptor::{Reconnect, TICK};
use super::durable_handover::DurableHandover;
use super::{ArrivalPhase, PendingArrival, ReceiveError};
use crate::control::{ControlChannel, ControlError};
use crate::guest::{self, DestinationGuest, GuestError, RunOutcome, heartbeat_of};
use crate::handover::{DestinationAction, DestinationEvent, DestinationState, HandoverError};
use crate::lock::{LOCK_MAX, Lock};
use crate::memory::GuestRam;
use crate::panics::{Panicked, caught};
use crate::saved_state::{IncomingState, StateReader};
use crate::session::{answer_rounds, await_other_lanes, out_of_turn};
use crate::state::GuestClaim;
use crate::transport::{LaneReceiver, Remains};
use crate::verify::DestinationDigests;
use crate::wire::{BlockDigests, Completion, Final, Message, Outcome};

/// One attempt, from the first page on.
pub(super) struct Attempt<G> {
    guest: G,
    /// What the VMM said when the guest was to start.
    started: RunOutcome,
    lane_receiver: Option<Box<dyn LaneReceiver>>,
    /// What revocation leaves of the lanes' ends, until the guest runs or is given up.
    remains: Option<Box<dyn Remains>>,
    handover: DurableHandover,
    /// What arbitrates between the hosts.
    lock: Option<Lock>,
    /// How long it is held without its source, and the operator's handle on that.
    takeover_timeout: Duration,
    pending: PendingArrival,
    checks: DestinationDigests,
    /// What has arrived of its saved state.
    state: IncomingState,
}

impl<G: DestinationGuest> Attempt<G> {
    pub(super) fn new(
        guest: G,
        (ram, lane_receiver, state): (&GuestRam, Box<dyn LaneReceiver>, IncomingState),
        (handover, lock): (DurableHandover, Option<Lock>),
        (takeover_timeout, pending): (Duration, PendingArrival),
    ) -> Self {
        pending.set(ArrivalPhase::Incoming, None);
        let (lane_receiver, checks) = (Some(lane_receiver), DestinationDigests::new(ram));
        let started = RunOutcome::Unknown { reason: "it was not started yet".into() };
        let remains = None;
        Self {
            guest,
            started,
            lane_receiver,
            remains,
            handover,
            lock,
            takeover_timeout,
            pending,
            checks,
            state,
        }
    }

    /// The guest that is here now, whether it runs, and its name.
    pub(super) fn arrived(self) -> (G, RunOutcome, GuestClaim) {
        (self.guest, self.started, self.handover.into_claim())
    }

    /// Steps 2 to 5; whether the source knows then that the guest runs here.
    pub(super) fn run(
        &mut self,
        control: &mut ControlChannel,
        reconnects: &mpsc::Receiver<Reconnect>,
    ) -> Result<bool, ReceiveError> {
        let last = self.rounds(control)?;
        let go = self.switch(control, reconnects, &last)?;
        Ok(caught(|| self.complete(control, go)).unwrap_or_else(|Panicked(text)| {
            tracing::error!("the guest runs here, and the source may not know: a defect of sterna: {text}");
            false
        }))
    }

    /// Steps 2 and 3.
    fn rounds(&mut self, control: &mut ControlChannel) -> Result<Final, ReceiveError> {
        let lane_receiver =
            self.lane_receiver.as_mut().ok_or(ReceiveError::OutOfTurn("pages after FINAL"))?;
        let (checks, state) = (&mut self.checks, &mut self.state);
        let ended = answer_rounds(lane_receiver.as_mut(), control, |control, message| {
            match message {
                Message::BlockDigests(BlockDigests { now, digests }) => {
                    checks.note(&digests)?;
                    if now {
                        control.send(&Message::Checked(checks.compare_now(&digests)?))?;
                    }
                }
                Message::State(frame) => state.push(frame)?,
                other => return Err(out_of_turn(other).into()),
            }
            Ok(())
        });
        match ended {
            Err(ReceiveError::Transport(error)) if error.may_fall_back() => {
                self.let_go();
                Err(await_other_lanes(control, self.handover.attempt_id(), &error).into())
            }
            ended => ended,
        }
    }

    /// Step 4: revoke, compare, load, PREPARED, and run on GO; returns when that came.
    fn switch(
        &mut self,
        control: &mut ControlChannel,
        reconnects: &mpsc::Receiver<Reconnect>,
        last: &Final,
    ) -> Result<Instant, ReceiveError> {
        let mut state = self.state.complete(last.state_bytes)?;
        self.advance(DestinationEvent::Final(last.attempt_id), DestinationAction::Revoke)?;
        let revoking = Instant::now();
        self.remains = self.lane_receiver.take().map(<dyn LaneReceiver>::revoke).transpose()?;
        let revoke_us = micros(revoking.elapsed());
        self.advance(DestinationEvent::Revoked, DestinationAction::Load)?;
        let comparing = Instant::now();
        let verified_pages = self.checks.conclude(last.compare_blocks)?;
        let verify_us = micros(comparing.elapsed());
        let loading = Instant::now();
        let mut sections = StateReader::new(&mut state);
        self.guest.load(&mut sections)?;
        sections.finish().map_err(GuestError::from)?;
        let load_us = micros(loading.elapsed());
        let completion = Completion { verified_pages, revoke_us, verify_us, load_us };
        self.advance(DestinationEvent::Loaded, DestinationAction::SendPrepared)?;
        let prepared = Instant::now();
        let attempt_id = self.handover.attempt_id();
        self.pending.set(ArrivalPhase::Ready, None);
        // What fails from here on is that the source is lost, not that it has given up.
        let told = control.send(&Message::Prepared(attempt_id, completion));
        match told.and_then(|()| control.receive("GO", Some(GO_MAX.min(self.takeover_timeout).max(TICK)))) {
            Ok(message) => self.go(message),
            Err(error) => self.await_takeover(control, reconnects, (prepared, error)),
        }
    }

    /// Runs the guest if this is GO; returns when that came.
    fn go(&mut self, message: Message) -> Result<Instant, ReceiveError> {
        let go = Instant::now();
        match message {
            Message::Go(attempt_id) => {
                if let Some(lock) = &self.lock {
                    // The source gave it up before it sent this.
                    lock.take_within(LOCK_MAX)?;
                }
                self.start(DestinationEvent::Go(attempt_id))?;
            }
            Message::Abort(_, reason) => return Err(ReceiveError::SourceGaveUp(reason)),
            other => return Err(ReceiveError::OutOfTurn(other.name())),
        }
        Ok(go)
    }

    fn start(&mut self, why: DestinationEvent) -> Result<(), ReceiveError> {
        self.advance(why, DestinationAction::Run)?;
        self.pending.set(ArrivalPhase::Running, None);
        self.started = self.guest.start().map_err(ReceiveError::Start)?;
        if let RunOutcome::Unknown { reason } = &self.started {
            tracing::error!("the VMM does not say whether the guest runs, and it stays here: {reason}");
        }
        // It may run, so it must never run at the source again.
        self.advance(DestinationEvent::Started, DestinationAction::SendRunning)
    }

    /// The source is lost or slow, and may have given the guest away: waits for it, on the connection that it has if that still
    /// stands, and on new ones; or for the operator's word.
    fn await_takeover(
        &mut self,
        control: &mut ControlChannel,
        reconnects: &mpsc::Receiver<Reconnect>,
        (prepared, error): (Instant, ControlError),
    ) -> Result<Instant, ReceiveError> {
        let until = prepared + self.takeover_timeout;
        tracing::warn!(
            "the source is lost, the guest is ready and held for {} s: {error}",
            self.takeover_timeout.as_secs()
        );
        self.pending.set(ArrivalPhase::Kept { until }, self.lock.clone());
        // Whether more may come on the connection of the attempt: GO or Abort, and the source's keepalives.
        let mut connected = matches!(error, ControlError::Timeout { .. });
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReceiveError::NoGo { held: self.takeover_timeout, error });
            }
            match reconnects.recv_timeout(left.min(TICK)) {
                Ok(reconnect) => {
                    self.pending.contradict();
                    if let Some((message, from)) = self.receive_visit(reconnect)? {
                        *control = from;
                        return self.go(message);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Nothing accepts any more; the operator's word may still come.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
            if connected {
                match control.receive("GO", Some(left.min(TICK))) {
                    Ok(message) => {
                        self.pending.contradict();
                        return self.go(message);
                    }
                    Err(ControlError::Timeout { .. }) => {}
                    Err(_) => connected = false,
                }
            }
            // A connection that stands is a sign of life: its keepalives come every second.
            if connected {
                self.pending.contradict();
            } else if self.pending.take_word() {
                return self.start(DestinationEvent::Fenced).map(|()| Instant::now());
            }
        }
    }

    /// What a source that comes anew has to say in the end; `None` if it is lost again.
    fn receive_visit(
        &mut self,
        Reconnect { mut control, message }: Reconnect,
    ) -> Result<Option<(Message, ControlChannel)>, ReceiveError> {
        let Message::Ask(attempt_id) = message else { return Ok(Some((message, control))) };
        self.advance(DestinationEvent::Asked(attempt_id), DestinationAction::SendPrepared)?;
        let answered = control.send(&Message::Outcome(attempt_id, Outcome::Prepared));
        match answered.and_then(|()| control.receive("GO", Some(VISIT_MAX))) {
            Ok(message @ (Message::Go(of) | Message::Abort(of, _))) if of == attempt_id => {
                Ok(Some((message, control)))
            }
            Ok(other) => {
                tracing::warn!("{} asked and then said {}", control.peer_address(), other.name());
                Ok(None)
            }
            Err(error) => {
                tracing::warn!("{} asked and went away: {error}", control.peer_address());
                Ok(None)
            }
        }
    }

    /// Tells the handover what happened; what it wants done must be what comes next here.
    fn advance(&mut self, event: DestinationEvent, next: DestinationAction) -> Result<(), ReceiveError> {
        if self.handover.on(event)? == next {
            return Ok(());
        }
        // The one thing that may come instead is that it gives up, because it could not be recorded.
        Err(match self.handover.take_unrecorded() {
            Some(error) => ReceiveError::State(error),
            None => HandoverError::OtherAction.into(),
        })
    }

    /// Step 5: tells the source that the guest runs, and that it lives; whether it was heard. Nothing that fails here changes whose
    /// it is.
    fn complete(&mut self, control: &mut ControlChannel, go: Instant) -> bool {
        let attempt_id = self.handover.attempt_id();
        let told = control.send(&Message::Running(attempt_id));
        // It ends when it has ended: nothing waits for it.
        drop(self.release_beside());
        let told = told.and_then(|()| match self.first_beat(go) {
            Some((count, after_go)) => control.send(&Message::Alive(attempt_id, count, micros(after_go))),
            None => Ok(()),
        });
        match told.and_then(|()| control.receive("DONE", Some(DONE_MAX))) {
            Ok(done) => done == Message::Done(attempt_id),
            Err(error) => {
                tracing::warn!("the guest runs here, and the source has not said that it knows: {error}");
                false
            }
        }
    }

    /// The guest's first heartbeat after GO: its count, and how long after. `None` if it gives none, or not in time.
    fn first_beat(&self, go: Instant) -> Option<(u64, Duration)> {
        while go.elapsed() < FIRST_BEAT_MAX {
            let beat = heartbeat_of(&self.guest)?;
            let since_go = go.elapsed();
            if beat.age <= since_go {
                return Some((beat.count, since_go - beat.age));
            }
            thread::sleep(Duration::from_micros(100));
        }
        None
    }

    /// Releases what is left of the lanes' ends in a thread of its own: it takes a time that grows with RAM, and the guest runs, or
    /// its source waits for the word that it does not.
    fn release_beside(&mut self) -> Option<JoinHandle<()>> {
        let remains = self.remains.take()?;
        let name = self.guest.name().to_owned();
        let release = move || release(&name, remains);
        // Without a thread all of it is released here, as it is dropped.
        thread::Builder::new().name("release".into()).spawn(release).ok()
    }

    /// Takes remote access away from a guest that will not run: a failure is only logged, because this memory never runs.
    fn take_access_away(&mut self) {
        match self.lane_receiver.take().map(<dyn LaneReceiver>::revoke) {
            Some(Ok(remains)) => self.remains = Some(remains),
            Some(Err(error)) => {
                tracing::warn!("a device may still hold memory of a guest that was discarded: {error}");
            }
            None => {}
        }
    }

    /// Takes the lanes' ends away from a guest that will not run, with its memory.
    fn let_go(&mut self) {
        self.take_access_away();
        if let Some(remains) = self.remains.take() {
            release(self.guest.name(), remains);
        }
    }

    /// Frees what has arrived, before the same guest begins anew.
    pub(super) fn discard(mut self) {
        self.let_go();
        guest::discard(self.guest);
    }

    /// After a failure: gives the guest up, if it may be given up, and tells the source.
    pub(super) fn fail(mut self, control: &mut ControlChannel, error: ReceiveError) -> ReceiveError {
        self.take_access_away();
        // What is registered keeps its memory mapped.
        let releasing = self.release_beside();
        let error = match (error, control.liveness().check_heard()) {
            // Lanes that were shut down because of it explain less.
            (ReceiveError::Transport(_), Err(silent)) => silent.into(),
            (error, _) => error,
        };
        let action = match (self.handover.state(), &error) {
            (DestinationState::Refused, _) => Ok(DestinationAction::Refuse),
            (_, ReceiveError::Start(_)) => self.handover.on(DestinationEvent::NotStarted),
            _ => self.handover.on(DestinationEvent::Failed),
        };
        let attempt_id = self.handover.attempt_id();
        // Only now, with nothing left that could run, the name free and the lock given up, may the source hear that this attempt never
        // ran.
        let freed = guest::discard(self.guest);
        drop(self.handover);
        self.pending.set(ArrivalPhase::Incoming, None);
        if let Some(lock) = &self.lock {
            lock.give_up();
        }
        // Also to a source that gave up: it may be unable to record that, and wait for this word instead.
        if action == Ok(DestinationAction::Refuse) && freed {
            let _ = control.send(&Message::Abort(attempt_id, error.to_string()));
        }
        // The next guest needs that memory.
        if let Some(releasing) = releasing {
            let _ = releasing.join();
        }
        error
    }
}

/// Releases memory after remote access was revoked.
fn release(name: &str, remains: Box<dyn Remains>) {
    if let Err(leak) = remains.release() {
        tracing::warn!("{name}: {leak}");
    }
}

/// How long to wait for GO on the connection on which PREPARED was sent. The source sends it at once, or is gone.
const GO_MAX: Duration = Duration::from_secs(60);

/// How long to wait for GO from a source that has come anew.
const VISIT_MAX: Duration = Duration::from_secs(5);

/// How long to wait for the source's word that it has heard RUNNING.
const DONE_MAX: Duration = Duration::from_secs(2);

/// How long to look for the guest's first heartbeat.
const FIRST_BEAT_MAX: Duration = Duration::from_secs(4);

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
