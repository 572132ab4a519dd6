//! Why a file was not sent, or not stored.

use std::fmt;
use std::io;
use std::path::PathBuf;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::control::ControlError;
use crate::error_code::coded;
use crate::panics::Panicked;
use crate::session::{ArrivalError, SessionError};
use crate::transport::TransportError;
use crate::wire::Refusal;

/// A file that was not stored at the destination. It is untouched at the source.
#[derive(Debug)]
pub struct SendError {
    /// Whether it ended before anything was sent. If not, what arrived is kept at the destination, and sending the file again
    /// sends what is missing.
    pub refused: bool,
    /// Why.
    pub cause: SendFailure,
}

impl fmt::Display for SendError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(formatter)
    }
}

impl std::error::Error for SendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Why a file was not stored.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(SendFailureKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum SendFailure {
    /// The file cannot be read.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// It is not a file that can be sent.
    #[error("{} is {is}: only a regular file can be sent", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
        /// What it is instead.
        is: &'static str,
    },
    /// The file was written to meanwhile.
    #[error("{} changed while it was sent: stop what writes to it, and send it again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Reaching the destination, and the way there: as for a guest.
    #[error(transparent)]
    Transfer(#[from] SessionError),
}

coded!(SendFailure, SendFailureKind, "send", via Transfer);

impl From<ControlError> for SendFailure {
    fn from(error: ControlError) -> Self {
        Self::Transfer(error.into())
    }
}

impl From<Panicked> for SendFailure {
    fn from(panic: Panicked) -> Self {
        Self::Transfer(panic.into())
    }
}

/// Why a file was not stored here. What arrived of it is kept.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(StoreErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum StoreError {
    /// The place cannot take a file.
    #[error("cannot receive into {}: {reason}", path.display())]
    Into {
        /// The place.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file of that name exists, and it was not said to replace it.
    #[error("{} exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// This host does not take the file.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The file system became full.
    #[error("the file system is full; free some of it, and send again what is missing in {}", path.display())]
    Full {
        /// What has arrived.
        path: PathBuf,
    },
    /// What arrived is not what the source has.
    #[error(
        "{blocks} of {of} blocks of 2 MiB in {} are not what the source has: did something write to either file \
         meanwhile? Sending again sends only these",
        path.display()
    )]
    Differs {
        /// How many blocks differ.
        blocks: usize,
        /// How many there are.
        of: usize,
        /// What has arrived.
        path: PathBuf,
    },
    /// The connection and the lanes: as for a guest.
    #[error(transparent)]
    Transfer(#[from] SessionError),
}

coded!(StoreError, StoreErrorKind, "store", via Refused, Transfer);

impl From<ControlError> for StoreError {
    fn from(error: ControlError) -> Self {
        Self::Transfer(error.into())
    }
}

impl From<Panicked> for StoreError {
    fn from(panic: Panicked) -> Self {
        Self::Transfer(panic.into())
    }
}

impl From<TransportError> for StoreError {
    fn from(error: TransportError) -> Self {
        Self::Transfer(error.into())
    }
}

impl ArrivalError for StoreError {
    fn into_refusal(self) -> Result<Refusal, Self> {
        match self {
            Self::Refused(refusal) | Self::Transfer(SessionError::Refused(refusal)) => Ok(refusal),
            error => Err(error),
        }
    }
}
