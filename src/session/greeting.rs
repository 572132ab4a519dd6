//! The purpose of a new connection.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::error::SessionError;
use crate::control::{ControlChannel, ControlError, greet, read_preamble};
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

/// Reads a connection's purpose; each part may take `limit`. A peer that sends invalid bytes gets an answer
/// and is turned away.
pub(super) fn read_greeting(mut stream: TcpStream, from: SocketAddr, limit: Duration) -> Option<Greeting> {
    let preamble = match read_preamble(&mut stream, limit) {
        Ok(preamble) => preamble,
        Err(error) => {
            tracing::warn!("{from} was turned away: {error}");
            // With this side's own version, so that a peer of another version can name both.
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

/// A source's first message, on a connection with its preamble already read. An invalid message is refused.
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
