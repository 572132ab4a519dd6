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

/// A file that was not stored at the destination. The source's file is unchanged.
#[derive(Debug)]
pub struct SendError {
    /// Whether the attempt ended before anything was sent. If not, the destination keeps the data that
    /// arrived, and sending the file again sends only the rest.
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

/// Why a file was not sent.
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
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// The path is not a regular file.
    #[error("{} is {is}: only a regular file can be sent", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
        /// The kind of thing it is.
        is: &'static str,
    },
    /// The file was written to while it was sent.
    #[error("{} changed while it was sent: stop what writes to it, and send it again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The connection or the lanes failed, as for a guest.
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

/// Why a file was not stored at the destination. The data that arrived is kept.
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
        /// The reason.
        reason: String,
    },
    /// A file with that name exists, and it is not to be replaced.
    #[error("{} exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused an operation.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
    /// This host refuses the file.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The file system is full.
    #[error("the file system is full; free some space, and send the file again to complete {}", path.display())]
    Full {
        /// The file with the data that arrived.
        path: PathBuf,
    },
    /// The data that arrived differs from the source's.
    #[error(
        "{blocks} of {of} blocks of 2 MiB in {} are not what the source has: did something write to either file \
         meanwhile? Sending again sends only these",
        path.display()
    )]
    Differs {
        /// The number of blocks that differ.
        blocks: usize,
        /// The number of blocks.
        of: usize,
        /// The file with the data that arrived.
        path: PathBuf,
    },
    /// The connection or the lanes failed, as for a guest.
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
