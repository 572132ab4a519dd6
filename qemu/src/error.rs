//! Why a guest of QEMU could not be moved.

use std::io;
use std::path::PathBuf;

use crate::monitor::{MigrationReport, MigrationStatus, RunState};
use crate::qmp::QmpError;
use crate::shared_ram::SharedRamError;

/// An error of a QEMU that gives or takes a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest's memory.
    #[error(transparent)]
    SharedRam(#[from] SharedRamError),
    /// A socket between QEMU and this process.
    #[error("cannot {what}: {error}")]
    Socket {
        /// What failed.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
    /// The socket for QEMU's channels.
    #[error("cannot make a socket for QEMU's channels at {}: {error}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// The guest is in a state in which it cannot be moved.
    #[error("the guest is in state {state} of QEMU, and only one that is running or paused can be moved")]
    State {
        /// The state.
        state: RunState,
    },
    /// QEMU's guest was moved by Sterna under another name.
    #[error("this QEMU has the guest {found}, as a migration that ended early has noted, and not {expected}")]
    OtherGuest {
        /// The name that was given.
        expected: String,
        /// The name in QEMU.
        found: String,
    },
    /// QEMU did not come as far as expected.
    #[error("QEMU's migration is {status}{why}, and {expected} is expected")]
    Migration {
        /// How far it came.
        status: MigrationStatus,
        /// QEMU's reason, after a colon, or empty.
        why: String,
        /// What should have been.
        expected: &'static str,
    },
    /// QEMU's stream broke or is refused.
    #[error("{0}")]
    Stream(String),
    /// QEMU did not slow the guest.
    #[error("QEMU did not slow the guest by {percent} % in time; that goes on as it was")]
    Throttle {
        /// By how much it should have.
        percent: u8,
    },
    /// No migration is under way.
    #[error("no migration out of this QEMU is under way")]
    NotMigrating,
    /// The destination QEMU has ended, or does not answer any more.
    #[error("the QEMU at the destination has ended, or takes no connection any more: {0}")]
    Gone(#[source] QmpError),
    /// The state of the destination QEMU is not that of a loaded guest.
    #[error("the destination QEMU is in state {state} after loading, and paused is expected")]
    NotPaused {
        /// The state.
        state: RunState,
    },
    /// QEMU refused what the source QEMU saved.
    #[error(
        "QEMU could not load the guest{why}; usually a device is not at the same place, or has other properties, in \
         the two command lines, and the stderr of QEMU names it"
    )]
    NotLoaded {
        /// QEMU's reason, after a colon, or empty.
        why: String,
    },
    /// The saved state could not be given to QEMU.
    #[error("QEMU took only a part of the saved state: {0}")]
    Feed(#[source] io::Error),
}

impl QemuError {
    /// Whether QEMU may have done what it was to do, although its answer is missing: it hangs or has ended.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Qmp(error) if !matches!(error, QmpError::Refused { .. }))
    }

    /// A migration that is not as it should be.
    pub(crate) fn migration(report: MigrationReport, expected: &'static str) -> Self {
        let why = report.error_desc.map(|why| format!(": {why}")).unwrap_or_default();
        Self::Migration { status: report.status, why, expected }
    }
}
