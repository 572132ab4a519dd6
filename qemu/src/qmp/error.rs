//! What can go wrong between this process and QEMU's monitor.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// An error of QEMU's monitor.
#[derive(Debug, Error)]
pub enum QmpError {
    /// No connection was made.
    #[error("cannot connect to QEMU's monitor at {}: {error}; {}", path.display(), remedy(path, error))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The socket takes connections, but sends no greeting.
    #[error(
        "QEMU's monitor at {} does not answer: QEMU hangs, or another client is connected (perhaps another Sterna), \
         for QEMU serves one at a time; start QEMU with one more monitor for Sterna, \
         `-qmp unix:PATH,server=on,wait=off`",
        path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// What listens at the socket does not speak QMP.
    #[error("{} is no QMP socket of QEMU: {what}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it did instead.
        what: String,
    },
    /// The socket belongs to another process than at the first connection.
    #[error(
        "another process, {now}, answers at {} now; before, it was process {before}: this QEMU has ended",
        path.display()
    )]
    OtherProcess {
        /// The socket.
        path: PathBuf,
        /// The process at the first connection.
        before: i32,
        /// The process at this connection.
        now: i32,
    },
    /// The command did not reach QEMU whole, so QEMU did not execute it.
    #[error("{command} was not sent to QEMU: {error}")]
    Unsent {
        /// The command.
        command: String,
        /// Why not.
        error: io::Error,
    },
    /// The connection broke before the answer came: whether QEMU executed the command is unknown.
    #[error(
        "the connection to QEMU's monitor broke before the answer to {command} came ({why}); QEMU may have executed it"
    )]
    Lost {
        /// The command.
        command: String,
        /// How the connection broke.
        why: String,
    },
    /// No answer came in time: whether QEMU executed the command, or still will, is unknown.
    #[error("QEMU did not answer {command} in {:.1} s; QEMU may have executed it", limit.as_secs_f64())]
    Late {
        /// The command.
        command: String,
        /// The time limit.
        limit: Duration,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// QEMU's answer is not one to this command.
    #[error("QEMU's answer to {command} is not understood: {what}")]
    Words {
        /// The command.
        command: String,
        /// What is wrong with the answer.
        what: String,
    },
}

impl QmpError {
    /// Whether QEMU may have executed the command although its answer is missing.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Late { .. })
    }

    /// Whether this QEMU does not have the command at all.
    #[must_use]
    pub fn is_no_such_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    pub(crate) fn words(command: &str, what: impl Into<String>) -> Self {
        Self::Words { command: command.to_owned(), what: what.into() }
    }
}

fn is_of_no_listener(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// What mends a connection that was not made.
fn remedy(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run Sterna as the user of QEMU, or as root".into(),
        _ if is_of_no_listener(error) => {
            format!(
                "a QEMU with `-qmp unix:{},server=on,wait=off` listens there while it runs",
                path.display()
            )
        }
        _ => "name the socket of one of its `-qmp` options".into(),
    }
}
