//! Why a guest's state cannot be used, or the guest not started.

use std::io;
use std::path::PathBuf;

use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use super::folder::FolderError;
use super::holder::LockHolder;
use crate::error_code::coded;
use crate::handover::JournalError;

/// Why a guest's state cannot be claimed, kept or read.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(StateErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum StateError {
    /// The guest's name cannot be the name of a file.
    #[error("`{0}` cannot name a state file: a guest's name may not contain `/` or begin with `.`")]
    Name(String),
    /// Another process, or another attempt of this process, has the guest.
    #[error(
        "a process of this host{holder} has the guest {name}, or brings it to this host: let that end first"
    )]
    Claimed {
        /// The guest.
        name: String,
        /// The process, according to the state file.
        holder: LockHolder,
    },
    /// An earlier version of Sterna left its own files for this guest.
    #[error(
        "{0} was written by an earlier version of sterna, which kept a file for each role: settle with that version where the \
         guest is, then move its files away"
    )]
    Earlier(PathBuf),
    /// The state file is unusable.
    #[error(
        "the state file {path} is unusable: {error}. Find out where the guest is, then move the file away"
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with the file.
        error: JournalError,
    },
    /// The source has brought too many guests that never ran on this host.
    #[error(
        "{} has the records of {left} guests that came from this source and never ran: a new one has no room. Once \
         the source knows that it has them, remove the oldest of their files, or wait until they are 30 days old",
        folder.display()
    )]
    Crowded {
        /// The folder.
        folder: PathBuf,
        /// The number of those guests.
        left: usize,
    },
    /// The folder of state files is unusable.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The file system refused an operation on the state file.
    #[error(
        "cannot {what} the state file {path}: {error}; it needs a disk that takes writes, and 136 KiB on it"
    )]
    Io {
        /// The operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
}

coded!(StateError, StateErrorKind, "state", via Folder);

/// Why a guest may not be started.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(StartErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum StartError {
    /// The guest's state cannot be claimed, kept or read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A guest with that name was handed over, and may run at the other side.
    #[error("a guest named {name} was given to {peer} and may run there")]
    InDoubt {
        /// The guest.
        name: String,
        /// The other side.
        peer: String,
    },
    /// A guest with that name is at the other side.
    #[error("the guest {name} is at {peer}: a second one must not run under its name")]
    Elsewhere {
        /// The guest.
        name: String,
        /// The other side.
        peer: String,
    },
}

coded!(StartError, StartErrorKind, "start", via State);
