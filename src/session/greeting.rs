//! The purpose of a new connection.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use sterna_trust::Right;

use super::error::SessionError;
use crate::control::{
    ControlChannel, ControlError, Greeted, Security, answer_stranger, greet, read_lane_opening, read_preamble,
};
use crate::transport::LaneConnection;
use crate::wire::{Message, Refusal, Role, Token};

/// A connection that has identified itself.
#[derive(Debug)]
pub(super) enum Greeting {
    /// A lane of the attempt with this token.
    Lane(Token, LaneConnection),
    /// A source, and its first message.
    Control(Box<ControlChannel>, Message),
}

/// Reads a connection's purpose; each part may take `limit`. A peer that sends invalid bytes, or is not
/// trusted, gets an answer.
pub(super) fn read_greeting(
    stream: TcpStream,
    from: SocketAddr,
    security: &Security,
    limit: Duration,
) -> Result<Greeting, SessionError> {
    match greeted(stream, security, limit)? {
        (Role::Lane, greeted) => Ok(read_lane(greeted, from, limit)?),
        (Role::Control, greeted) => {
            let (control, message) = first_message(greeted, limit)?;
            Ok(Greeting::Control(Box::new(control), message))
        }
    }
}

/// The opening of a connection that must be a control channel.
pub(super) fn first_of_source(
    stream: TcpStream,
    security: &Security,
    limit: Duration,
) -> Result<(ControlChannel, Message), SessionError> {
    match greeted(stream, security, limit)? {
        (Role::Control, greeted) => first_message(greeted, limit),
        (Role::Lane, _) => Err(SessionError::OutOfTurn("a data lane")),
    }
}

fn greeted(
    mut stream: TcpStream,
    security: &Security,
    limit: Duration,
) -> Result<(Role, Greeted), SessionError> {
    let preamble = read_preamble(&mut stream, limit).inspect_err(|_| answer_stranger(&stream))?;
    Ok((preamble.role, greet(stream, preamble, security, limit)?))
}

fn read_lane(greeted: Greeted, from: SocketAddr, limit: Duration) -> Result<Greeting, ControlError> {
    let identity = greeted.identity();
    let Greeted { mut stream, .. } = greeted;
    let opening = read_lane_opening(&mut stream, limit)?;
    Ok(Greeting::Lane(opening.token(), LaneConnection { lane: opening.lane, stream, from, identity }))
}

/// A source's first message. One that is invalid, or that the source's host may not send, is refused.
fn first_message(greeted: Greeted, limit: Duration) -> Result<(ControlChannel, Message), SessionError> {
    let mut control = ControlChannel::over(greeted)?;
    let received = control.receive("HELLO", Some(limit)).and_then(|message| {
        control.check_may(right_to(&message))?;
        Ok(message)
    });
    match received {
        Ok(message) => Ok((control, message)),
        Err(error) => {
            let refusal = match &error {
                ControlError::Wire(error) => Some(Refusal::Incompatible(error.to_string())),
                ControlError::NotAllowed { .. } => Some(Refusal::NotAllowed),
                _ => None,
            };
            if let Some(refusal) = refusal {
                let _ = control.send(&Message::Refused(refusal));
            }
            Err(error.into())
        }
    }
}

/// What a host needs to begin with this message. Other messages are refused for themselves.
fn right_to(message: &Message) -> Right {
    match message {
        Message::Hello(_) => Right::Send,
        Message::OfferImage(_) => Right::Images,
        _ => Right::Ask,
    }
}
