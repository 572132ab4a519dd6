//! Why a session of two hosts ended: failures that a guest and a file share.

use std::io;
use std::time::Duration;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::control::ControlError;
use crate::dirty::DirtyError;
use crate::error_code::coded;
use crate::handover::Side;
use crate::memory::MemoryError;
use crate::panics::Panicked;
use crate::transport::TransportError;
use crate::wire::Refusal;

/// A failure of the connection, of the lanes, or of the peer.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(SessionErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SessionError {
    /// The listening socket failed.
    #[error("the listening socket failed: {0}")]
    Accept(#[source] io::Error),
    /// The destination refuses the guest or the file.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The other side ended the attempt.
    #[error("the {} gave up: {reason}", name(*.side))]
    GaveUp {
        /// The side that ended it.
        side: Side,
        /// Its reason.
        reason: String,
    },
    /// The source sent a message out of turn.
    #[error("the source sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// The lanes failed, and the source continues over others.
    #[error("the lanes failed, and what had arrived was discarded: {0}")]
    LanesFailed(String),
    /// The operator cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The time limit passed in the middle of a round.
    #[error("the migration was to take {} s and was still in its rounds: allow more time, or a switch at its end", timeout.as_secs_f64())]
    TimedOut {
        /// The time limit.
        timeout: Duration,
    },
    /// A thread of the migration panicked.
    #[error("a defect of sterna or of the VMM ended it: {0}")]
    Panicked(String),
    /// The control channel failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The lanes failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The dirty log, or its substitute for a file.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// Guest RAM, or the mapping of a file.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The system has no more threads or no randomness.
    #[error("the system refused {what}: {error}")]
    System {
        /// The resource.
        what: &'static str,
        /// The system's answer.
        error: String,
    },
}

coded!(SessionError, SessionErrorKind, "session", via Refused, Control, Transport, Dirty, Memory);

impl SessionError {
    /// The destination ended the attempt.
    pub(crate) fn destination_gave_up(reason: String) -> Self {
        Self::GaveUp { side: Side::Destination, reason }
    }

    /// The source ended the attempt.
    pub(crate) fn source_gave_up(reason: String) -> Self {
        Self::GaveUp { side: Side::Source, reason }
    }

    /// Whether the lanes failed in a way that other lanes may avoid.
    pub(crate) fn may_fall_back(&self) -> bool {
        matches!(self, Self::Transport(error) if error.may_fall_back())
    }
}

impl From<Panicked> for SessionError {
    fn from(Panicked(text): Panicked) -> Self {
        Self::Panicked(text)
    }
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}
