//! Why a guest did not arrive.

use std::io;
use std::time::Duration;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::control::ControlError;
use crate::error_code::coded;
use crate::guest::GuestError;
use crate::handover::HandoverError;
use crate::lock::LockError;
use crate::memory::MemoryError;
use crate::panics::Panicked;
use crate::saved_state::SavedStateError;
use crate::session::{ArrivalError, Cancel, SessionError};
use crate::state::StateError;
use crate::transport::TransportError;
use crate::verify::CheckError;
use crate::wire::Refusal;

/// Why a guest did not arrive: it is at the source.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(ReceiveErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The address to listen on is unavailable.
    #[error("cannot listen at {address}: {error}; choose a free port of an address of this host")]
    Listen {
        /// The address.
        address: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The listening socket failed.
    #[error("the listening socket failed: {0}")]
    Accept(#[source] io::Error),
    /// This host refuses the guest.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The source ended the migration.
    #[error("the source gave up: {0}")]
    SourceGaveUp(String),
    /// The source sent a message out of turn.
    #[error("the source sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// The lanes failed, and the source continues over others.
    #[error("the lanes failed, and what had arrived was discarded: {0}")]
    LanesFailed(String),
    /// The memory differs from the source's.
    #[error(
        "{blocks} of {of} blocks of memory differ from the source's, the first at page {first_page} of region {region}"
    )]
    MemoryDiffers {
        /// How many 2 MiB blocks differ.
        blocks: usize,
        /// The number of blocks.
        of: usize,
        /// The region of the first.
        region: usize,
        /// Its first page in that region.
        first_page: u64,
    },
    /// The guest was handed over, but no vCPU could be started.
    #[error("this host could not start the guest, and hands it back: {0}")]
    Start(#[source] GuestError),
    /// The guest was ready, but its source was lost and did not come back.
    #[error("the guest was ready and held for {} s, and no GO came: {error}; it is given up here, and the source's", held.as_secs())]
    NoGo {
        /// How long it was held.
        held: Duration,
        /// How the source was lost.
        error: ControlError,
    },
    /// The state, without which no guest may run.
    #[error(transparent)]
    State(#[from] StateError),
    /// The lock, without which the guest may not run on this host.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The control channel failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The lanes failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// An error of guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The saved state.
    #[error(transparent)]
    SavedState(#[from] SavedStateError),
    /// The VMM failed.
    #[error("the VMM failed: {0}")]
    Guest(#[from] GuestError),
    /// A message out of turn in the handover.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The operator cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Any other failure between two hosts.
    #[error(transparent)]
    Session(SessionError),
    /// A thread of the migration, or the VMM in it, panicked.
    #[error("a defect of sterna or of the VMM ended it: {0}")]
    Panicked(String),
}

coded!(ReceiveError, ReceiveErrorKind, "arrival", via Refused, State, Lock, Control, Transport, Memory, SavedState, Handover, Session);

impl ReceiveError {
    /// The error itself, or the operator's cancellation, if that broke the connection or the lanes.
    pub(super) fn explained(self, cancel: &Cancel) -> Self {
        match self {
            Self::Control(error) => cancel.explain(error.into()).into(),
            Self::Transport(error) => cancel.explain(error.into()).into(),
            error => error,
        }
    }
}

impl From<SessionError> for ReceiveError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Accept(error) => Self::Accept(error),
            SessionError::Refused(refusal) => Self::Refused(refusal),
            SessionError::GaveUp { reason, .. } => Self::SourceGaveUp(reason),
            SessionError::OutOfTurn(what) => Self::OutOfTurn(what),
            SessionError::LanesFailed(reason) => Self::LanesFailed(reason),
            SessionError::Cancelled => Self::Cancelled,
            SessionError::Panicked(text) => Self::Panicked(text),
            SessionError::Control(error) => error.into(),
            SessionError::Transport(error) => error.into(),
            SessionError::Memory(error) => error.into(),
            error
            @ (SessionError::TimedOut { .. } | SessionError::Dirty(_) | SessionError::System { .. }) => {
                Self::Session(error)
            }
        }
    }
}

impl ArrivalError for ReceiveError {
    fn into_refusal(self) -> Result<Refusal, Self> {
        match self {
            Self::Refused(refusal) => Ok(refusal),
            error => Err(error),
        }
    }
}

impl From<Panicked> for ReceiveError {
    fn from(Panicked(text): Panicked) -> Self {
        Self::Panicked(text)
    }
}

impl From<CheckError> for ReceiveError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::NoSuchBlock => Self::OutOfTurn("digests of blocks that do not exist"),
            CheckError::Incomplete => Self::OutOfTurn("an incomplete list of digests"),
            CheckError::Differs { blocks, of, first } => {
                Self::MemoryDiffers { blocks, of, region: first.region, first_page: first.first_page }
            }
            CheckError::Memory(error) => error.into(),
        }
    }
}
