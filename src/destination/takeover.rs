//! A ready guest with a lost or slow source: the source may have given it away, so it is held.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::error::ReceiveError;
use super::options::Options;
use super::pending::ArrivalPhase;
use crate::control::{ControlChannel, ControlError};
use crate::session::{Reconnect, TICK};
use crate::wire::{AttemptId, Message};

/// The state of holding a guest.
#[derive(Debug)]
pub(super) struct Hold {
    until: Instant,
    held: Duration,
    /// How the source was lost.
    error: ControlError,
    /// Whether the connection of the attempt may still bring GO, Abort, or the source's keepalives.
    connected: bool,
}

/// An event that ends or interrupts a wait for the source.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message of the source on its connection.
    Message(Message),
    /// A message of the source on a new connection.
    Reconnect(ControlChannel, Message),
    /// The source asks about its guest, and awaits the answer.
    Question(ControlChannel, AttemptId),
    /// The operator's word that the source is fenced.
    Fenced,
}

impl Hold {
    /// Holds a guest, which was ready at that time, after this loss of its source.
    pub(super) fn new(prepared: Instant, error: ControlError, options: &Options) -> Self {
        let held = options.takeover_timeout;
        let until = prepared + held;
        tracing::warn!("the source is lost, the guest is ready and held for {} s: {error}", held.as_secs());
        options.pending.set(ArrivalPhase::Kept { until }, options.lock.clone());
        let connected = matches!(error, ControlError::Timeout { .. });
        Self { until, held, error, connected }
    }

    /// Waits for the source, on its connection if that still stands, and on new ones; or for the operator's
    /// word.
    pub(super) fn wait(
        &mut self,
        control: &mut ControlChannel,
        reconnects: &mpsc::Receiver<Reconnect>,
        Options { pending, .. }: &Options,
    ) -> Option<Heard> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            match reconnects.recv_timeout(left.min(TICK)) {
                Ok(Reconnect { control, message }) => {
                    pending.contradict();
                    return Some(match message {
                        Message::Ask(attempt_id) => Heard::Question(control, attempt_id),
                        message => Heard::Reconnect(control, message),
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
                // The acceptor has ended; the operator's word may still come.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
            if self.connected {
                match control.receive("GO", Some(left.min(TICK))) {
                    Ok(message) => {
                        pending.contradict();
                        return Some(Heard::Message(message));
                    }
                    Err(ControlError::Timeout { .. }) => {}
                    Err(_) => self.connected = false,
                }
            }
            // A connection that stands is a sign of life: its keepalives come every second.
            if self.connected {
                pending.contradict();
            } else if pending.take_word() {
                return Some(Heard::Fenced);
            }
        }
    }

    /// Why the guest is given up in the end.
    pub(super) fn into_error(self) -> ReceiveError {
        ReceiveError::NoGo { held: self.held, error: self.error }
    }
}
