//! Why a folder, or a file in it, is not used for state.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use strum::{EnumDiscriminants, EnumIter, EnumMessage, IntoStaticStr};
use thiserror::Error;

use crate::error_code::coded;

/// Why a folder, or a file in it, is not used for state.
#[derive(Debug, Error, EnumDiscriminants)]
#[strum_discriminants(
    name(FolderErrorKind),
    vis(pub(crate)),
    derive(EnumIter, EnumMessage, IntoStaticStr),
    strum(serialize_all = "kebab-case")
)]
#[non_exhaustive]
pub enum FolderError {
    /// Another user can change the folder, a part of its path, or a file.
    #[error(
        "{path} belongs to user {owner}, and this process runs as user {user}: that user could change the state of guests. \
         Choose a folder of user {user}, or change the owner"
    )]
    Owner {
        /// The folder, a folder above it, a link on the way, or a file.
        path: PathBuf,
        /// The user that owns it.
        owner: u32,
        /// The effective user of this process.
        user: u32,
    },
    /// A group, or any user, can change the folder, a part of its path, or a file.
    #[error(
        "{path} is writable by other users (mode {mode:04o}): they could change the state of guests. \
         Take that permission away (chmod go-w), or choose another folder"
    )]
    Writable {
        /// The folder, a folder above it, or a file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The folder itself, or a file in it, is a symbolic link.
    #[error("{0} is a symbolic link: name what it points to, so that another target cannot take its place")]
    Link(PathBuf),
    /// The path names something other than a folder.
    #[error("{0} is not a folder: choose another, or move it away")]
    NotAFolder(PathBuf),
    /// The name of a state file belongs to something other than a regular file.
    #[error("{0} is not a regular file: find out what made it, then move it away")]
    NotAFile(PathBuf),
    /// The file system would lose the state, or another host would take it for its own.
    #[error("{path} is on {kind}: {danger}. Choose a folder on a disk of this host")]
    Storage {
        /// The folder.
        path: PathBuf,
        /// The kind of file system.
        kind: &'static str,
        /// The danger to the state.
        danger: &'static str,
    },
    /// The space for a file could not be reserved.
    #[error(
        "cannot reserve {len} bytes for {path}: {error}. Free some space, or choose a folder on another disk"
    )]
    Room {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The kernel's error.
        error: io::Error,
    },
    /// The name leads out of the folder.
    #[error("`{0}` cannot be the name of a file")]
    Name(String),
    /// The file system refused an operation.
    #[error("cannot {what} {path}: {error}. The state of guests needs a folder that this user may write to")]
    Io {
        /// The operation.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's error.
        error: io::Error,
    },
}

coded!(FolderError, FolderErrorKind, "state-folder");

/// For `map_err`: a system call that failed.
pub(super) fn failed(what: &'static str, path: &Path) -> impl Fn(Errno) -> FolderError {
    let path = path.to_owned();
    move |error| FolderError::Io { what, path: path.clone(), error: error.into() }
}
