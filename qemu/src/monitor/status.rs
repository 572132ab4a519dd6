//! Whether the guest runs: asking, starting, stopping.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use strum::{Display, EnumString};

use super::Monitor;
use crate::qmp::QmpError;
use crate::text::shown;

/// What QEMU does with the guest.
#[derive(Clone, Debug, Deserialize, Display, EnumString, PartialEq, Eq)]
#[serde(from = "String")]
#[strum(serialize_all = "kebab-case")]
#[non_exhaustive]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// Paused by a command.
    Paused,
    /// Not yet started.
    #[strum(serialize = "prelaunch")]
    PreLaunch,
    /// Waits for a guest, or receives one.
    #[strum(serialize = "inmigrate")]
    InMigrate,
    /// Stopped for the end of a migration.
    FinishMigrate,
    /// All of the guest has been sent, and its disks are released.
    #[strum(serialize = "postmigrate")]
    PostMigrate,
    /// The guest sleeps (ACPI S3).
    Suspended,
    /// The guest has shut down.
    Shutdown,
    /// QEMU cannot continue.
    InternalError,
    /// Stopped by an error of a disk.
    IoError,
    /// The guest has panicked.
    GuestPanicked,
    /// Stopped by a watchdog.
    Watchdog,
    /// A snapshot is being saved.
    SaveVm,
    /// A snapshot is being loaded.
    RestoreVm,
    /// Stopped by a debugger.
    Debug,
    /// Follows another guest.
    Colo,
    /// One that this version of Sterna does not know.
    #[strum(default)]
    Other(String),
}

impl From<String> for RunState {
    fn from(name: String) -> Self {
        Self::from(shown(&name).as_str())
    }
}

/// The answer to `query-status`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// What QEMU does with the guest.
    #[serde(rename = "status")]
    pub state: RunState,
    /// The vCPUs run.
    pub running: bool,
}

impl Monitor {
    /// What QEMU does with the guest.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn status(&self) -> Result<Status, QmpError> {
        self.ask("query-status", &json!({}))
    }

    /// Starts the vCPUs. If the answer [is missing](QmpError::is_unknown), they may run.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn cont(&self) -> Result<(), QmpError> {
        self.tell("cont", &json!({}))
    }

    /// Stops the vCPUs. Before a guest has arrived, this keeps it from starting when it does.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn stop(&self) -> Result<(), QmpError> {
        self.tell("stop", &json!({}))
    }

    /// Ends QEMU. The connection may break before the answer comes; then QEMU must be gone soon.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn quit(&self) -> Result<(), QmpError> {
        let lost = match self.tell("quit", &json!({})) {
            Err(error @ QmpError::Lost { .. }) => error,
            other => return other,
        };
        let gone = self.client.wait_until(Instant::now() + QUITS_WITHIN, |_| match self.status() {
            Err(QmpError::Connect { .. } | QmpError::OtherProcess { .. }) => Ok(Some(())),
            _ => Ok::<_, QmpError>(None),
        })?;
        gone.ok_or(lost)
    }
}

/// How long a QEMU that closed its monitor may take to end.
const QUITS_WITHIN: Duration = Duration::from_secs(5);
