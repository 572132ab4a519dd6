//! The fate of a guest that was given away, or why it is unknown.

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::control::ControlError;
use crate::error_code::coded;
use crate::handover::HandoverError;
use crate::lock::LockError;
use crate::state::StateError;
use crate::wire::Refusal;

/// The fate of a guest in doubt.
#[derive(Debug)]
pub enum Verdict {
    /// It runs, or has run, at the destination: it must not run at the source again.
    Moved,
    /// It never ran at the destination and never will: it belongs to the source.
    Kept,
    /// Not known yet.
    Open(StillInDoubt),
}

/// Why a doubt is not settled.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(StillInDoubtKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum StillInDoubt {
    /// The destination could not be reached, or did not answer.
    #[error("the destination does not say what became of the guest: {0}")]
    Silent(#[from] ControlError),
    /// The destination has no record of this attempt.
    #[error(
        "the destination's state has no record of this migration, which proves nothing: is it the host, and the folder, that the \
         guest was sent to?"
    )]
    NoWord,
    /// The destination does not answer this host.
    #[error("the destination does not say what became of the guest: {0}")]
    NotAnswered(#[source] Refusal),
    /// The destination waits for GO, which this question must not give.
    #[error("the destination is ready and waits for the guest")]
    Ready,
    /// The operator says that the destination is fenced, but it gave a sign of life.
    #[error("the destination is not fenced, because it answered: {0}")]
    Contradicted(String),
    /// The guest was not given away, or the operator's word was to count, but the disk does not take the
    /// record.
    #[error("the guest stays paused until it is recorded that it is the source's: {0}")]
    Unrecorded(#[source] StateError),
    /// Whatever the destination answers, another process holds the guest's lock, or the lock cannot be
    /// reached.
    #[error("the guest does not run here without its lock: {0}")]
    Lock(#[from] LockError),
    /// An answer out of turn.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

coded!(StillInDoubt, StillInDoubtKind, "doubt", via Handover);

/// Why the records of a guest cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// An error of the file.
    #[error(transparent)]
    State(#[from] StateError),
    /// An error of its content.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}
