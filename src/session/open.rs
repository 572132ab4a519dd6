//! Opening an attempt: describes the guest or the file to a destination, and connects the lanes.

use std::time::Duration;

use super::cancel::Cancel;
use super::connect::new_attempt_id;
use super::error::SessionError;
use crate::control::{ControlChannel, ControlError, STEP_MAX};
use crate::memory::GuestRam;
use crate::transport::{Offer, Transport, TransportError, Transports, shown};
use crate::wire::{AttemptId, LaneOffer, Message, Refusal, SwitchCosts};

/// Lanes that were given up.
#[derive(Clone, Debug)]
pub(crate) struct FellBack {
    /// Their transport.
    pub(crate) from: String,
    pub(crate) why: String,
}

impl FellBack {
    pub(super) fn reason(&self) -> String {
        format!("{} failed: {}", shown(&self.from), self.why)
    }
}

/// A destination that has accepted.
pub(super) struct Opened {
    pub(super) attempt_id: AttemptId,
    pub(super) transport: Box<dyn Transport>,
    pub(super) place: usize,
    pub(super) scheme: String,
    pub(super) reason: String,
    pub(super) lanes: u8,
    pub(super) fell_back: Option<FellBack>,
    pub(super) costs_there: SwitchCosts,
}

/// Sends the `opening` that describes the guest or the file, and connects the lanes if the destination
/// accepts. If a transport fails, offers the next in the list.
pub(super) fn open(
    control: &mut ControlChannel,
    ram: &GuestRam,
    (mut offer, transports, lanes): (Offer, &Transports, Option<u8>),
    cancel: &Cancel,
    opening: impl Fn(AttemptId, LaneOffer) -> Message,
) -> Result<Opened, SessionError> {
    let mut fell_back = None;
    loop {
        let attempt_id = new_attempt_id()?;
        let (place, scheme) = (offer.place(), offer.scheme().to_owned());
        let has_next = transports.behind(place).is_some();
        control.send(&opening(attempt_id, offer.lanes()))?;
        let (ready, costs_there) = match await_ready(control, ram) {
            Ok(Message::Ready(ready, costs)) => (ready, costs),
            Ok(Message::Refused(Refusal::Transport(reason))) if has_next => {
                let reason = format!("no {}: the destination says: {reason}", shown(&scheme));
                offer = Offer::next(place, transports, (control, ram, lanes), reason)
                    .map_err(|error| give_up(control, attempt_id, error.into()))?;
                continue;
            }
            Ok(other) => return Err(unexpected("READY", attempt_id, other)),
            Err(error @ SessionError::GaveUp { .. }) => return Err(error),
            Err(error) => return Err(give_up(control, attempt_id, cancel.explain(error))),
        };
        let (reason, count) = (offer.reason().to_owned(), offer.count());
        let connected: Result<_, SessionError> =
            cancel.check().and_then(|()| Ok(offer.connect(&ready, control, ram)?));
        match connected {
            Ok(transport) => {
                let lanes = count;
                let opened =
                    Opened { attempt_id, transport, place, scheme, reason, lanes, fell_back, costs_there };
                return Ok(opened);
            }
            Err(error) if has_next && error.may_fall_back() => {
                let failed = FellBack { from: scheme, why: error.to_string() };
                control.send(&Message::LanesFailed(attempt_id, failed.why.clone()))?;
                offer = Offer::next(place, transports, (control, ram, lanes), failed.reason())
                    .map_err(|error| give_up(control, attempt_id, error.into()))?;
                fell_back = Some(failed);
            }
            Err(error) => return Err(give_up(control, attempt_id, cancel.explain(error))),
        }
    }
}

/// Tells a destination that has reserved everything, or is about to, that nothing will come. It may also be
/// gone.
pub(super) fn give_up(
    control: &mut ControlChannel,
    attempt_id: AttemptId,
    error: SessionError,
) -> SessionError {
    let _ = control.send(&Message::Abort(attempt_id, error.to_string()));
    error
}

/// How long a destination may take to start a process for the guest.
const STARTS_WITHIN: Duration = Duration::from_secs(40);

/// The answer to an opening, after any messages still in flight from an attempt with failed lanes.
fn await_ready(control: &mut ControlChannel, ram: &GuestRam) -> Result<Message, SessionError> {
    // The destination first ends that attempt: it releases RAM, which no guest waits for, and may be hashing
    // its part of a file, for which 16 MiB/s is slow.
    let limit = STEP_MAX + STARTS_WITHIN + Duration::from_secs(ram.layout().total_bytes() >> 24);
    loop {
        match control.receive("READY", Some(limit))? {
            Message::Transport(_) | Message::Digests(_) | Message::Checked(_) | Message::LanesFailed(..) => {}
            Message::Abort(_, reason) => return Err(SessionError::destination_gave_up(reason)),
            answer => return Ok(answer),
        }
    }
}

/// Why the destination sent another message than `expected`.
pub(crate) fn unexpected(expected: &'static str, attempt_id: AttemptId, got: Message) -> SessionError {
    match got {
        Message::Refused(refusal) => refusal.into(),
        Message::Abort(of, text) if of == attempt_id => SessionError::destination_gave_up(text),
        // Not the destination's last message about the guest.
        Message::LanesFailed(of, text) if of == attempt_id => TransportError::FailedThere(text).into(),
        got => ControlError::Unexpected { expected, got: got.name() }.into(),
    }
}
