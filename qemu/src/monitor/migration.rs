//! A migration of QEMU: its report, and the commands that move it on.

use serde::Deserialize;
use serde_json::json;
use strum::{Display, EnumString};

use super::Monitor;
use crate::qmp::QmpError;
use crate::text::shown;

/// How far a migration is.
#[derive(Clone, Debug, Default, Deserialize, Display, EnumString, PartialEq, Eq)]
#[serde(from = "String")]
#[strum(serialize_all = "kebab-case")]
#[non_exhaustive]
pub enum MigrationStatus {
    /// There has been none.
    #[default]
    None,
    /// It begins.
    Setup,
    /// RAM is sent while the guest runs.
    Active,
    /// The guest is paused; QEMU waits for `migrate-continue`.
    PreSwitchover,
    /// The state of the devices is sent.
    Device,
    /// All has been sent, or has arrived.
    Completed,
    /// It failed; at the source, the guest runs on.
    Failed,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled; the guest runs on.
    Cancelled,
    /// Waits until the guest has unplugged a device.
    WaitUnplug,
    /// RAM is sent while the guest runs at the destination.
    PostcopyActive,
    /// Post-copy was interrupted.
    PostcopyPaused,
    /// Post-copy is resumed.
    PostcopyRecover,
    /// Another guest is followed.
    Colo,
    /// One that this version of Sterna does not know.
    #[strum(default)]
    Other(String),
}

impl From<String> for MigrationStatus {
    fn from(name: String) -> Self {
        Self::from(shown(&name).as_str())
    }
}

impl MigrationStatus {
    /// A migration is under way, so that no other can begin.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        !matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// The answer to `query-migrate`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct MigrationReport {
    /// How far the migration is.
    pub status: MigrationStatus,
    /// What became of RAM so far.
    pub ram: Option<RamReport>,
    /// Why the migration failed.
    pub error_desc: Option<String>,
    /// Why this guest cannot be moved at present.
    pub blocked_reasons: Vec<String>,
    /// The duration so far, in ms.
    pub total_time: Option<u64>,
    /// The duration of the pause, in ms.
    pub downtime: Option<u64>,
    /// The duration of the setup, in ms.
    pub setup_time: Option<u64>,
    /// By how much `auto-converge` slows the guest down, in percent.
    pub cpu_throttle_percentage: Option<u64>,
}

/// What became of RAM in a migration.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct RamReport {
    /// How many bytes are still to send.
    pub remaining: u64,
    /// How many bytes the guest has.
    pub total: u64,
    /// How many bytes have been sent.
    pub transferred: u64,
    /// How often the dirty log has been read.
    pub dirty_sync_count: u64,
    /// How many pages the guest made dirty in the last round, a second.
    pub dirty_pages_rate: u64,
    /// The speed, in Mbit/s.
    pub mbps: f64,
}

impl Monitor {
    /// The present migration, or else the last one.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migration(&self) -> Result<MigrationReport, QmpError> {
        self.ask("query-migrate", &json!({}))
    }

    /// Begins to send the guest, to an address such as `unix:PATH` or `fd:NAME`.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.tell("migrate", &json!({ "uri": uri }))
    }

    /// Begins to receive a guest, in a QEMU that was started with `-incoming defer`.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.tell("migrate-incoming", &json!({ "uri": uri }))
    }

    /// The same. If that fails, QEMU 9.1 and later stays and says why; earlier versions end.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migrate_incoming_and_stay(&self, uri: &str) -> Result<(), QmpError> {
        match self.tell("migrate-incoming", &json!({ "uri": uri, "exit-on-error": false })) {
            Err(QmpError::Refused { description, .. }) if description.contains("exit-on-error") => {
                self.migrate_incoming(uri)
            }
            other => other,
        }
    }

    /// Sends the last of RAM and the devices, after [`PreSwitchover`](MigrationStatus::PreSwitchover).
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migrate_continue(&self) -> Result<(), QmpError> {
        let state = MigrationStatus::PreSwitchover.to_string();
        self.tell("migrate-continue", &json!({ "state": state }))
    }

    /// Gives the migration up. QEMU answers before it is [`Cancelled`](MigrationStatus::Cancelled).
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.tell("migrate_cancel", &json!({}))
    }

    /// Tells the network again where the guest is.
    ///
    /// # Errors
    ///
    /// Those of [`Client::execute_within`](crate::qmp::Client::execute_within).
    pub fn announce_self(&self) -> Result<(), QmpError> {
        // QEMU's own announcement after a migration has these numbers.
        self.tell("announce-self", &json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_report_of_a_guest_that_was_never_moved_is_empty() {
        let report: MigrationReport = serde_json::from_value(json!({})).unwrap();
        assert_eq!(report, MigrationReport::default());
        assert!(!report.status.is_under_way());
    }

    #[test]
    fn a_status_of_a_later_qemu_is_kept_and_counts_as_under_way() {
        let report: MigrationReport = serde_json::from_value(json!({ "status": "postcopy-device" })).unwrap();
        assert_eq!(report.status, MigrationStatus::Other("postcopy-device".into()));
        assert_eq!(report.status.to_string(), "postcopy-device");
        assert!(report.status.is_under_way());
    }

    #[test]
    fn statuses_have_the_names_of_the_protocol() {
        for name in ["none", "setup", "active", "pre-switchover", "device", "wait-unplug", "postcopy-active"]
        {
            let status = MigrationStatus::from(name);
            assert!(!matches!(status, MigrationStatus::Other(_)), "{name}");
            assert_eq!(status.to_string(), name);
        }
    }
}
