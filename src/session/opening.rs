//! Step 1 at the destination, for a guest or a file: it answers openings until one offers lanes that this
//! host has.

use std::fmt::Display;
use std::time::Duration;

use super::answer::out_of_turn;
use super::error::SessionError;
use crate::control::ControlChannel;
use crate::panics::{Panicked, caught_or};
use crate::transport::TransportError;
use crate::wire::{AttemptId, Hello, ImageOffer, Message, Refusal};

/// A message by which a source describes what it brings.
pub(crate) trait Opening: Sized {
    /// The name of the awaited message when the source may open anew.
    const NEXT: &'static str;
    /// The answer to other kinds of sources.
    const OTHERS: Refusal;

    /// Extracts this kind of opening from a message.
    fn of(message: Message) -> Result<Self, Box<Message>>;

    fn attempt_id(&self) -> AttemptId;
}

impl Opening for Hello {
    const NEXT: &'static str = "another HELLO";
    const OTHERS: Refusal = Refusal::OnlyGuests;

    fn of(message: Message) -> Result<Self, Box<Message>> {
        match message {
            Message::Hello(hello) => Ok(hello),
            other => Err(Box::new(other)),
        }
    }

    fn attempt_id(&self) -> AttemptId {
        self.attempt_id
    }
}

impl Opening for ImageOffer {
    const NEXT: &'static str = "another offer";
    const OTHERS: Refusal = Refusal::OnlyImages;

    fn of(message: Message) -> Result<Self, Box<Message>> {
        match message {
            Message::OfferImage(offer) => Ok(offer),
            other => Err(Box::new(other)),
        }
    }

    fn attempt_id(&self) -> AttemptId {
        self.attempt_id
    }
}

/// An error of an arrival, which may be a refusal.
pub(crate) trait ArrivalError: From<SessionError> + From<Panicked> + Display {
    /// # Errors
    /// The error itself if it is no refusal.
    fn into_refusal(self) -> Result<Refusal, Self>;
}

/// Prepares for the content of an opening. A refused source that may choose offers other lanes on the same
/// connection, and `opening` becomes that offer.
pub(crate) fn prepare_any<O: Opening, T, E: ArrivalError>(
    opening: &mut O,
    control: &mut ControlChannel,
    mut prepare: impl FnMut(&O, &mut ControlChannel) -> Result<T, E>,
) -> Result<T, E> {
    loop {
        let error = match caught_or(|| prepare(opening, control)) {
            Ok(prepared) => return Ok(prepared),
            Err(error) => error,
        };
        let refusal = match error.into_refusal() {
            Ok(refusal) => refusal,
            Err(error) => {
                let _ = control.send(&Message::Abort(opening.attempt_id(), error.to_string()));
                return Err(error);
            }
        };
        control.send(&Message::Refused(refusal.clone())).map_err(SessionError::from)?;
        let again = matches!(refusal, Refusal::Transport(_)).then(|| next_opening(control));
        let Some(Ok(next)) = again else { return Err(SessionError::Refused(refusal).into()) };
        *opening = next;
    }
}

/// The opening of an attempt over other lanes, on the same connection.
pub(crate) fn next_opening<O: Opening>(control: &mut ControlChannel) -> Result<O, SessionError> {
    O::of(control.receive(O::NEXT, Some(HELLO_MAX))?).map_err(|other| out_of_turn(*other))
}

/// Why the lanes do not connect: the source's reason, if it gave one, explains more than a broken connection.
pub(crate) fn explain_lanes(error: TransportError, control: &mut ControlChannel) -> SessionError {
    let said = matches!(error, TransportError::Control(_))
        .then(|| control.receive("the source's reason", Some(Duration::ZERO)));
    match said {
        Some(Ok(Message::Abort(_, reason))) => SessionError::source_gave_up(reason),
        _ => error.into(),
    }
}

/// How long a peer that connects may take to send its opening: it has nothing to wait for.
pub(crate) const HELLO_MAX: Duration = Duration::from_secs(5);
