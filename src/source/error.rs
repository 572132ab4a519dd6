//! Why a migration failed, and where the guest is then.

use std::fmt;
use std::time::Duration;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use super::doubt::Doubt;
use super::verdict::OpenError;
use crate::control::ControlError;
use crate::dirty::DirtyError;
use crate::error_code::coded;
use crate::guest::GuestError;
use crate::handover::HandoverError;
use crate::lock::LockError;
use crate::memory::{MemoryError, RamChange};
use crate::panics::Panicked;
use crate::session::SessionError;
use crate::state::StateError;
use crate::transport::TransportError;
use crate::wire::Refusal;

/// A migration that did not succeed: where the guest is now, and why.
#[derive(Debug)]
#[non_exhaustive]
pub struct MigrationError {
    /// Where the guest is.
    pub guest: GuestIs,
    /// Whether it ended before a page was sent.
    pub refused: bool,
    /// Why.
    pub cause: MigrationFailure,
    /// For a guest [in doubt](GuestIs::InDoubt): the means to keep asking the destination.
    pub doubt: Option<Box<Doubt>>,
}

impl fmt::Display for MigrationError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.cause, self.guest)
    }
}

impl std::error::Error for MigrationError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Where a guest is after a failed migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestIs {
    /// At the source, running as before.
    RunningAtSource,
    /// At the source and paused, because its VMM could not resume it.
    PausedAtSource,
    /// At the source, under its VMM, which does not know whether it runs
    /// ([`RunOutcome::Unknown`](crate::guest::RunOutcome::Unknown)). It does not run at the destination.
    UnknownAtSource,
    /// Paused at the source, and perhaps running at the destination: the source cannot know, and does not
    /// guess.
    InDoubt,
}

impl fmt::Display for GuestIs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::RunningAtSource => "the guest runs on at the source",
            Self::PausedAtSource => "the guest is paused at the source, which could not resume it",
            Self::UnknownAtSource => {
                "the guest is at the source, in the hands of its VMM, which was to resume it and does not say whether \
                 it runs: ask the VMM, and resume the guest there if it is paused"
            }
            Self::InDoubt => {
                "in doubt: the guest is paused at the source and may be running at the destination, which is asked until \
                 it answers"
            }
        })
    }
}

/// Why a migration did not succeed.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(MigrationFailureKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum MigrationFailure {
    /// The destination refuses the guest.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The destination gave up, and states that it has not run the guest of this attempt and never will.
    #[error("the destination gave up: {0}")]
    DestinationFailed(String),
    /// The rounds did not come down to the downtime limit.
    #[error("given up after {rounds} rounds: {why}; it would take {help}")]
    NotConverging {
        /// The reason.
        why: String,
        /// Possible remedies.
        help: String,
        /// The guest's rate of newly dirty pages in the last round.
        dirty_rate_mbps: f64,
        /// The link's throughput; `None` if nothing was sent.
        throughput_mbps: Option<f64>,
        /// Rounds so far.
        rounds: u32,
        /// The downtime of a switch now; `None` without enough data.
        predicted_downtime_ms: Option<f64>,
    },
    /// The time limit passed in the middle of a round.
    #[error("the migration was to take {} s and was still in its rounds: allow more time, or a switch at its end", timeout.as_secs_f64())]
    TimedOut {
        /// The time limit.
        timeout: Duration,
    },
    /// The state of vCPUs and devices is longer than one of the ends allows. The length was checked while the
    /// guest could still resume.
    #[error("the saved state of the guest has {} MiB or more, and {limit}", state_bytes.div_ceil(1 << 20))]
    StateTooLong {
        /// Its expected length, or a lower bound of its actual length.
        state_bytes: u64,
        /// The limit that it exceeds.
        limit: StateLimit,
    },
    /// The operator cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The source's state cannot be stored.
    #[error(transparent)]
    State(#[from] StateError),
    /// The record that the guest is given away failed, so it is not given away; the record that it is kept
    /// failed too, so it stays paused.
    #[error(
        "the guest was not given away, and stays paused until that is recorded or the destination has refused it: {0}"
    )]
    Unrecorded(#[source] StateError),
    /// The lock that arbitrates between the hosts.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The guest belongs to the source again, but its lock does not.
    #[error("{cause}; so the guest is the source's again, but stays paused: {error}")]
    LockLost {
        /// Why the migration failed.
        cause: String,
        /// Why the lock cannot be taken.
        error: LockError,
    },
    /// A thread of the migration, or the VMM in it, panicked.
    #[error("a defect of sterna or of the VMM ended it: {0}")]
    Panicked(String),
    /// The control channel failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The lanes failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The dirty log failed.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// An error of guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory was plugged or unplugged after the migration had begun; the destination's guest lacks the
    /// change.
    #[error("{0} while the guest migrated: migrate it once its memory stays as it is")]
    RamChanged(RamChange),
    /// The VMM failed.
    #[error("the VMM failed: {0}")]
    Guest(#[from] GuestError),
    /// A message out of turn in the handover.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The system has no more threads or no randomness.
    #[error("the system refused {what}: {error}")]
    System {
        /// The resource.
        what: &'static str,
        /// The system's answer.
        error: String,
    },
}

coded!(MigrationFailure, MigrationFailureKind, "migration", via Refused, State, Lock, Control, Transport, Dirty, Memory, Handover);

impl MigrationFailure {
    /// The error itself, or the cause that `explain` finds if the connection or the lanes failed.
    pub(crate) fn explained(self, explain: impl FnOnce(SessionError) -> SessionError) -> Self {
        match self {
            Self::Control(error) => explain(error.into()).into(),
            Self::Transport(error) => explain(error.into()).into(),
            cause => cause,
        }
    }
}

impl From<SessionError> for MigrationFailure {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Refused(refusal) => Self::Refused(refusal),
            SessionError::GaveUp { reason, .. } => Self::DestinationFailed(reason),
            SessionError::LanesFailed(reason) => TransportError::FailedThere(reason).into(),
            SessionError::OutOfTurn(got) => ControlError::Unexpected { expected: "an answer", got }.into(),
            SessionError::Cancelled => Self::Cancelled,
            SessionError::TimedOut { timeout } => Self::TimedOut { timeout },
            SessionError::Panicked(text) => Self::Panicked(text),
            SessionError::Control(error) => error.into(),
            SessionError::Transport(error) => error.into(),
            SessionError::Dirty(error) => error.into(),
            SessionError::Memory(error) => error.into(),
            SessionError::System { what, error } => Self::System { what, error },
            SessionError::Accept(error) => Self::System { what: "a socket", error: error.to_string() },
        }
    }
}

impl From<Panicked> for MigrationFailure {
    fn from(Panicked(text): Panicked) -> Self {
        Self::Panicked(text)
    }
}

/// The longest saved state that one of the ends carries, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StateLimit {
    /// The source's limit for sending.
    #[error("this side sends at most {}", mebibytes(*.0))]
    Source(u64),
    /// The destination's limit.
    #[error(
        "the destination takes at most {}",
        mebibytes(*.0)
    )]
    Destination(u64),
}

impl StateLimit {
    /// The limit in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Source(bytes) | Self::Destination(bytes) => bytes,
        }
    }
}

fn mebibytes(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) { format!("{} MiB", bytes >> 20) } else { format!("{bytes} bytes") }
}

impl From<OpenError> for MigrationFailure {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::State(error) => error.into(),
            OpenError::Handover(error) => error.into(),
        }
    }
}
