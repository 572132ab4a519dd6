//! What a connection that was just accepted wants.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::error::SessionError;
use crate::control::{ControlChannel, ControlError, greet, read_preamble};
use crate::transport::LaneConnection;
use crate::wire::{Message, Refusal, Role, Token};

/// A connection that has said what it is.
#[derive(Debug)]
pub(super) enum Greeting {
    /// A lane of the attempt that has this token.
    Lane(Token, LaneConnection),
    /// A source, and the first thing that it says.
    Control(Box<ControlChannel>, Message),
}

/// Reads what a connection wants, for each part of which it has `limit`. A peer that cannot be understood is answered and turned
/// away.
pub(super) fn read_greeting(mut stream: TcpStream, from: SocketAddr, limit: Duration) -> Option<Greeting> {
    let preamble = match read_preamble(&mut stream, limit) {
        Ok(preamble) => preamble,
        Err(error) => {
            tracing::warn!("{from} was turned away: {error}");
            // In this side's own terms, so that a peer of another version can name both.
            let _ = greet(&stream);
            return None;
        }
    };
    if let Role::Lane(lane) = preamble.role {
        return Some(Greeting::Lane(preamble.token, LaneConnection { lane, stream, from }));
    }
    match first_message(stream, limit) {
        Ok((control, message)) => Some(Greeting::Control(Box::new(control), message)),
        Err(error) => {
            tracing::warn!("{from} was turned away: {error}");
            None
        }
    }
}

/// What a source says first, on a connection whose preamble was read. One that cannot be understood is refused.
pub(super) fn first_message(
    stream: TcpStream,
    limit: Duration,
) -> Result<(ControlChannel, Message), SessionError> {
    let mut control = ControlChannel::answer(stream)?;
    match control.receive("HELLO", Some(limit)) {
        Ok(message) => Ok((control, message)),
        Err(error) => {
            if let ControlError::Wire(error) = &error {
                let _ = control.send(&Message::Refused(Refusal::Incompatible(error.to_string())));
            }
            Err(error.into())
        }
    }
}
