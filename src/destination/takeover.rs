//! A guest that is ready and whose source is lost or slow: it may have been given away, so it is held.

use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use super::error::ReceiveError;
use super::pending::ArrivalPhase;
use super::switch::Switch;
use crate::control::ControlError;
use crate::guest::DestinationGuest;
use crate::handover::DestinationEvent;
use crate::session::TICK;
use crate::wire::Message;

/// How a guest is held.
#[derive(Debug)]
pub(super) struct Hold {
    until: Instant,
    held: Duration,
    /// How the source was lost.
    error: ControlError,
    /// Whether more may come on the connection of the attempt: GO or Abort, and the source's keepalives.
    connected: bool,
}

impl<G: DestinationGuest> Switch<'_, '_, G> {
    /// Holds the guest, which was ready at that time, after its source was lost in this way.
    pub(super) fn hold(&mut self, prepared: Instant, error: ControlError) {
        let held = self.arriving.options.takeover_timeout;
        let until = prepared + held;
        tracing::warn!("the source is lost, the guest is ready and held for {} s: {error}", held.as_secs());
        let lock = self.arriving.options.lock.clone();
        self.arriving.options.pending.set(ArrivalPhase::Kept { until }, lock);
        let connected = matches!(error, ControlError::Timeout { .. });
        self.hold = Some(Hold { until, held, error, connected });
    }

    /// Waits for the source, on the connection that it has if that still stands, and on new ones; or for the operator's word.
    pub(super) fn await_takeover(&mut self) -> Result<DestinationEvent, ReceiveError> {
        let pending = self.arriving.options.pending.clone();
        let Some(mut hold) = self.hold.take() else { return Ok(DestinationEvent::Failed) };
        loop {
            let left = hold.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let Hold { held, error, .. } = hold;
                return Err(ReceiveError::NoGo { held, error });
            }
            match self.reconnects.recv_timeout(left.min(TICK)) {
                Ok(reconnect) => {
                    pending.contradict();
                    if let Message::Ask(attempt_id) = reconnect.message {
                        (self.asking, self.hold) = (Some(reconnect.control), Some(hold));
                        return Ok(DestinationEvent::Asked(attempt_id));
                    }
                    *self.control = reconnect.control;
                    return self.heard(reconnect.message);
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Nothing accepts any more; the operator's word may still come.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
            if hold.connected {
                match self.control.receive("GO", Some(left.min(TICK))) {
                    Ok(message) => {
                        pending.contradict();
                        return self.heard(message);
                    }
                    Err(ControlError::Timeout { .. }) => {}
                    Err(_) => hold.connected = false,
                }
            }
            // A connection that stands is a sign of life: its keepalives come every second.
            if hold.connected {
                pending.contradict();
            } else if pending.take_word() {
                self.go = Instant::now();
                return Ok(DestinationEvent::Fenced);
            }
        }
    }
}
