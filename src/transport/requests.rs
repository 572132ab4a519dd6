//! Messages between the two ends of a transport beside the lanes, for a
//! [`Registration`](super::Registration).

use std::time::Duration;

use super::error::TransportError;
use crate::control::{ControlChannel, ControlError};
use crate::wire::Message;

/// Sends a request to the destination's [`LaneReceiver`](super::LaneReceiver::handle). Does not wait for an
/// answer.
///
/// # Errors
/// [`TransportError::Control`] if the connection is gone, or the body longer than
/// [`TRANSPORT_BODY_MAX`](crate::wire::TRANSPORT_BODY_MAX).
pub fn send_request(body: Vec<u8>, control: &mut ControlChannel) -> Result<(), TransportError> {
    Ok(control.send(&Message::Transport(body))?)
}

/// Waits for the answer to the oldest [request](send_request) that has one and was not answered yet, such as
/// `expected`.
///
/// # Errors
/// [`TransportError`] if no answer comes in time, or if the lanes or the attempt have failed at the
/// destination.
pub fn await_answer(
    expected: &'static str,
    limit: Duration,
    control: &mut ControlChannel,
) -> Result<Vec<u8>, TransportError> {
    match control.receive(expected, Some(limit))? {
        Message::Transport(body) => Ok(body),
        Message::Abort(_, reason) => Err(TransportError::PeerGaveUp(reason)),
        Message::LanesFailed(_, reason) => Err(TransportError::FailedThere(reason)),
        other => Err(ControlError::Unexpected { expected, got: other.name() }.into()),
    }
}
