//! The socket at which sources connect.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::SockRef;

use super::cancel::Cancel;
use super::error::SessionError;
use super::opening::{HELLO_MAX, Opening};
use super::outcome::outcome;
use crate::control::{ControlChannel, ControlError, greet, read_preamble};
use crate::state::HostState;
use crate::wire::{AttemptId, Message, Outcome, Refusal, Role};

/// A listening socket, and the records from which sources in doubt get an answer.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    state: HostState,
}

impl Listener {
    pub(crate) fn new(socket: TcpListener, state: HostState) -> Self {
        Self { socket, state }
    }

    pub(crate) fn socket(&self) -> &TcpListener {
        &self.socket
    }

    pub(crate) fn state(&self) -> &HostState {
        &self.state
    }

    pub(crate) fn local_address(&self) -> Result<SocketAddr, SessionError> {
        self.socket.local_addr().map_err(SessionError::Accept)
    }

    /// Waits for a source that brings this kind of thing. Sources that bring the other kind are refused.
    pub(crate) fn await_opening<O: Opening>(
        &self,
        cancel: &Cancel,
    ) -> Result<(ControlChannel, O), SessionError> {
        loop {
            cancel.check()?;
            let Some(mut control) = self.accept_within(Some(TICK), HELLO_MAX)? else { continue };
            let from = control.peer_address();
            let refusal = match control.receive("HELLO", Some(HELLO_MAX)).map(O::of) {
                Ok(Ok(opening)) => return Ok((control, opening)),
                Ok(Err(other)) => match *other {
                    Message::Ask(attempt_id) => {
                        self.answer(&mut control, attempt_id);
                        None
                    }
                    other => {
                        tracing::warn!("{from} began with {} and was turned away", other.name());
                        matches!(other, Message::Hello(_) | Message::OfferImage(_)).then_some(O::OTHERS)
                    }
                },
                Err(error) => {
                    tracing::warn!("{from} was turned away: {error}");
                    match error {
                        ControlError::Wire(error) => Some(Refusal::Incompatible(error.to_string())),
                        _ => None,
                    }
                }
            };
            if let Some(refusal) = refusal {
                let _ = control.send(&Message::Refused(refusal));
            }
        }
    }

    /// The next control connection, if one comes within this time. A peer that connects has `greeting_max` to say what it is.
    pub(crate) fn accept_within(
        &self,
        limit: Option<Duration>,
        greeting_max: Duration,
    ) -> Result<Option<ControlChannel>, SessionError> {
        // accept(2) heeds the receive timeout.
        SockRef::from(&self.socket).set_read_timeout(limit).map_err(SessionError::Accept)?;
        let (mut stream, from) = match self.socket.accept() {
            Ok(accepted) => accepted,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(SessionError::Accept(error)),
        };
        match read_preamble(&mut stream, greeting_max) {
            Ok(preamble) if preamble.role == Role::Control => match ControlChannel::answer(stream) {
                Ok(control) => return Ok(Some(control)),
                Err(error) => tracing::warn!("{from} went away: {error}"),
            },
            Ok(_) => tracing::warn!("{from} brings a data lane that no migration here waits for"),
            Err(error) => {
                tracing::warn!("{from} was turned away: {error}");
                // In this side's own terms, so that a peer of another version can name both.
                let _ = greet(&stream);
            }
        }
        Ok(None)
    }

    /// What a connection brings that was accepted elsewhere.
    pub(crate) fn opening_on<O: Opening>(
        &self,
        mut stream: TcpStream,
    ) -> Result<(ControlChannel, O), SessionError> {
        if read_preamble(&mut stream, HELLO_MAX)?.role != Role::Control {
            return Err(SessionError::OutOfTurn("a data lane"));
        }
        let mut control = ControlChannel::answer(stream)?;
        let message = control.receive("HELLO", Some(HELLO_MAX))?;
        match O::of(message) {
            Ok(opening) => Ok((control, opening)),
            Err(other) => {
                self.answer_stranger(&mut control, &other);
                Err(SessionError::OutOfTurn(other.name()))
            }
        }
    }

    /// Answers sources that ask, until the one of this attempt has heard what became of its guest.
    pub(crate) fn answer_until_done(&self, attempt_id: AttemptId) {
        loop {
            let mut control = match self.accept_within(None, HELLO_MAX) {
                Ok(Some(control)) => control,
                Ok(None) => continue,
                Err(error) => {
                    tracing::warn!("sources that ask get no answer any more: {error}");
                    return;
                }
            };
            match control.receive("a question", Some(HELLO_MAX)) {
                Ok(Message::Ask(of)) => {
                    if self.answer(&mut control, of) && of == attempt_id {
                        return;
                    }
                }
                Ok(message) => self.answer_stranger(&mut control, &message),
                Err(error) => tracing::warn!("{} was turned away: {error}", control.peer_address()),
            }
        }
    }

    /// Sends a source what is on record of an attempt; whether it knows then that its guest runs here, and has recorded that.
    pub(crate) fn answer(&self, control: &mut ControlChannel, attempt_id: AttemptId) -> bool {
        let from = control.peer_address();
        let Some(outcome) = outcome(&self.state, attempt_id) else { return false };
        tracing::info!("{from} asks about attempt {attempt_id:?}: {outcome:?}");
        if let Err(error) = control.send(&Message::Outcome(attempt_id, outcome)) {
            tracing::warn!("{from} asked and went away: {error}");
            return false;
        }
        outcome == Outcome::Running
            && control.receive("DONE", Some(HELLO_MAX)).is_ok_and(|done| done == Message::Done(attempt_id))
    }

    /// Answers questions about other attempts from the records, and refuses new guests as Busy.
    pub(crate) fn answer_stranger(&self, control: &mut ControlChannel, message: &Message) {
        match message {
            Message::Ask(attempt_id) => {
                self.answer(control, *attempt_id);
            }
            Message::Hello(_) | Message::OfferImage(_) => {
                let _ = control.send(&Message::Refused(Refusal::Busy));
            }
            other => tracing::warn!("{} began with {}", control.peer_address(), other.name()),
        }
    }
}

/// How often it is looked whether the wait is over.
pub(crate) const TICK: Duration = Duration::from_millis(50);
