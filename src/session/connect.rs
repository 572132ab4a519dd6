//! Connecting to a destination.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use sterna_trust::Right;

use super::cancel::Cancel;
use super::error::SessionError;
use crate::control::{ControlChannel, Security};
use crate::wire::AttemptId;

/// Connects to a destination, which must be allowed to do `right`. From then on `cancel` ends every wait
/// for it.
pub(crate) fn connect(
    to: &str,
    (security, right): (&Security, Right),
    cancel: &Cancel,
) -> Result<ControlChannel, SessionError> {
    let (send, connected) = mpsc::channel();
    let (address, security) = (to.to_owned(), security.clone());
    // In a thread of its own: neither a resolver nor connect(2) can be interrupted. The thread ends by their
    // own time limits.
    thread::Builder::new()
        .name("connect".into())
        .spawn(move || send.send(ControlChannel::connect(&address, &security)))
        .map_err(|error| SessionError::System { what: "a thread", error: error.to_string() })?;
    let control = loop {
        cancel.check()?;
        match connected.recv_timeout(NAP_MAX) {
            Ok(connected) => break connected?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(SessionError::Panicked("the thread that connects has ended".into()));
            }
        }
    };
    control.check_may(right)?;
    cancel.ends_waits_for(control.liveness())?;
    Ok(control)
}

/// A random identity for an attempt.
pub(crate) fn new_attempt_id() -> Result<AttemptId, SessionError> {
    let mut attempt_id = AttemptId([0; 16]);
    getrandom::fill(&mut attempt_id.0)
        .map_err(|error| SessionError::System { what: "random bytes", error: error.to_string() })?;
    Ok(attempt_id)
}

/// The longest sleep between two checks for a cancellation.
pub(super) const NAP_MAX: Duration = Duration::from_millis(50);
