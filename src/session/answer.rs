//! The destination's answers while pages arrive.

use std::time::{Duration, Instant};

use super::error::SessionError;
use crate::control::{ControlChannel, ControlError};
use crate::transport::{LaneReceiver, TransportError};
use crate::wire::{AttemptId, Final, Message};

/// Answers the source's requests until FINAL. About once a second `check` may end that. Calls `closed` for
/// each complete round; `other` takes the messages that are not about pages, digests and saved state, or
/// refuses them.
pub(crate) fn answer_rounds<E: From<SessionError>>(
    (lane_receiver, control): (&mut dyn LaneReceiver, &mut ControlChannel),
    check: impl Fn() -> Result<(), E>,
    closed: impl Fn(u32),
    mut other: impl FnMut(&mut ControlChannel, Message) -> Result<(), E>,
) -> Result<Final, E> {
    let mut checked = Instant::now();
    loop {
        if checked.elapsed() >= CHECKS_EVERY {
            check()?;
            checked = Instant::now();
        }
        match answer_one(lane_receiver, control)? {
            Answered::Done => {}
            Answered::RoundClosed(round) => closed(round),
            Answered::Final(last) => return Ok(last),
            Answered::Other(message) => other(control, message)?,
        }
    }
}

/// The kind of a message.
enum Answered {
    Done,
    RoundClosed(u32),
    Final(Final),
    Other(Message),
}

fn answer_one(
    lane_receiver: &mut dyn LaneReceiver,
    control: &mut ControlChannel,
) -> Result<Answered, SessionError> {
    // A round may take hours; keepalives show that the source is alive.
    let message = match control.receive("the next round", Some(CHECKS_EVERY)) {
        Err(ControlError::Timeout { .. }) => return Ok(Answered::Done),
        received => received?,
    };
    match message {
        Message::Transport(request) => {
            if let Some(answer) = lane_receiver.handle(&request)? {
                control.send(&Message::Transport(answer))?;
            }
        }
        Message::RoundClosed(round) => {
            lane_receiver.await_round(round)?;
            return Ok(Answered::RoundClosed(round));
        }
        Message::Final(last) => {
            lane_receiver.await_round(last.round)?;
            return Ok(Answered::Final(last));
        }
        Message::LanesFailed(_, reason) => return Err(SessionError::LanesFailed(reason)),
        message @ (Message::BlockDigests(_) | Message::State(_)) => return Ok(Answered::Other(message)),
        other => return Err(out_of_turn(other)),
    }
    Ok(Answered::Done)
}

/// Reports to the source that the lanes failed at this side, after their ends are gone; returns the source's
/// reaction.
pub(crate) fn await_other_lanes(
    control: &mut ControlChannel,
    attempt_id: AttemptId,
    error: &TransportError,
) -> SessionError {
    if let Err(error) = control.send(&Message::LanesFailed(attempt_id, error.to_string())) {
        return error.into();
    }
    loop {
        // The source notices at its next write; keepalives show that it is alive.
        match control.receive("word of other lanes", None) {
            Ok(Message::LanesFailed(_, reason)) => return SessionError::LanesFailed(reason),
            // Messages that were already in flight.
            Ok(
                Message::Transport(_)
                | Message::RoundClosed(_)
                | Message::Digests(_)
                | Message::BlockDigests(_)
                | Message::State(_)
                | Message::Final(_),
            ) => {}
            Ok(other) => return out_of_turn(other),
            Err(error) => return error.into(),
        }
    }
}

/// Why a source sent a message out of turn: it gave up, or it is defective.
pub(crate) fn out_of_turn(message: Message) -> SessionError {
    match message {
        Message::Abort(_, reason) => SessionError::source_gave_up(reason),
        other => SessionError::OutOfTurn(other.name()),
    }
}

/// How often the destination looks at its own machine.
const CHECKS_EVERY: Duration = Duration::from_millis(500);
