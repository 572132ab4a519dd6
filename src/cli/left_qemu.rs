//! The QEMU of a guest whose Sterna process has died: it may still have the guest.

use std::path::Path;

use sterna_qemu::monitor::Monitor;
use sterna_qemu::qmp::{Client, QmpError};
use sterna_qemu::settle::{Owner, Settled, settle};

use super::exit::Exit;
use super::protocol::Found;

/// A QEMU that outlived the process of its guest.
#[derive(Debug)]
pub(crate) struct LeftQemu {
    guest: String,
    monitor: Monitor,
}

impl LeftQemu {
    /// The QEMU with a monitor at this socket; the inner error says that there is none any more.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) fn at(qmp: &Path, guest: &str) -> Result<Result<Self, String>, String> {
        match Client::connect(qmp) {
            Ok(client) => Ok(Ok(Self { guest: guest.to_owned(), monitor: Monitor::new(client) })),
            Err(error @ QmpError::Connect { .. }) => Ok(Err(error.to_string())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The guest may run at another host: it stays paused.
    ///
    /// # Errors
    /// QEMU does not do that, or has another guest.
    pub(crate) fn keep_still(&self) -> Result<(), String> {
        settle(&self.monitor, &self.guest, Owner::Unknown).map(drop).map_err(|error| error.to_string())
    }

    /// The guest is this host's: runs it, unless the operator paused it. `how` says why it is this host's.
    pub(crate) fn run_on(&self, how: &str) -> Found {
        let Self { guest, .. } = self;
        let adopt = format!("no process of Sterna holds it until `sterna adopt {guest}`");
        let found = |exit, what: &str| Found { exit, what: format!("{how}{what}") };
        match settle(&self.monitor, guest, Owner::ThisHost) {
            Ok(Settled::Running) => found(Exit::Done, &format!("runs here; {adopt}")),
            Ok(Settled::Paused) => found(Exit::Done, &format!("is here, and paused as before; {adopt}")),
            Ok(Settled::Ended) => found(Exit::Lost, "has ended with its QEMU"),
            Ok(Settled::Unknown(why)) => {
                found(Exit::Failed, &format!("is this host's, and QEMU does not say whether it runs: {why}"))
            }
            Err(error) => found(Exit::Failed, &format!("is this host's, and cannot be resumed: {error}")),
        }
    }

    /// The guest is another host's: ends QEMU if it has what a migration left.
    pub(crate) fn end(&self) {
        if let Err(error) = settle(&self.monitor, &self.guest, Owner::OtherHost) {
            tracing::warn!("the QEMU here does not end: {error}");
        }
    }
}
