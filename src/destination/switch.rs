//! Step 4: revoke, compare, load, PREPARED, and run on GO.
//!
//! [`DestinationHandover`](crate::handover::DestinationHandover) answers each event with the next action, and
//! this module carries it out.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::arriving::Arriving;
use super::complete::{Running, micros};
use super::error::ReceiveError;
use super::fill::{Filled, Filling};
use super::options::Options;
use super::pending::ArrivalPhase;
use super::takeover::{Heard, Hold};
use crate::control::ControlChannel;
use crate::guest::{DestinationGuest, GuestError, RunOutcome};
use crate::handover::{DestinationAction, DestinationEvent, HandoverError};
use crate::lock::LOCK_MAX;
use crate::panics::caught_or;
use crate::progress::Event;
use crate::saved_state::StateReader;
use crate::session::{Reconnect, TICK, out_of_turn};
use crate::wire::{Completion, Message, Outcome};

impl<'attempt, G: DestinationGuest> Filled<'attempt, G> {
    /// Makes the guest ready, and runs it once the source gives it away.
    ///
    /// # Errors
    /// [`ReceiveError`]; the guest is given up.
    pub(super) fn switch(
        self,
        control: &mut ControlChannel,
        reconnects: &mpsc::Receiver<Reconnect>,
    ) -> Result<Running<'attempt, G>, ReceiveError> {
        let Self { arriving, filling } = self;
        let last = filling.last.attempt_id;
        let mut switch = Switch::new(arriving, filling, (control, reconnects));
        let ended = caught_or(|| {
            let action = switch.on(DestinationEvent::Final(last))?;
            switch.run(action)
        });
        let Switch { arriving, control, started, go, .. } = switch;
        match ended {
            Ok(()) => Ok(Running { arriving, started, go }),
            Err(error) => Err(arriving.give_up(control, error)),
        }
    }
}

/// The context for carrying out the handover's actions.
struct Switch<'attempt, 'control, G> {
    arriving: Arriving<'attempt, G>,
    filling: Filling,
    /// The connection of the attempt, or the latest on which its source reconnected.
    control: &'control mut ControlChannel,
    reconnects: &'control mpsc::Receiver<Reconnect>,
    completion: Completion,
    /// The source was lost, and the guest is held.
    hold: Option<Hold>,
    /// A connection on which the source asks about its guest.
    asking: Option<ControlChannel>,
    /// When GO came.
    go: Instant,
    /// The VMM's report on the start.
    started: RunOutcome,
}

impl<'attempt, 'control, G: DestinationGuest> Switch<'attempt, 'control, G> {
    fn new(
        arriving: Arriving<'attempt, G>,
        filling: Filling,
        (control, reconnects): (&'control mut ControlChannel, &'control mpsc::Receiver<Reconnect>),
    ) -> Self {
        Self {
            arriving,
            filling,
            control,
            reconnects,
            completion: Completion::default(),
            hold: None,
            asking: None,
            go: Instant::now(),
            started: RunOutcome::Unknown { reason: "it was not started yet".into() },
        }
    }

    /// Carries out the handover's actions until the guest runs or is given up.
    fn run(&mut self, mut action: DestinationAction) -> Result<(), ReceiveError> {
        loop {
            action = match action {
                DestinationAction::Revoke => {
                    let revoking = Instant::now();
                    self.arriving.lanes.revoke()?;
                    self.completion.revoke_us = micros(revoking.elapsed());
                    self.on(DestinationEvent::Revoked)?
                }
                DestinationAction::Load => {
                    self.compare_and_load()?;
                    // From now on the source decides.
                    self.arriving.options.cancel.close()?;
                    self.on(DestinationEvent::Loaded)?
                }
                DestinationAction::SendPrepared => {
                    let heard = self.await_go()?;
                    self.on(heard)?
                }
                DestinationAction::Run => {
                    self.start()?;
                    // The guest may run, so it must never run at the source again.
                    self.on(DestinationEvent::Started)?
                }
                DestinationAction::SendRunning => return Ok(()),
                // The guest is given up, because its readiness or its start could not be recorded.
                DestinationAction::Refuse | DestinationAction::Discard => {
                    return Err(match self.arriving.handover.take_unrecorded() {
                        Some(error) => ReceiveError::State(error),
                        None => HandoverError::OtherAction.into(),
                    });
                }
                DestinationAction::Record(_) | DestinationAction::Continue => {
                    return Err(HandoverError::OtherAction.into());
                }
            };
        }
    }

    fn on(&mut self, event: DestinationEvent) -> Result<DestinationAction, HandoverError> {
        self.arriving.handover.on(event)
    }

    fn compare_and_load(&mut self) -> Result<(), ReceiveError> {
        let Filling { digests, state, last } = &mut self.filling;
        let comparing = Instant::now();
        self.completion.verified_pages = digests.conclude(last.compare_blocks)?;
        self.completion.verify_us = micros(comparing.elapsed());
        let loading = Instant::now();
        let mut sections = StateReader::new(state);
        self.arriving.guest.load(&mut sections)?;
        sections.finish().map_err(GuestError::from)?;
        self.completion.load_us = micros(loading.elapsed());
        Ok(())
    }

    /// Reports to the source that the guest is ready, on the connection on which it waits; returns the event
    /// of its answer.
    fn await_go(&mut self) -> Result<DestinationEvent, ReceiveError> {
        if let Some(asking) = self.asking.take()
            && let Some(message) = self.answer_asking(asking)
        {
            return self.heard(message);
        }
        if self.hold.is_none() {
            let attempt_id = self.arriving.handover.attempt_id();
            let Options { pending, takeover_timeout, .. } = self.arriving.options;
            let patience = GO_MAX.min(*takeover_timeout).max(TICK);
            let prepared = Instant::now();
            pending.set(ArrivalPhase::Ready, None);
            self.arriving.observer.event(&Event::Prepared);
            // A failure from now on means that the source is lost, not that it has given up.
            let told = self.control.send(&Message::Prepared(attempt_id, self.completion));
            match told.and_then(|()| self.control.receive("GO", Some(patience))) {
                Ok(message) => return self.heard(message),
                Err(error) => self.hold = Some(Hold::new(prepared, error, self.arriving.options)),
            }
        }
        self.await_takeover()
    }

    /// The source was lost, and the guest is held: waits for the source, or for the operator's word.
    fn await_takeover(&mut self) -> Result<DestinationEvent, ReceiveError> {
        let Some(mut hold) = self.hold.take() else { return Err(HandoverError::OtherAction.into()) };
        match hold.wait(self.control, self.reconnects, self.arriving.options) {
            Some(Heard::Message(message)) => self.heard(message),
            Some(Heard::Reconnect(control, message)) => {
                *self.control = control;
                self.heard(message)
            }
            Some(Heard::Question(control, attempt_id)) => {
                (self.asking, self.hold) = (Some(control), Some(hold));
                Ok(DestinationEvent::Asked(attempt_id))
            }
            Some(Heard::Fenced) => {
                self.go = Instant::now();
                Ok(DestinationEvent::Fenced)
            }
            None => Err(hold.into_error()),
        }
    }

    /// The source's message on the connection on which it asked; `None` if the source is lost again.
    fn answer_asking(&mut self, mut asking: ControlChannel) -> Option<Message> {
        let attempt_id = self.arriving.handover.attempt_id();
        let from = asking.peer_address();
        let answered = asking.send(&Message::Outcome(attempt_id, Outcome::Prepared));
        match answered.and_then(|()| asking.receive("GO", Some(RECONNECT_MAX))) {
            Ok(message @ (Message::Go(of) | Message::Abort(of, _))) if of == attempt_id => {
                *self.control = asking;
                return Some(message);
            }
            Ok(other) => tracing::warn!("{from} asked and then said {}", other.name()),
            Err(error) => tracing::warn!("{from} asked and went away: {error}"),
        }
        None
    }

    /// The action for the source's message. With GO this side takes the lock, which the source released
    /// before it sent GO.
    fn heard(&mut self, message: Message) -> Result<DestinationEvent, ReceiveError> {
        self.go = Instant::now();
        match message {
            Message::Go(attempt_id) => {
                if let Some(lock) = &self.arriving.options.lock {
                    lock.take_within(LOCK_MAX)?;
                }
                Ok(DestinationEvent::Go(attempt_id))
            }
            other => Err(out_of_turn(other).into()),
        }
    }

    /// RUNNING is recorded.
    fn start(&mut self) -> Result<(), ReceiveError> {
        self.arriving.options.pending.set(ArrivalPhase::Running, None);
        self.started = self.arriving.guest.start().map_err(ReceiveError::Start)?;
        if let RunOutcome::Unknown { reason } = &self.started {
            tracing::error!("the VMM does not say whether the guest runs, and it stays here: {reason}");
        }
        self.arriving.observer.event(&Event::Running);
        Ok(())
    }
}

/// How long to wait for GO on the connection on which PREPARED was sent. The source sends it at once, or is
/// gone.
const GO_MAX: Duration = Duration::from_secs(60);

/// How long to wait for GO from a source that has reconnected.
const RECONNECT_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
